"""A batch of images as rows of numbers, for kernels that treat each image on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain_kernels.apgd.reference import State


def unwritten(state: State) -> State:
    """Memory for the state after ``state``, its images where ``state.x`` has them."""
    return State(*(torch.empty_like(state.x if t.dim() > 1 else t) for t in state))


def as_rows(*tensors: Tensor, like: Tensor) -> list[Tensor]:
    """Each [B, ...] as [B, values] in the order in which ``like`` lies in memory, a copy where it lies otherwise."""
    order = _order(like)
    return [t.detach().permute(order[: t.dim()]).reshape(len(t), *[-1] * (t.dim() > 1)).contiguous() for t in tensors]


def lies_in_rows(x: Tensor) -> bool:
    """Whether each image of x [B, ...] is one stretch of memory, one after the other."""
    return x.dim() > 1 and x.numel() > 0 and x.permute(_order(x)).is_contiguous()


def _order(x: Tensor) -> list[int]:
    return [0, *sorted(range(1, x.dim()), key=x.stride, reverse=True)]


__all__ = ["as_rows", "lies_in_rows", "unwritten"]
