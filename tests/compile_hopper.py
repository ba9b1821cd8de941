"""Compiles the Hopper kernels without a GPU and tells what became of them: `python -m tests.compile_hopper [all]`.

One line per kernel: the case, then what the assembler reports, and the most registers that an instruction names. It
fails if a kernel spills registers to memory in the steps of a walk, or more of them than is known of it, waits for
every single product (ptxas then says why, C7510 … C7519), or takes more registers than its budget. Without "all" a
choice of cases, for the tests; with it all that the launchers may ask for, in one process of most of an hour: run it
under each version of triton that is supported.
"""

import contextlib
import functools
import io
import itertools
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.runtime.jit import JITFunction

from diffv2_sparse import ops
from diffv2_sparse.kernels.hopper import key_gradients as by_keys
from diffv2_sparse.kernels.hopper import query_gradient as by_rows
from diffv2_sparse.kernels.hopper.forward import forward
from diffv2_sparse.kernels.hopper.trial import compile_trial
from tests.compile_offline import pretend

REGISTERS = 248  # of a thread: what the first consumer has; 128 × (248 + 240 + 24) are the 65,536 of a multiprocessor
SPILLED = {"_forward_kernel": 48, "_dq_kernel": 8, "_key_gradients_kernel": 172}  # bytes of a thread, in a launch
SPILLED_IN_LOOPS = {"_key_gradients_kernel": 24}  # instructions in the four kinds of steps; of other kernels none
T, H, NB = 512, 2, 4

# of: the kernels to compile; keys: block_n, "dense" or "window"; heads: pairs, or heads of ordinary attention, of a
# group; C and block_m: of lists
CASES = {
    "blocks of 128": {"of": ("o", "dq", "dk, dv"), "save": True},
    "classes apart": {"of": ("o", "dq", "dk, dv"), "C": 2, "save": True},  # o and dq in two
    "classes united, rows of 16": {"of": ("o",), "keys": 64, "block_m": 16, "C": 2},
    "window, heads of 64": {"of": ("dq", "dk, dv"), "keys": "window", "D": 64},
    "packed, blocks of 64, half precision": {"of": ("o",), "keys": 64, "packed": True, "dtype": torch.float16},
}


def all_cases() -> dict[str, dict]:
    """Every D, walk, form of packing and use of lists; dtypes and what is saved in turn, for they change little, and dk
    and dv where it is saved. Turns are of an odd number, so that they fall in step with nothing.
    """
    cases = {}
    bf16, fp16 = torch.bfloat16, torch.float16
    turn = itertools.cycle(((bf16, True), (fp16, False), (bf16, False), (fp16, True), (bf16, True)))
    for D, keys, packed in itertools.product((64, 128), (64, 128, "dense", "window"), (False, True)):
        for pairs, heads in ((4, 0), (1, 0), (0, 3)):
            for C, block_m, windowed in itertools.product((1, 2), (128, 16), (False, True)):
                if isinstance(keys, str) and (C, block_m, windowed) != (1, 128, False):
                    continue
                if heads and C == 2:
                    continue
                dtype, save = next(turn)
                case = {"D": D, "keys": keys, "packed": packed, "pairs": pairs, "heads": heads, "C": C}
                case |= {"block_m": block_m, "windowed": windowed, "dtype": dtype, "save": save}
                told = ", ".join(f"{name} {value}" for name, value in case.items())
                cases[told] = case | {"of": ("o", "dq", "dk, dv") if save else ("o", "dq")}
    return cases


def launch(
    *, of, D=128, keys=128, packed=False, pairs=4, heads=0, C=1, block_m=128, windowed=False, dtype=None, save=False
):
    HQ, HO = H * (2 * pairs or heads), H * (pairs or heads)
    q, k, v, do = (torch.empty(1, T, h, D, dtype=dtype or torch.bfloat16) for h in (HQ, H, H, HO))
    lam = q.new_empty(1, T, H * pairs) if pairs else None
    lists, transposed = (None, None), None
    if not isinstance(keys, str):
        NM, NN = -(-T // block_m), -(-T // keys)
        lists = torch.zeros(1, C, H, NM, NB, dtype=torch.int32), torch.zeros(1, C, H, NM, dtype=torch.int32)
        rows = torch.zeros(1, C, H, NM * NB, dtype=torch.int32)
        transposed = torch.zeros(1, C, H, NN + 1, dtype=torch.int32), rows
    bounds = torch.tensor([0, T], dtype=torch.int32) if packed else None
    window = 100 if windowed or keys == "window" else None
    domain = ops._domain(q, k, *lists, bounds, bounds, block_m, keys, window)
    lse = torch.empty(1, HQ, T)
    if "o" in of:
        forward(q, k, v, lam, domain, 0.1, save_noise=save, save_lse=save)
    if "dq" in of and by_rows.obstacle(q, k, lam, domain) is None:
        by_rows.query_gradient(do, q, k, v, lam, lse, lse, domain, 0.1)
    if "dk, dv" in of and by_keys.obstacle(q, k, lam, domain) is None:
        by_keys.key_gradients(do, q, k, v, lam, lse, lse, domain, transposed, 0.1)


def faults(log: str, registers: int, in_loops: int = 0, kernel: str = "") -> list[str]:
    """What is wrong with a kernel that was assembled with this log, and spills so often in its loops."""
    spilled = SPILLED.get(kernel, 0)
    found = [f"spills: {n} bytes" for n in re.findall(r"(\d+) bytes spill", log) if int(n) > spilled]
    if in_loops > SPILLED_IN_LOOPS.get(kernel, 0):
        found.append(f"spills in loops: {in_loops} instructions")
    found += [f"serialised: C{n}" for n in re.findall(r"\(C(751\d)\)", log)]
    if "bytes spill" not in log:
        found.append("no report")
    return found + ([f"{registers} registers"] if registers > REGISTERS else [])


def machine_code(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def registers_of(code: str) -> int:
    """The highest register that an instruction names, and one."""
    return 1 + max(int(n) for n in re.findall(r"\bR(\d+)\b", code))


def spilled_in_loops(code: str) -> int:
    """Instructions that move spilled registers inside loops of products, which end in a conditional branch back."""
    instructions = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    moves, products = ([at for at, what in instructions if re.search(kind, what)] for kind in (r"\b(STL|LDL)", "HGMMA"))
    found, loops = set(), 0
    for end, what in instructions:
        back = re.match(r"@.*BRA.*0x([0-9a-f]+)", what)
        begin = int(back[1], 16) if back else end + 1
        if any(begin <= at <= end for at in products):
            loops += 1
            found.update(at for at in moves if begin <= at <= end)
    if not loops:
        raise ValueError("code: expected loops of products, found none")
    return len(found)


def compile_cases(cases: dict[str, dict]) -> bool:
    """Returns whether all is well."""
    pretend(90)
    compile_trial(torch.device("cpu"))  # else "hopper" would never be taken
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    reports = []

    def compile_one(kernel, grid, *args, **kwargs):
        if not kernel.is_gluon():
            return
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
        code = machine_code(compiled.asm["cubin"])
        registers, in_loops = registers_of(code), spilled_in_loops(code)
        wrong = faults(log.getvalue(), registers, in_loops, kernel.__name__)
        spills = " and ".join(re.findall(r"(\d+) bytes spill", log.getvalue())[-2:])
        told = f"{', '.join(wrong) or 'good'}; {registers} registers, {compiled.metadata.shared} B shared, "
        told += f"{spills} B spilled and loaded, {in_loops} times in loops"
        reports.append((kernel.__name__, told, not wrong))

    JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compile_one, kernel, grid)
    for case, arguments in cases.items():
        before = len(reports)
        launch(**arguments)
        for kernel, told, _ in reports[before:]:
            print(f"{case} | {kernel}: {told}", flush=True)
    return all(good for *_, good in reports)


if __name__ == "__main__":
    print("triton", triton.__version__)
    sys.exit(0 if compile_cases(all_cases() if "all" in sys.argv[1:] else CASES) else 1)
