"""The log-sum-exp of cosine similarities over the other rows, as a function that autograd differentiates twice."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Precision = Literal["fp32", "tf32", "bf16"]

LARGEST_BOUND = 32
"Of the scale κ, which no similarity exceeds: up to here e^(s − κ) and its inverse are far from float32's limits."


class Place(NamedTuple):
    """Where the rows [views, images] are among the columns [views, among], both view-major."""

    images: int
    among: int
    offset: int | None  # image i of the rows is image offset + i of the columns; None: no row is among them


class Setting(NamedTuple):
    """What is not a tensor."""

    scale: float
    place: Place
    passes: Passes
    attracts: bool = False  # (on a GPU) each result less the mean similarity to the row's image in the other views
    precision: Precision = "fp32"  # (on a GPU) of the factors of products; sums are in float32
    like: int = 0  # (on a GPU) sizes of blocks are those for this number of rows


class Factors(NamedTuple):
    """What stands for unit rows in a GPU's products: row_i ≈ length_i · x_i, equal where the x need no rounding."""

    x: Tensor | None = None  # [R, d]
    length: Tensor | None = None  # [R]; None: all 1


NO_FACTORS = Factors()
"On a CPU, where the rows themselves are multiplied."


class Pairs(NamedTuple):
    """Which rows meet which columns: similarities scale · rowᵢ · columnⱼ for all j but i itself."""

    rows: Tensor  # [R, d]
    columns: Tensor  # [C, d]; the rows where ``symmetric``
    symmetric: bool  # the columns are the rows, so a pair's similarity serves both
    setting: Setting
    row_factors: Factors
    column_factors: Factors

    @property
    def scale(self) -> float:
        return self.setting.scale


class Passes(Protocol):
    """An implementation: a module with the three passes over all pairs. Nothing of the size R × C outlives a tile."""

    @staticmethod
    def log_sum_exp(pairs: Pairs) -> tuple[Tensor, Tensor]:
        """L_i = log Σ_j exp(scale · rows_i · columns_j): [R]; and what the derivatives need of it, finite: ``sums``."""

    @staticmethod
    def gradient(pairs: Pairs, sums: Tensor, c: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None]:
        """Σ_i c_i ∂L_i by rows [R, d] and, if asked for, by columns [C, d]; where symmetric both in the first."""

    @staticmethod
    def second(
        pairs: Pairs, sums: Tensor, c: Tensor, on_rows: Tensor, on_columns: Tensor | None, with_columns: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The derivatives by c [R], rows and columns of the two gradients weighed with ``on_rows`` and ``on_columns``.

        ``on_columns`` is None where it is zero and where symmetric; the results are as those of ``gradient``.
        """


def log_sum_exp(
    rows: Tensor,
    columns: Tensor | None,
    setting: Setting,
    row_factors: Factors = NO_FACTORS,
    column_factors: Factors = NO_FACTORS,
) -> Tensor:
    """L [R] of rows [R, d] against columns [C, d] (None: the rows); autograd refuses its third derivative."""
    columns = columns if columns is None else columns.contiguous()
    return _LogSumExp.apply(rows.contiguous(), columns, setting, *row_factors, *column_factors)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor | None, setting: Setting, *factors: Tensor | None) -> Tensor:
        result, sums = setting.passes.log_sum_exp(_pairs(rows, columns, setting, factors))
        ctx.save_for_backward(sums, rows, columns, *factors)
        ctx.setting = setting
        return result

    @staticmethod
    def backward(ctx, c: Tensor):
        sums, rows, columns, *factors = ctx.saved_tensors
        with_columns = columns is not None and ctx.needs_input_grad[1]
        by_rows, by_columns = _Gradient.apply(c, rows, columns, sums, ctx.setting, with_columns, *factors)
        return by_rows, by_columns, *[None] * 5


class _Gradient(torch.autograd.Function):
    """By c, rows and columns; the log-sum-exp is a function of the last two, and counts as such, not as an input."""

    @staticmethod
    def forward(ctx, c, rows, columns, sums, setting, with_columns, *factors):
        ctx.set_materialize_grads(False)
        with torch.autocast(rows.device.type, enabled=False):
            by_rows, by_columns = setting.passes.gradient(
                _pairs(rows, columns, setting, factors), sums, c.contiguous(), with_columns
            )
        ctx.save_for_backward(c, rows, columns, sums, *factors)
        ctx.setting = setting
        return by_rows, by_columns

    @staticmethod
    @once_differentiable
    def backward(ctx, on_rows: Tensor | None, on_columns: Tensor | None):
        c, rows, columns, sums, *factors = ctx.saved_tensors
        on_rows = torch.zeros_like(rows) if on_rows is None else on_rows.contiguous()
        on_columns = on_columns if on_columns is None else on_columns.contiguous()
        with_columns = columns is not None and ctx.needs_input_grad[2]
        with torch.autocast(rows.device.type, enabled=False):
            derivatives = ctx.setting.passes.second(
                _pairs(rows, columns, ctx.setting, factors), sums, c.contiguous(), on_rows, on_columns, with_columns
            )
        return *derivatives, *[None] * 7


def _pairs(rows: Tensor, columns: Tensor | None, setting: Setting, factors: tuple[Tensor | None, ...]) -> Pairs:
    here = Factors(*factors[:2])
    if columns is None:
        return Pairs(rows, rows, True, setting, here, here)
    return Pairs(rows, columns, False, setting, here, Factors(*factors[2:]))
