"""One step of APGD's bookkeeping; the mathematics is in this folder's README."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttrain_kernels.apgd.reference import Norm, State, apgd_step_reference, ascend, initial_state, project
from fasttrain_kernels.apgd.rows import lies_in_rows
from fasttrain_kernels.trial import triton_passes

Implementation = Literal["auto", "reference", "cpu", "triton"]


def apgd_step(
    state: State,
    loss: Tensor,
    gradient: Tensor,
    images: Tensor,
    eps: float,
    norm: Norm,
    *,
    first: bool = False,
    window: int = 0,
    momentum: float = 0.75,
    rho: float = 0.75,
    impl: Implementation = "auto",
) -> State:
    """Take in the loss and gradient at ``state.x`` and return the state with the next iterate (Croce & Hein 2020).

    Per image, without synchronising: keep the best iterate; at a checkpoint halve the step size and go back to the best
    iterate if too few of the last ``window`` losses rose, or if the best loss stands where it stood at the checkpoint
    before and nothing was halved there; then move, with momentum, inside the ball and [0, 1]. Nothing is written in
    place; the memory format is that of ``state.x``.

    Args:
        loss: [B] at ``state.x``, to be raised, float32 (float64 for float64 images).
        gradient: [B, ...] of the summed loss there.
        images: [B, ...] centres of the balls, in [0, 1].
        eps: radius, in units of the images.
        norm: "linf" or "l2".
        first: ``state.x`` is the start; the move has no momentum yet.
        window: iterates since the last checkpoint where this is one, 0 elsewhere.
        momentum: α of the paper, on the gradient step; 1 − α on the last move.
        rho: ρ of the paper, the share of rises below which the step size is halved.
        impl: "reference" (plain PyTorch), "cpu" (numba, float32 and float64) or "triton" (float32), both for images
            that lie in memory one after the other; "auto" takes the fastest that fits.

    Raises:
        ValueError: an unknown norm, shapes that do not fit, an ``impl`` that is unknown or does not take these tensors.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(get_args(Norm))}")
    if gradient.shape != images.shape or loss.shape != images.shape[:1]:
        raise ValueError(
            f"loss {list(loss.shape)} and gradient {list(gradient.shape)} do not fit images {list(images.shape)}: "
            "give one loss an image and the gradient of their sum"
        )
    step = _implementation(impl, state, loss, gradient, images)
    return step(state, loss, gradient, images, eps, norm, first, window, momentum, rho)


def _implementation(
    impl: Implementation, state: State, loss: Tensor, gradient: Tensor, images: Tensor
) -> Callable[..., State]:
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    x = state.x
    numbers = [t for t in (loss, gradient, images, *state) if t.dtype not in (torch.int32, torch.bool)]
    alike = all((t.dtype, t.device) == (x.dtype, x.device) for t in numbers) and lies_in_rows(x)
    on_gpu = x.device.type == "cuda"
    cpu = alike and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    triton = alike and x.dtype == torch.float32 and (on_gpu or impl == "triton")  # its interpreter takes CPU tensors
    if cpu and impl in ("auto", "cpu"):
        from fasttrain_kernels.apgd.cpu import apgd_step_cpu

        return apgd_step_cpu
    if triton and (impl == "triton" or (impl == "auto" and triton_passes("APGD step", _trial))):
        from fasttrain_kernels.apgd.triton import apgd_step_triton

        return apgd_step_triton
    if impl in ("cpu", "triton"):
        raise ValueError(
            f"impl={impl!r} does not take images of {x.dtype}, strides {list(x.stride())} on {x.device} with a loss of "
            f"{loss.dtype} and a gradient of {gradient.dtype}: use impl='auto'"
        )
    return apgd_step_reference


def _trial(impl: Implementation, device: str = "cuda") -> Iterator[Tensor]:
    """The iterates after two steps, the second at a checkpoint."""
    for norm, eps in (("linf", 0.1), ("l2", 1.0)):
        generator = torch.Generator(device).manual_seed(0)
        images, *gradients = torch.rand(3, 4, 3, 9, 9, device=device, generator=generator)
        state = initial_state(images, 2 * eps)
        for step, gradient in enumerate(gradients):
            loss = gradient.mean((1, 2, 3))
            state = apgd_step(state, loss, gradient - 0.5, images, eps, norm, first=not step, window=step, impl=impl)
        yield state.x


__all__ = ["Implementation", "Norm", "State", "apgd_step", "ascend", "initial_state", "project"]
