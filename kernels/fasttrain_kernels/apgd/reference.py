"""One step of APGD in plain PyTorch: the CPU path, and the truth that faster versions are held against."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


class State(NamedTuple):
    """Where APGD stands with B images, each on its own."""

    x: Tensor  # [B, ...] iterate to be evaluated next
    previous: Tensor  # [B, ...] the one before it
    best: Tensor  # [B, ...] of the iterates evaluated so far, the one of the highest loss
    best_gradient: Tensor  # [B, ...] the gradient there
    best_loss: Tensor  # [B]
    last_loss: Tensor  # [B] loss of the iterate evaluated last
    checked_loss: Tensor  # [B] best_loss at the last checkpoint
    step_size: Tensor  # [B]
    rises: Tensor  # [B] int32: since the last checkpoint, iterates whose loss rose above the one before
    halved: Tensor  # [B] bool: the last checkpoint halved step_size


def initial_state(start: Tensor, step_size: float) -> State:
    """The state before anything has been evaluated."""
    per_image = start.new_zeros(len(start), dtype=torch.promote_types(start.dtype, torch.float32))
    return State(
        x=start,
        previous=start,
        best=start,
        best_gradient=torch.zeros_like(start),
        best_loss=per_image - torch.inf,
        last_loss=per_image,
        checked_loss=per_image,
        step_size=per_image + step_size,
        rises=torch.zeros_like(per_image, dtype=torch.int32),
        halved=torch.ones_like(per_image, dtype=torch.bool),
    )


def apgd_step_reference(
    state: State,
    loss: Tensor,
    gradient: Tensor,
    images: Tensor,
    eps: float,
    norm: Norm,
    first: bool,
    window: int,
    momentum: float,
    rho: float,
) -> State:
    """Take in the evaluation of ``state.x`` and move on; see :func:`fasttrain_kernels.apgd.apgd_step`."""
    improved = loss > state.best_loss
    best = torch.where(_spread(improved, images), state.x, state.best)
    best_gradient = torch.where(_spread(improved, images), gradient, state.best_gradient)
    best_loss = torch.where(improved, loss, state.best_loss)
    rises = state.rises if first else state.rises + (loss > state.last_loss)
    # the published code compares the loss after the first step with 0, not with the loss at the start
    last_loss = state.last_loss if first else loss

    x, step_size, checked_loss, halved = state.x, state.step_size, state.checked_loss, state.halved
    if window:
        stuck = ~halved & (checked_loss >= best_loss)
        halved = (rises <= rho * window) | stuck
        step_size = torch.where(halved, step_size / 2, step_size)
        x = torch.where(_spread(halved, images), best, x)
        gradient = torch.where(_spread(halved, images), best_gradient, gradient)
        checked_loss, rises = best_loss, torch.zeros_like(rises)

    following = project(ascend(x, gradient, _spread(step_size, images), norm), images, eps, norm)
    if not first:
        following = x + momentum * (following - x) + (1 - momentum) * (x - state.previous)
        following = project(following, images, eps, norm)
    return State(following, x, best, best_gradient, best_loss, last_loss, checked_loss, step_size, rises, halved)


def ascend(x: Tensor, gradient: Tensor, size: Tensor | float, norm: Norm) -> Tensor:
    """x moved by ``size`` along the direction of unit norm that raises the loss most; a zero gradient moves nothing."""
    if norm == "linf":
        return x + size * gradient.sign()
    return x + size * gradient / (_length(gradient) + 1e-12)


def project(x: Tensor, centre: Tensor, eps: float, norm: Norm) -> Tensor:
    """x brought into the ball of radius eps around ``centre``, then into [0, 1] (which keeps it in the ball)."""
    if norm == "linf":
        return x.clamp(centre - eps, centre + eps).clamp(0, 1)
    change = x - centre
    length = _length(change)
    return (centre + change * (length.clamp(max=eps) / (length + 1e-12))).clamp(0, 1)


def _length(x: Tensor) -> Tensor:
    """L2 norm of each image, [B, 1, ...]; by dimensions, because flattening would copy a channels-last tensor."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _spread(per_image: Tensor, images: Tensor) -> Tensor:
    return per_image.reshape(-1, *[1] * (images.dim() - 1)).to(
        per_image.dtype if per_image.dtype == torch.bool else images.dtype
    )
