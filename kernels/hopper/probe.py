"""Whether this machine runs the Hopper kernels: triton's version, the GPU, and a trial of Gluon's interface.

Gluon is experimental and changes between versions of triton; what it does not do here, it shows when a small kernel is
compiled that uses all that the real ones use. Nothing is launched, and the answer is kept.
"""

import functools
import re
import warnings

import torch
import triton

OLDEST = (3, 6)  # triton


@torch.compiler.assume_constant_result
def obstacle(device: int) -> str | None:
    """What keeps CUDA device number `device` from the Hopper kernels, in words; None if nothing does."""
    return _find(device)


@functools.cache
def _find(device: int) -> str | None:
    if tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer, not {triton.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"it needs a GPU of compute capability 9.0, not {major}.{minor}"
    try:
        from .trial import compile_trial

        compile_trial(torch.device("cuda", device))
    except Exception as error:  # an interface that has changed may fail in any way
        told = f"{type(error).__name__}: {error}".splitlines()[0]  # a compiler's may be pages
        reason = f"Gluon in triton {triton.__version__} fails its trial: {told}"
        warnings.warn(f'no backend "hopper" on this GPU; "auto" takes "triton": {reason}', stacklevel=3)
        return reason
    return None
