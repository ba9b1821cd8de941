"""Runs the Gluon kernels of kernels/hopper in Triton's interpreter: `forward = load("forward").forward`.

`load` imports a module anew, as part of a package of its own, with stand-ins where it imports Gluon. Layouts vanish;
shared memory is numpy arrays; a descriptor copies what the copy engine would, wrap-around of addresses included. The
warps of a program are threads that take turns: one runs until it waits at a barrier. Products read their operands when
they are waited for, as late as the hardware may, so that a tile that was released too soon, a wait for too few, or a
barrier of a wrong phase come out as wrong numbers, or as a deadlock. Half precision, not bfloat16.
"""

import contextlib
import importlib
import math
import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

PACKAGE = "diffv2_sparse.kernels.hopper"
PATIENCE_S = 10

turn = threading.Condition()
running = threading.local()


class Deadlock(RuntimeError):
    pass


def number(x) -> int:
    if isinstance(x, tl.tensor):
        return int(x.handle.data.squeeze())
    return int(getattr(x, "value", x))


def tensor(array: np.ndarray, dtype: tl.dtype):
    return tl.tensor(TensorHandle(array, dtype), tl.block_type(dtype, list(array.shape)))


NUMPY = {tl.float16: np.float16, tl.float32: np.float32, tl.int32: np.int32}


class Barrier:
    """Completes a phase when `count` arrivals and all bytes that were expected have come."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def tick(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
            turn.notify_all()


class Shared:
    """A view of shared memory; of barriers, a list of them."""

    def __init__(self, data, dtype=None):
        self.data, self.dtype = data, dtype

    @property
    def shape(self):
        return self.data.shape

    def index(self, i):
        return Shared(self.data[number(i)], self.dtype)

    def reshape(self, shape):
        view = self.data.reshape([number(n) for n in shape])
        assert np.shares_memory(view, self.data)
        return Shared(view, self.dtype)

    def permute(self, order):
        return Shared(self.data.transpose(order), self.dtype)

    def slice(self, start, length, dim=0):
        at = [slice(None)] * self.data.ndim
        at[dim] = slice(number(start), number(start) + number(length))
        return Shared(self.data[tuple(at)], self.dtype)

    def store(self, x):
        self.data[...] = x.handle.data

    def load(self, layout):
        return tensor(self.data.copy(), self.dtype)

    def _reinterpret(self, dtype, shape, layout):
        assert self.data.flags.c_contiguous
        shape = [number(n) for n in shape]
        whole = self.data.reshape(-1).view(NUMPY[dtype])
        return Shared(whole[: math.prod(shape)].reshape(shape), dtype)


def allocate_shared_memory(dtype, shape, layout):
    shape = [number(n) for n in shape]
    if dtype == tl.int64:  # barriers
        return Shared(Barrier() if shape == [1] else [Barrier() for _ in range(shape[0])])
    poison = np.iinfo(np.int32).min if dtype == tl.int32 else np.nan
    return Shared(np.full(shape, poison, NUMPY[dtype]), dtype)


def init(barrier, count):
    barrier.data.count = barrier.data.missing = number(count)


def expect(barrier, size):
    barrier.data.bytes += number(size)
    barrier.data.missing -= 1
    barrier.data.tick()


def arrive(barrier, *, count=1):
    barrier.data.missing -= count
    assert barrier.data.missing >= 0, "more arrivals than a barrier counts"
    barrier.data.tick()


def wait(barrier, phase):
    phase = number(phase)
    if not turn.wait_for(lambda: barrier.data.phase != phase or running.failures, PATIENCE_S) or running.failures:
        raise Deadlock(f"nobody completes phase {phase}")


@dataclass
class TensorDescriptor:
    base: object
    shape: list
    strides: list
    block_shape: list
    layout: object

    @property
    def dtype(self):
        return tl.float16


def async_copy_global_to_shared(descriptor, coordinates, barrier, result):
    assert list(result.data.shape) == descriptor.block_shape
    assert math.prod(descriptor.block_shape[:-1]) >= 8, "the engine fills whole groups of 8 swizzled rows"
    base = descriptor.base.detach()
    whole = base.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0).numpy()
    inside, at = np.True_, np.zeros([1] * len(coordinates), object)
    for dim, (first, n, size, stride) in enumerate(
        zip(coordinates, descriptor.block_shape, descriptor.shape, descriptor.strides)
    ):
        place = number(first) + np.arange(n).reshape([-1 if i == dim else 1 for i in range(len(coordinates))])
        inside = inside & (place >= 0) & (place < size)
        at = at + place.astype(object) * stride
    at = np.where(inside, (at * 2 % 2**64) // 2 + base.storage_offset(), 0).astype(np.int64)
    result.data[...] = np.where(inside, whole[at], 0)
    barrier.data.bytes -= result.data.size * 2
    barrier.data.tick()


@dataclass
class Product:
    """On its way: computed when it is waited for."""

    a: object
    b: object
    acc: object
    done: object = None

    def finish(self):
        a, b = (x.data if isinstance(x, Shared) else x.handle.data for x in (self.a, self.b))
        product = a.astype(np.float32) @ b.astype(np.float32)
        self.done = tensor(product if self.acc is None else product + self.acc.handle.data, tl.float32)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async):
    product = Product(a, b, acc if use_acc else None)
    running.products.append(product)
    return product


def warpgroup_mma_wait(num_outstanding, deps):
    turn.wait(0.0005)  # others go on, and may overwrite what was released too soon
    while len(running.products) > num_outstanding:
        running.products.pop(0).finish()
    done = tuple(x.done for x in deps)
    assert all(x is not None for x in done), "a product is used that nobody waited for"
    return done[0] if len(done) == 1 else done


def warp_specialize(jobs, worker_num_warps, worker_num_regs):
    failures = []

    def work(function, arguments):
        running.products, running.failures = [], failures
        with turn:
            try:
                function(*arguments)
                assert not running.products, "products are left on their way"
            except BaseException as error:
                failures.append(error)
                turn.notify_all()

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    if asm == "mov.u32 $0, %ctaid.x;":
        return tl.program_id(0)
    data = [x.handle.data for x in args]
    if asm.startswith("cvt.rn.f16x2.f32"):
        assert asm == "cvt.rn.f16x2.f32 $0, $2, $1;"
        even, odd = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in data)
        return tensor((even | odd << 16).view(np.int32), tl.int32)
    assert asm == "mov.b32 $0, $1;"
    assert pack == 2
    pairs = np.ascontiguousarray(data[0][:, ::2]).view(np.uint32)  # of every two registers, the first
    halves = np.stack([pairs & 0xFFFF, pairs >> 16], -1).astype(np.uint16).view(np.float16)
    return tensor(halves.reshape(data[0].shape), tl.float16)


def of_triton(name):
    """A builtin that the interpreter has, as it stands when it is called."""
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


TYPES = "constexpr", "float16", "bfloat16", "float32", "int32", "int64"
BUILTINS = "load", "store", "where", "minimum", "maximum", "cdiv", "program_id", "log2", "exp2", "join", "max", "sum"
LAYOUTS = (
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
    "NVMMADistributedLayout",
    "DotOperandLayout",
    "BlockedLayout",
    "SliceLayout",
)
LANGUAGE = SimpleNamespace(
    **{name: getattr(tl, name) for name in TYPES},
    **{name: of_triton(name) for name in BUILTINS},
    **dict.fromkeys(LAYOUTS, lambda *args, **kwargs: None),
    arange=lambda start, end, layout: tl.arange(start, end),
    full=lambda shape, value, dtype, layout: tl.full(shape, value, dtype),
    zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    static_range=range,
    shared_memory_descriptor=Shared,
    allocate_shared_memory=allocate_shared_memory,
    inline_asm_elementwise=inline_asm_elementwise,
    warp_specialize=warp_specialize,
)
HOPPER = SimpleNamespace(
    mbarrier=SimpleNamespace(init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: None),
    tma=SimpleNamespace(async_copy_global_to_shared=async_copy_global_to_shared),
    fence_async_shared=lambda: None,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)
GLUON = SimpleNamespace(jit=triton.jit, language=LANGUAGE)
STAND_INS = {
    "triton.experimental": SimpleNamespace(gluon=GLUON),
    "triton.experimental.gluon": GLUON,
    "triton.experimental.gluon.language": LANGUAGE,
    "triton.experimental.gluon.language.nvidia.hopper": HOPPER,
    "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=TensorDescriptor),
}


@contextlib.contextmanager
def stood_in():
    """Modules that import Gluon get the stand-ins."""
    real = {name: sys.modules.get(name) for name in STAND_INS}
    sys.modules.update(STAND_INS)
    try:
        yield
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load(name: str) -> ModuleType:
    """The module `name` of kernels/hopper, to run on a CPU."""
    package = PACKAGE + "_on_cpu"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(importlib.import_module(PACKAGE).__path__)
    with stood_in():
        module = importlib.import_module(f"{package}.{name}")
    for part in [m for n, m in sys.modules.items() if n.startswith(package + ".")]:
        part.tl = tl  # the interpreter looks for it beside every kernel
    tl.dtype.value = property(lambda self: self)
    tl.constexpr.__rmod__ = lambda self, other: other % self.value
    tl.block_type.layout = None
    return module
