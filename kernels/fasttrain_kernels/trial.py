"""A Triton kernel is tried on the GPU at hand before it is relied on."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

TOLERANCE = 1e-2
"Of the relative error: what is looked for is a kernel that is broken, not how the hardware rounds."
_verdicts: dict[str, bool] = {}


def triton_passes(kernel: str, results: Callable[[str], Iterable[Tensor]]) -> bool:
    """Whether ``results("triton")`` equal ``results("reference")``; found once a process, in some seconds.

    A compiler, driver or GPU on which Triton fails, or computes something else, costs the kernel's speed and a warning,
    never a run or a wrong gradient.

    Args:
        kernel: its name, for the warning.
        results: small results of every pass, with the implementation given.
    """
    if kernel not in _verdicts:
        _verdicts[kernel] = False  # also for whoever asks during the trial
        complaint = _complaint(results)
        _verdicts[kernel] = complaint is None
        if complaint is not None:
            warnings.warn(
                f"Triton's {kernel} is not used on this GPU: {complaint}; PyTorch's operations take its place, slower",
                RuntimeWarning,
                stacklevel=2,
            )
    return _verdicts[kernel]


def _complaint(results: Callable[[str], Iterable[Tensor]]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it is not installed (pip install triton)"
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        expected = [tensor.detach().double() for tensor in results("reference")]
        try:
            found = [tensor.detach().double() for tensor in results("triton")]
        except Exception as error:  # whatever a compiler can raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for position, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        error = float((ours - truth).norm() / truth.norm())
        if not error < TOLERANCE:
            return f"its result {position} is {error:.1e} from the reference"
    return None


__all__ = ["triton_passes"]
