"""The log-sum-exp of cosine similarities over the other rows, as a function that autograd differentiates twice."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Precision = Literal["ieee", "tf32", "bf16"]


class Pairs(NamedTuple):
    """Which rows meet which columns: similarities scale · rowᵢ · columnⱼ for all j but ownᵢ."""

    rows: Tensor  # [R, d]
    columns: Tensor  # [C, d]; the rows where ``symmetric``
    own: Tensor | None  # [R] int64, the column that is the row itself; None: no row is among the columns
    scale: float
    precision: Precision  # of the factors of products on a GPU; sums are in float32 (float64 for float64 rows)
    symmetric: bool  # the columns are the rows, so a pair's similarity serves both


class Passes(Protocol):
    """An implementation: a module with the three passes over all pairs. Nothing of the size R × C outlives a tile."""

    @staticmethod
    def log_sum_exp(pairs: Pairs) -> Tensor:
        """L_i = log Σ_j exp(scale · rows_i · columns_j): [R]."""

    @staticmethod
    def gradient(pairs: Pairs, lse: Tensor, c: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None]:
        """Σ_i c_i ∂L_i by rows [R, d] and, if asked for, by columns [C, d]; where symmetric both in the first."""

    @staticmethod
    def second(
        pairs: Pairs, lse: Tensor, c: Tensor, on_rows: Tensor, on_columns: Tensor | None, with_columns: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The derivatives by c [R], rows and columns of the two gradients weighed with ``on_rows`` and ``on_columns``.

        ``on_columns`` is None where it is zero and where symmetric; the results are as those of ``gradient``.
        """


class Setting(NamedTuple):
    """What is not a tensor."""

    scale: float
    precision: Precision
    passes: Passes


def log_sum_exp(rows: Tensor, columns: Tensor | None, own: Tensor | None, setting: Setting) -> Tensor:
    """L [R] of rows [R, d] against columns [C, d] (None: the rows); autograd refuses its third derivative."""
    return _LogSumExp.apply(rows.contiguous(), columns if columns is None else columns.contiguous(), own, setting)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor | None, own: Tensor | None, setting: Setting) -> Tensor:
        lse = setting.passes.log_sum_exp(_pairs(rows, columns, own, setting))
        # a row without others: its p = exp(−∞ − 0) is 0
        ctx.save_for_backward(lse.masked_fill(lse.isneginf(), 0), rows, columns, own)
        ctx.setting = setting
        return lse

    @staticmethod
    def backward(ctx, c: Tensor):
        lse, rows, columns, own = ctx.saved_tensors
        with_columns = columns is not None and ctx.needs_input_grad[1]
        by_rows, by_columns = _Gradient.apply(c, rows, columns, lse, own, ctx.setting, with_columns)
        return by_rows, by_columns, None, None


class _Gradient(torch.autograd.Function):
    """By c, rows and columns; the log-sum-exp is a function of the last two, and counts as such, not as an input."""

    @staticmethod
    def forward(ctx, c, rows, columns, lse, own, setting, with_columns):
        ctx.set_materialize_grads(False)
        with torch.autocast(rows.device.type, enabled=False):
            by_rows, by_columns = setting.passes.gradient(
                _pairs(rows, columns, own, setting), lse, c.contiguous(), with_columns
            )
        ctx.save_for_backward(c, rows, columns, lse, own)
        ctx.setting = setting
        return by_rows, by_columns

    @staticmethod
    @once_differentiable
    def backward(ctx, on_rows: Tensor | None, on_columns: Tensor | None):
        c, rows, columns, lse, own = ctx.saved_tensors
        on_rows = torch.zeros_like(rows) if on_rows is None else on_rows.contiguous()
        on_columns = on_columns if on_columns is None else on_columns.contiguous()
        with_columns = columns is not None and ctx.needs_input_grad[2]
        with torch.autocast(rows.device.type, enabled=False):
            derivatives = ctx.setting.passes.second(
                _pairs(rows, columns, own, ctx.setting), lse, c.contiguous(), on_rows, on_columns, with_columns
            )
        return *derivatives, None, None, None, None


def _pairs(rows: Tensor, columns: Tensor | None, own: Tensor | None, setting: Setting) -> Pairs:
    others = rows if columns is None else columns
    return Pairs(rows, others, own, setting.scale, setting.precision, columns is None)
