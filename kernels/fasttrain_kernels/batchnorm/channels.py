"""The numbers a channel between BatchNorm's passes, and their sums over ranks, in PyTorch's operations.

Each function takes what a pass has summed and gives what the next one computes by; the README derives them.
``triton_channels`` does the same in one kernel each, two around a sum over ranks. Shapes are [C], or [k, C] of k rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"Sum over the ranks."


class Running(NamedTuple):
    """The running statistics of a layer, updated in place by each batch that passes."""

    mean: Tensor
    variance: Tensor
    batches: Tensor
    "How many have passed: int64, without dimensions."
    momentum: float | None
    "The weight of a batch; ``None``: the mean over all batches, as torch has it."

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Let the next batch, with this mean and unbiased variance, pass; waits for no GPU."""
        self.batches.add_(1)
        for running, found in ((self.mean, mean), (self.variance, variance)):
            weight = self.batches.double().reciprocal().to(running.dtype) if self.momentum is None else self.momentum
            running.lerp_(found.to(running.dtype), weight)


class Statistics(NamedTuple):
    by: Tensor
    "(μ, w r, b), by which y is computed."
    gate: Tensor
    "(μ, a, b), by which the gradient's gate is found: ``by`` itself, or one that is always open."
    inv_std: Tensor
    "r."
    unbiased: Tensor
    count: int | Tensor
    "Values a channel, of all ranks."


class Gradient(NamedTuple):
    by: Tensor
    "(μ, a, b, c₁, c₂, c₃), by which ∂x is computed."
    sums: Tensor
    "Σ h and Σ h x̂ of this rank: ∂b and ∂w."
    means: Tensor
    "⟨w h⟩ and ⟨w h x̂⟩."


def statistics(
    moments: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gates: bool,
    eps: float,
    running: Running | None,
    total: Total | None,
) -> Statistics:
    """From μ and Σ (x − μ)² of this rank; ``gates``: whether y is 0 where w r (x − μ) + b is not above."""
    mean, squares = moments
    count = x.numel() // x.shape[1]
    if total is not None:
        mean, squares, count = _over_ranks(mean, squares, count, total)
    inv_std = (squares / count + eps).rsqrt()
    unbiased = squares / (count - 1 if total is None else (count - 1).clamp(min=1))
    zero = torch.zeros_like(mean) if bias is None or not gates else None
    scale, shift = _times(inv_std, weight), zero if bias is None else bias.to(mean.dtype)
    by = torch.stack([mean, scale, shift])
    if running is not None:
        running.update(mean, unbiased)
    return Statistics(by, by if gates else torch.stack([mean, zero, zero + 1]), inv_std, unbiased, count)


def gradient(
    sums: Tensor, weight: Tensor | None, gate: Tensor, inv_std: Tensor, count: int | Tensor, total: Total | None
) -> Gradient:
    """From Σ h and Σ h (x − μ) of this rank, which is overwritten."""
    r = inv_std
    sums[1] *= r
    means = _mean(_times(sums, weight), count, total)
    mean_h, mean_hx = means
    by = torch.stack([*gate, _times(r, weight), -r.square() * mean_hx, -r * mean_h])
    return Gradient(by, sums, means)


def second(
    sums: tuple[Tensor, Tensor, Tensor],
    v: Tensor | None,
    t: Tensor | None,
    weight: Tensor | None,
    gate: Tensor,
    inv_std: Tensor,
    of_gradient: tuple[Tensor, Tensor],
    count: int | Tensor,
    total: Total | None,
) -> tuple[Tensor, Tensor]:
    """(μ, a, b, c₁, …, c₇), by which both gradients are computed, and w's gradient.

    From Σ u, Σ u (x − μ), Σ u h of this rank, the gradients v and t on ∂w and ∂b, and the sums and means of
    :class:`Gradient`.
    """
    r = inv_std
    w = torch.ones_like(r) if weight is None else weight.to(r.dtype)
    v = torch.zeros_like(r) if v is None else v
    t = torch.zeros_like(r) if t is None else t
    (sum_h, sum_hx), (mean_h, mean_hx) = of_gradient
    sum_u, sum_ux, sum_uh = sums
    terms = torch.stack([sum_u, r * sum_ux, w * sum_uh, v * sum_h, v * sum_hx])
    mean_u, mean_ux, mean_uh, mean_vh, mean_vhx = _mean(terms, count, total)
    u_ph = mean_uh - mean_u * mean_h - mean_ux * mean_hx
    mean_e = mean_vh - r * (mean_hx * mean_u + mean_ux * mean_h)
    mean_ex = mean_vhx - 2 * r * mean_hx * mean_ux
    on_g = [w * r, r * (v - w * r * mean_ux), t - w * r * mean_u]
    on_x = [
        -r.square() * mean_hx,
        r * v - r.square() * mean_ux * w,
        -r.square() * (mean_ex + r * u_ph),
        -r * mean_e,
    ]
    return torch.stack([*gate, *on_g, *on_x]), r * (sum_uh - mean_u * sum_h - mean_ux * sum_hx)


def _over_ranks(mean: Tensor, squares: Tensor, count: int, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Joined μ, Σ (x − μ)² and number of values a channel, from one sum in float64, where Σ x² − n μ² loses nothing."""
    wide = mean.double()
    sums = total(torch.stack([wide * count, squares.double() + wide.square() * count, torch.full_like(wide, count)]))
    count = sums[2, 0]
    joined = sums[0] / count
    squares = (sums[1] - sums[0] * joined).clamp(min=0)
    return joined.to(mean.dtype), squares.to(mean.dtype), count


def _mean(sums: Tensor, count: int | Tensor, total: Total | None) -> Tensor:
    return (sums if total is None else total(sums)) / count


def _times(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight.to(values.dtype)
