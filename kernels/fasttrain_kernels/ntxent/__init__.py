"""NT-Xent and SupCon, contrastive losses of cosines; the mathematics of every pass is in this folder's README."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fasttrain_kernels.ntxent.blocks import block_of_rows
from fasttrain_kernels.ntxent.log_sum_exp import (
    LARGEST_BOUND,
    NO_FACTORS,
    Factors,
    Place,
    Precision,
    Setting,
    log_sum_exp,
)
from fasttrain_kernels.ntxent.reference import log_sum_exp_reference, unit_rows
from fasttrain_kernels.ntxent.unit import unit
from fasttrain_kernels.trial import triton_passes

Implementation = Literal["auto", "reference", "blocked", "triton"]
FEWEST_BLOCKED_PAIRS = 2**18  # below, the whole matrix of similarities is in cache and the reference has less to set up


def nt_xent(
    z: Tensor,
    temperature: float,
    columns: Tensor | None = None,
    offset: int = 0,
    impl: Implementation = "auto",
    precision: torch.dtype | None = None,
) -> Tensor:
    """Per-row NT-Xent losses [V, n] of V views of n images among V views of N (Chen et al. 2020, eq. 1).

    With s(a, b) = cos(a, b) / τ, P(i) the V − 1 other views of row i's image and j over all V·N − 1 other rows::

        ℓ(i) = −1/(V − 1) Σ_{p in P(i)} s(i, p) + log Σ_{j ≠ i} exp s(i, j)

    The self-similarity is excluded. SimCLR's loss is the mean of ℓ over all rows of the global batch. For V > 2 the
    mean over positives stands outside the logarithm (SupCon's L_out with the image as label). Differentiable twice, in
    z and in columns. Computed in float32 (float64 for float64 z), autocast or not; rows need not be normalised. On a
    GPU the tensor cores multiply what ``precision`` says.

    Args:
        z: this rank's rows [V, n, d], view-major. A row of zeros has similarity 0 to all and gets no gradient.
        temperature: τ > 0.
        columns: the rows of all ranks [V, N, d], this rank's among them; ``None``: z itself.
        offset: where this rank's n images start among the N.
        impl: "reference" (plain PyTorch, any order of derivative, a matrix of all similarities), "blocked" (CPU) or
            "triton" (GPU), which keep no such matrix in any pass; "auto" takes the fastest for z's device and size.
        precision: the dtype that z was computed in, where it was cast since; ``None``: z's own. On a GPU the factors of
            products are bfloat16 for bfloat16, TF32 for float16, and for float32 as exact as float32, or TF32 where
            ``torch.backends.cuda.matmul.allow_tf32`` allows it. The first two hold such z without a rounding.

    Raises:
        ValueError: temperature not positive and finite, shapes that do not fit, an ``impl`` that is unknown or not for
            this device, a ``precision`` that is no floating-point dtype.
    """
    columns = z if columns is None else columns
    if z.dim() != 3 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"z has shape {list(z.shape)}: give [views, images, dimensions] with at least 2 views, 1 image"
        )
    _check(z, temperature, columns, offset)
    how = _how(impl, z, columns, temperature, precision)
    return _nt_xent(z, temperature, columns, offset, how)


def _nt_xent(z: Tensor, temperature: float, columns: Tensor, offset: int, how: _How) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        rows, others = _unit(z, columns, how)
        if how.impl == "triton":  # where the attraction, too, is the kernel's
            return _log_sum_exp(rows, others, temperature, offset, how, attracts=True)
        own = others.u[:, offset : offset + z.shape[1]]
        # Σ over the other views of s(row, its positive) = row · (sum of own − itself)
        attraction = (rows.u * (own.sum(0) - own)).sum(-1) / (temperature * (len(z) - 1))
        return _log_sum_exp(rows, others, temperature, offset, how) - attraction


def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    columns: Tensor | None = None,
    column_labels: Tensor | None = None,
    offset: int | None = 0,
    impl: Implementation = "auto",
    precision: torch.dtype | None = None,
) -> Tensor:
    """Per-row SupCon losses L_out [A, n] of A views of n images among V views of N (Khosla et al. 2020, eq. 2).

    With P(i) the rows other than i that have i's label, and all else as in :func:`nt_xent`::

        ℓ(i) = −1/|P(i)| Σ_{p in P(i)} s(i, p) + log Σ_{j ≠ i} exp s(i, j)        (0 where P(i) is empty)

    Args:
        z: anchors [A, n, d], with labels [n] of any integers.
        columns: [V, N, d] with column_labels [N]; ``None``: z itself with its labels.
        offset: the anchors are the columns' images ``offset`` … ``offset + n``, and none is its own positive or
            negative (A = V); ``None``: the anchors are not among the columns.

    Raises:
        ValueError: as :func:`nt_xent`.
    """
    columns = z if columns is None else columns
    column_labels = labels if column_labels is None else column_labels
    _check(z, temperature, columns, offset)
    if labels.shape != z.shape[1:2] or column_labels.shape != columns.shape[1:2]:
        raise ValueError(
            f"labels {list(labels.shape)} and {list(column_labels.shape)} do not fit z {list(z.shape)} and columns "
            f"{list(columns.shape)}: give one label an image"
        )
    how = _how(impl, z, columns, temperature, precision)
    with torch.autocast(z.device.type, enabled=False):
        rows, others = _unit(z, columns, how)
        positives, count = _positives(others.u, labels, column_labels)
        if offset is not None:
            positives = positives - others.u[:, offset : offset + z.shape[1]]
            count = count - 1
        attraction = (rows.u * positives).sum(-1) / (temperature * count.clamp(min=1).to(rows.u.dtype))
        return (_log_sum_exp(rows, others, temperature, offset, how) - attraction).masked_fill(count == 0, 0)


def sup_con_against(
    labels: Tensor,
    temperature: float,
    columns: Tensor,
    column_labels: Tensor,
    impl: Implementation = "auto",
    precision: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    """z [A, n, d] -> ``sup_con(z, labels, temperature, columns, column_labels, None)``, for many z.

    What depends on columns and labels alone, which are constants, is computed here, once. Each of ``labels`` is to be
    among ``column_labels``: NaN where it is not.
    """
    _check(columns, temperature, columns, None)
    how = _how(impl, columns[:1, : len(labels)], columns, temperature, precision)
    with torch.no_grad(), torch.autocast(columns.device.type, enabled=False):
        _, others = _unit(columns, columns, how)
        positives, count = _positives(others.u, labels, column_labels)
        attraction = positives / (-temperature * count.to(others.u.dtype))[:, None]

    def losses(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            rows, _ = _unit(z, z, how)
            return _log_sum_exp(rows, others, temperature, None, how) + (rows.u * attraction).sum(-1)

    return losses


def _positives(others: Tensor, labels: Tensor, column_labels: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of ``labels`` [n] the sum [n, d] of the unit columns [V, N, d] of the same label, and their number."""
    # A class is known by where it starts among the sorted labels, which needs no table of the labels there are.
    ordered = column_labels.sort().values
    of_columns = torch.searchsorted(ordered, column_labels)
    of_rows = torch.searchsorted(ordered, labels)
    size = torch.searchsorted(ordered, labels, right=True) - of_rows  # [n] 0 for a label that no column has
    of_rows = of_rows.clamp(max=len(ordered) - 1)
    sums = torch.zeros_like(others[0]).index_add(0, of_columns, others.sum(0))
    return sums[of_rows] * (size > 0)[:, None], size * len(others)


class _How(NamedTuple):
    impl: Implementation
    precision: Precision  # of factors on a GPU
    like: int  # sizes of blocks on a GPU are those for this number of rows


IN_FLOAT32 = _How("auto", "fp32", 0)


class _Rows(NamedTuple):
    u: Tensor  # [V, n, d] unit rows, in at least float32
    factors: Factors


def _unit(z: Tensor, columns: Tensor, how: _How) -> tuple[_Rows, _Rows]:
    """One object where z is columns: one normalisation and one graph."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = _normalised(z.to(dtype), how)
    return rows, rows if columns is z else _normalised(columns.to(dtype), how)


def _normalised(z: Tensor, how: _How) -> _Rows:
    if how.impl != "triton":
        return _Rows((unit_rows if how.impl == "reference" else unit)(z), NO_FACTORS)
    from fasttrain_kernels.ntxent import unit_triton

    return _Rows(*unit_triton.unit(z, how.precision))


def _log_sum_exp(
    rows: _Rows, columns: _Rows, temperature: float, offset: int | None, how: _How, attracts: bool = False
) -> Tensor:
    """log Σ_j exp s_ij [A, n] of rows [A, n, d] over columns [V, N, d], without the row itself if it is among them."""
    views, n, _ = rows.u.shape
    place = Place(n, columns.u.shape[1], offset)
    one, others = columns is rows, columns.u.flatten(0, 1)
    here = rows.u.flatten(0, 1)
    if how.impl == "reference":
        lse = log_sum_exp_reference(here, here if one else others, _own(views, place, here.device), 1 / temperature)
        return lse.view(views, n)
    if how.impl == "blocked":
        from fasttrain_kernels.ntxent import blocked as passes
    else:
        from fasttrain_kernels.ntxent import triton as passes
    setting = Setting(1 / temperature, place, passes, attracts, how.precision, how.like)
    lse = log_sum_exp(here, None if one else others, setting, _flat(rows.factors), _flat(columns.factors))
    return lse.view(views, n)


def _own(views: int, place: Place, device: torch.device) -> Tensor | None:
    """The column [A n] that each row is."""
    if place.offset is None:
        return None
    starts = torch.arange(views, device=device)[:, None] * place.among + place.offset
    return (starts + torch.arange(place.images, device=device)).flatten()


def _flat(factors: Factors) -> Factors:
    """[A, n, …] -> [A n, …]."""
    return Factors(*(x if x is None else x.flatten(0, 1) for x in factors))


def _how(impl: Implementation, z: Tensor, columns: Tensor, temperature: float, precision: torch.dtype | None) -> _How:
    if precision is not None and not precision.is_floating_point:
        raise ValueError(f"precision={precision}: give a floating-point dtype, the one that z was computed in")
    how = _How(impl, _precision(precision or z.dtype), z.shape[:2].numel())
    return how._replace(impl=_resolve(how, z, columns, temperature))


def _precision(dtype: torch.dtype) -> Precision:
    """What factors are rounded to on a GPU. TF32 has float16's digits, and a range that softmaxes do not leave."""
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 or torch.backends.cuda.matmul.allow_tf32 else "fp32"


def _resolve(how: _How, z: Tensor, columns: Tensor, temperature: float) -> Implementation:
    """What runs for ``impl``; Triton is imported for a GPU alone, or where its interpreter is asked for."""
    impl = how.impl
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    if impl == "auto":
        if z.is_cuda:
            return "triton" if z.dtype != torch.float64 and _passes(how, temperature) else "reference"
        pairs = z.shape[:2].numel() * columns.shape[:2].numel()
        return "blocked" if z.device.type == "cpu" and pairs >= FEWEST_BLOCKED_PAIRS else "reference"
    if impl == "blocked" and z.device.type != "cpu":
        raise ValueError(f"impl='blocked' runs on the CPU and z is on {z.device}: choose auto")
    if impl == "triton" and not (z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"impl='triton' runs on a GPU and z is on {z.device}: choose auto")
    if impl == "triton" and z.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32 and z is float64: choose reference")
    return impl


def _passes(how: _How, temperature: float) -> bool:
    """Whether the kernels that ``how`` asks for pass their trial: each precision, size of blocks and kind of bound."""
    low = 1 / temperature > LARGEST_BOUND
    name = f"NT-Xent ({how.precision}, blocks of {block_of_rows(how.like, how.precision)}{', low temperature' * low})"
    return triton_passes(name, partial(_trial, how=how, temperature=0.02 if low else 0.2))


def _trial(
    impl: Implementation, device: str = "cuda", how: _How = IN_FLOAT32, temperature: float = 0.2
) -> tuple[Tensor, ...]:
    """Losses, their gradient, and that of its squared norm, of rows that every precision holds."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(2, 40, 128, device=device, generator=generator).bfloat16().float().requires_grad_()
    losses = _nt_xent(z, temperature, z, 0, how._replace(impl=impl))
    (first,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    return losses, first, *torch.autograd.grad(first.square().sum(), z)


def _check(z: Tensor, temperature: float, columns: Tensor, offset: int | None) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be positive and finite; SimCLR uses 0.1 to 0.5")
    if columns.dim() != 3 or columns.shape[2] != z.shape[2] or (offset is not None and len(columns) != len(z)):
        raise ValueError(
            f"columns have shape {list(columns.shape)}, z {list(z.shape)}: give the same views and dimensions"
        )
    if offset is not None and not 0 <= offset <= columns.shape[1] - z.shape[1]:
        raise ValueError(
            f"offset={offset}: {z.shape[1]} rows from there do not lie within the {columns.shape[1]} columns; "
            "give this rank's first position"
        )


__all__ = ["nt_xent", "sup_con", "sup_con_against"]
