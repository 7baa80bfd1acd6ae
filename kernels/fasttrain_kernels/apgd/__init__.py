"""One step of APGD's bookkeeping; the mathematics is in this folder's README."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from fasttrain_kernels.apgd.reference import Norm, State, apgd_step_reference, ascend, initial_state, project


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

    Raises:
        ValueError: an unknown norm, shapes that do not fit.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(get_args(Norm))}")
    if gradient.shape != images.shape or loss.shape != images.shape[:1]:
        raise ValueError(
            f"loss {list(loss.shape)} and gradient {list(gradient.shape)} do not fit images {list(images.shape)}: "
            "give one loss an image and the gradient of their sum"
        )
    return apgd_step_reference(state, loss, gradient, images, eps, norm, first, window, momentum, rho)


__all__ = ["Norm", "State", "apgd_step", "ascend", "initial_state", "project"]
