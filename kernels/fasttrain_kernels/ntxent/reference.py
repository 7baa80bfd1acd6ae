"""NT-Xent in plain, differentiable PyTorch: the CPU path, and the truth that faster versions are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def nt_xent_reference(z: Tensor, temperature: float, columns: Tensor, offset: int) -> Tensor:
    """Per-row losses [V, n] of rows z [V, n, d] against columns [V, N, d]; any order of derivative."""
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        views, n, _ = z.shape
        rows = unit_rows(z.to(dtype))
        # the same tensor where rows and columns coincide: one normalisation, one graph
        others = rows if columns is z else unit_rows(columns.to(dtype))

        own = others[:, offset : offset + n]
        # Σ over the other views of s(row, its positive) = row · (sum of own − itself)
        positives = (rows * (own.sum(0) - own)).sum(-1) / (temperature * (views - 1))

        logits = (rows / temperature).flatten(0, 1) @ others.flatten(0, 1).T  # [V n, V N]
        # a row is never among its own negatives: exp(−∞) = 0 takes it out of the sum and of every derivative, and
        # writing it outside the graph spares a pass over the matrix in each of them
        with torch.no_grad():
            logits.view(views, n, views, -1)[:, :, :, offset:].diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).fill_(
                -torch.inf
            )
        return logits.logsumexp(-1).view(views, n) - positives


def unit_rows(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension, at any finite scale; a row of zeros stays zero and passes no gradient.

    Dividing by the largest magnitude first keeps the squares from overflowing or vanishing. The direction does not
    depend on that factor, so it is a constant to every derivative.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    x = x / largest.masked_fill(is_zero, torch.inf)
    return x * (x.square().sum(-1, keepdim=True) + is_zero).rsqrt()
