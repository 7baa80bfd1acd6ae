"""The log-sum-exp of similarities in plain, differentiable PyTorch: what faster versions are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def log_sum_exp_reference(rows: Tensor, columns: Tensor, own: Tensor | None, scale: float) -> Tensor:
    """log Σ_j exp(scale · rows_i · columns_j) over all columns j but own_i: [R]; any order of derivative."""
    similarities = (rows * scale) @ columns.T
    if own is not None:
        # exp(−∞) = 0 takes the row itself out of the sum and of every derivative, and writing it outside the graph
        # spares a pass over the matrix in each of them
        with torch.no_grad():
            similarities[torch.arange(len(own), device=own.device), own] = -torch.inf
    return similarities.logsumexp(-1)


def unit_rows(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension, at any finite scale; a row of zeros stays zero and passes no gradient.

    Dividing by the largest magnitude first keeps the squares from overflowing or vanishing. The direction does not
    depend on that factor, so it is a constant to every derivative.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    x = x / largest.masked_fill(is_zero, torch.inf)
    return x * (x.square().sum(-1, keepdim=True) + is_zero).rsqrt()
