"""Imports run one way, and the core needs torch alone. Read from the sources, then tried in fresh interpreters."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "diffv2_sparse"
KERNELS = PACKAGE.parent / "kernels"  # the package sees it through a symlink

# From the bottom up. A room imports from floors below its own, or from its own floor where that makes no circle.
FLOORS = (
    {"kernels"},
    {"selection"},
    {"reference", "blockwise", "adapters", "ops"},
    {"selectors", "pages", "pinned", "offload", "cache_spec", "cache", "xformers_paged", "attention"},
    {"yoco", "hf", "haystack", "tokenizer", "environment"},
    {"train", "curriculum", "niah", "niah_answers", "niah_cells", "niah_report", "continuation"},
    {"cli"},
)
BACKENDS = FLOORS[2]
CORE = FLOORS[1] | FLOORS[2] | FLOORS[3]


class Import(NamedTuple):
    room: str  # the importing file's room: a module of the package, or a folder
    module: str  # the imported one, absolute
    lazy: bool  # inside a function

    @property
    def target(self) -> str | None:
        """The room that is imported; None for another package's."""
        parts = self.module.split(".")
        return (parts[1] if len(parts) > 1 else "__init__") if parts[0] == "diffv2_sparse" else None


def imports_of(source: str, path: str) -> list[Import]:
    """Every import that is ever executed in `path`, such as "yoco/layers.py", relative to the package."""
    parts = ["diffv2_sparse", *path.removesuffix(".py").split("/")]
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        modules = []
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            # `from . import niah` names a room, `from .niah import run` names what is in it
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "diffv2_sparse" else [base]
        found.extend(Import(parts[1], module, lazy) for module in modules)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def all_imports() -> list[Import]:
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    named = [(p, p.relative_to(PACKAGE).as_posix()) for p in files]
    named += [(p, p.relative_to(KERNELS.parent).as_posix()) for p in KERNELS.rglob("*.py")]
    return [found for path, name in named for found in imports_of(path.read_text(encoding="utf-8"), name)]


def floor_of(room: str) -> int:
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise AssertionError(f"{room} has no place yet: give it one in FLOORS")


def test_the_reader_reads():
    source = """
import diffv2_sparse.yoco
from . import layers
from .layers import RMSNorm
from ..cache import PagedKV
from .. import niah, cli
if TYPE_CHECKING:
    from ..train import lost
def later():
    import triton.language as tl
"""
    found = [(i.room, i.target, i.module, i.lazy) for i in imports_of(source, "yoco/modeling.py")]
    assert found == [
        ("yoco", "yoco", "diffv2_sparse.yoco", False),
        ("yoco", "yoco", "diffv2_sparse.yoco", False),
        ("yoco", "yoco", "diffv2_sparse.yoco.layers", False),
        ("yoco", "cache", "diffv2_sparse.cache", False),
        ("yoco", "niah", "diffv2_sparse.niah", False),
        ("yoco", "cli", "diffv2_sparse.cli", False),
        ("yoco", None, "triton.language", True),
    ]
    assert {i.room for i in all_imports()} >= {"attention", "selectors", "yoco", "hf", "cli"}


def test_imports_go_down():
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.room == "__init__":
            assert found.target in {None, "attention", "selection", "selectors"}, "the package offers its core alone"
        elif found.target not in (None, found.room):
            assert floor_of(found.target) <= floor_of(found.room), f"{found.room} imports {found.target}, above it"
            graph.setdefault(found.room, set()).add(found.target)
    for backend in BACKENDS:
        assert not graph.get(backend, set()) & BACKENDS, f"{backend} leans on another backend"
    while graph:  # take away what imports nothing that is left; a circle stays
        free = {room for room, targets in graph.items() if not targets & graph.keys()}
        assert free, f"imports run in a circle among {sorted(graph)}"
        graph = {room: targets for room, targets in graph.items() if room not in free}


def test_what_the_core_needs():
    stdlib = sys.stdlib_module_names
    for found in all_imports():
        top = found.module.split(".")[0]
        if found.target is not None:
            if found.target == "kernels" and found.room != "kernels":
                assert found.room == "ops", f"{found.room} imports kernels; only ops does"
                assert found.lazy, "ops imports kernels inside functions"
        elif found.room == "kernels":
            assert top in stdlib | {"torch", "triton"}, f"kernels import {top}"
        elif found.room in CORE and not found.lazy:
            assert top in stdlib | {"torch"}, f"{found.room} imports {top} when it is loaded"
        elif found.room in CORE:
            optional = {"adapters": {"flash_attn"}, "xformers_paged": {"xformers"}, "ops": {"triton"}}.get(
                found.room, set()
            )
            assert top in stdlib | {"torch"} | optional, f"{found.room} imports {top}"
        else:
            assert top != "triton", f"{found.room} imports triton; the kernels are the core's business"


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_core_loads_neither_transformers_nor_triton():
    run("import sys, diffv2_sparse; loaded = {'transformers', 'triton'} & set(sys.modules); assert not loaded, loaded")


@pytest.mark.parametrize("absent", ["triton", "transformers"])
def test_the_core_works_without(absent):
    run(f"""
import sys
sys.modules[{absent!r}] = None  # `import {absent}` raises ImportError
import torch
from diffv2_sparse import TopK, diff_attention, select_blocks
q, k, v, lam = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2)
q.requires_grad_()
selection = select_blocks(q, k, budget=TopK(4), block_m=4, block_n=8)
o = diff_attention(q, k, v, lam, selection)
o.sum().backward()
assert o.shape == (1, 40, 2, 8) and q.grad.isfinite().all()
""")
