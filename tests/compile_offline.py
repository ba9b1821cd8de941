"""Compiles the kernels for a GPU that is not there: `python -m tests.compile_offline 90`, once per case that it prints.

The real launchers run on CPU tensors with a driver that names a target but launches nothing, so every kernel is built
with just the arguments and constants of that call, down to machine code. The interpreter cannot tell that a kernel
compiles: it knows no types of loop-carried variables, no shared memory, no layouts.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.every_kernel import call_all


class NamedTarget:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def pretend(arch: int) -> None:
    """Has launches compile for a GPU, and do no more."""
    triton.runtime.driver.set_active(NamedTarget(arch))
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)


def compile_all(arch: int) -> None:
    # imported for its launchers, so that `arch_of` can be set everywhere
    from diffv2_sparse.kernels import (  # noqa: F401
        backward,
        choose,
        decode,
        fetch,
        forward,
        linear,
        summaries,
        tiles,
    )

    pretend(arch)
    tiles_of = tiles.arch_of
    for module in [m for name, m in sys.modules.items() if name.startswith("diffv2_sparse.kernels")]:
        if getattr(module, "arch_of", None) is tiles_of:
            module.arch_of = lambda device: arch
    call_all("cpu")


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
    print("all of them")
