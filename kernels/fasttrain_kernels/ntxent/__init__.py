"""NT-Xent and SupCon, contrastive losses of cosines; the mathematics of every pass is in this folder's README."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttrain_kernels.ntxent.log_sum_exp import Precision, Setting, log_sum_exp
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
) -> Tensor:
    """Per-row NT-Xent losses [V, n] of V views of n images among V views of N (Chen et al. 2020, eq. 1).

    With s(a, b) = cos(a, b) / τ, P(i) the V − 1 other views of row i's image and j over all V·N − 1 other rows::

        ℓ(i) = −1/(V − 1) Σ_{p in P(i)} s(i, p) + log Σ_{j ≠ i} exp s(i, j)

    The self-similarity is excluded. SimCLR's loss is the mean of ℓ over all rows of the global batch. For V > 2 the
    mean over positives stands outside the logarithm (SupCon's L_out with the image as label). Differentiable twice, in
    z and in columns. Computed in float32 (float64 for float64 z), autocast or not; rows need not be normalised. On a
    GPU the factors of products are bfloat16 for bfloat16 z, TF32 for float16 z, and for float32 z TF32 where
    ``torch.backends.cuda.matmul.allow_tf32`` allows it.

    Args:
        z: this rank's rows [V, n, d], view-major. A row of zeros has similarity 0 to all and gets no gradient.
        temperature: τ > 0.
        columns: the rows of all ranks [V, N, d], this rank's among them; ``None``: z itself.
        offset: where this rank's n images start among the N.
        impl: "reference" (plain PyTorch, any order of derivative, a matrix of all similarities), "blocked" (CPU) or
            "triton" (GPU), which keep no such matrix in any pass; "auto" takes the fastest for z's device and size.

    Raises:
        ValueError: temperature not positive and finite, shapes that do not fit, an ``impl`` that is unknown or not for
            this device.
    """
    columns = z if columns is None else columns
    if z.dim() != 3 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"z has shape {list(z.shape)}: give [views, images, dimensions] with at least 2 views, 1 image"
        )
    _check(z, temperature, columns, offset)
    impl = _resolve(impl, z, columns)
    with torch.autocast(z.device.type, enabled=False):
        rows, others = _unit(z, columns, impl)
        own = others[:, offset : offset + z.shape[1]]
        # Σ over the other views of s(row, its positive) = row · (sum of own − itself)
        attraction = (rows * (own.sum(0) - own)).sum(-1) / (temperature * (len(z) - 1))
        return _log_sum_exp(rows, others, temperature, offset, impl, z.dtype) - attraction


def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    columns: Tensor | None = None,
    column_labels: Tensor | None = None,
    offset: int | None = 0,
    impl: Implementation = "auto",
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
    impl = _resolve(impl, z, columns)
    with torch.autocast(z.device.type, enabled=False):
        rows, others = _unit(z, columns, impl)
        positives, count = _positives(others, labels, column_labels)
        if offset is not None:
            positives = positives - others[:, offset : offset + z.shape[1]]
            count = count - 1
        attraction = (rows * positives).sum(-1) / (temperature * count.clamp(min=1).to(rows.dtype))
        return (_log_sum_exp(rows, others, temperature, offset, impl, z.dtype) - attraction).masked_fill(count == 0, 0)


def sup_con_against(
    labels: Tensor, temperature: float, columns: Tensor, column_labels: Tensor, impl: Implementation = "auto"
) -> Callable[[Tensor], Tensor]:
    """z [A, n, d] -> ``sup_con(z, labels, temperature, columns, column_labels, None)``, for many z.

    What depends on columns and labels alone, which are constants, is computed here, once. Each of ``labels`` is to be
    among ``column_labels``: NaN where it is not.
    """
    _check(columns, temperature, columns, None)
    impl = _resolve(impl, columns[:1, : len(labels)], columns)
    with torch.no_grad(), torch.autocast(columns.device.type, enabled=False):
        _, others = _unit(columns, columns, impl)
        positives, count = _positives(others, labels, column_labels)
        attraction = positives / (-temperature * count.to(others.dtype))[:, None]

    def losses(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            rows, _ = _unit(z, z, impl)
            return _log_sum_exp(rows, others, temperature, None, impl, z.dtype) + (rows * attraction).sum(-1)

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


def _unit(z: Tensor, columns: Tensor, impl: Implementation) -> tuple[Tensor, Tensor]:
    """Unit rows in at least float32; one tensor where z is columns: one normalisation and one graph."""
    normalised = unit_rows if impl == "reference" else unit
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = normalised(z.to(dtype))
    return rows, rows if columns is z else normalised(columns.to(dtype))


def _log_sum_exp(
    rows: Tensor, columns: Tensor, temperature: float, offset: int | None, impl: Implementation, dtype: torch.dtype
) -> Tensor:
    """log Σ_j exp s_ij [A, n] of rows [A, n, d] over columns [V, N, d], without the row itself if it is among them."""
    views, n, _ = rows.shape
    own = None
    if offset is not None:
        starts = torch.arange(views, device=rows.device)[:, None] * columns.shape[1] + offset
        own = (starts + torch.arange(n, device=rows.device)).flatten()
    others = None if columns is rows else columns.flatten(0, 1)
    rows = rows.flatten(0, 1)
    if impl == "reference":
        lse = log_sum_exp_reference(rows, rows if others is None else others, own, 1 / temperature)
    elif impl == "blocked":
        from fasttrain_kernels.ntxent import blocked

        lse = log_sum_exp(rows, others, own, Setting(1 / temperature, "ieee", blocked))
    else:
        from fasttrain_kernels.ntxent import triton

        lse = log_sum_exp(rows, others, own, Setting(1 / temperature, _precision(dtype), triton))
    return lse.view(views, n)


def _precision(dtype: torch.dtype) -> Precision:
    """What factors are rounded to on a GPU. TF32 has float16's digits, and a range that softmaxes do not leave."""
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _resolve(impl: Implementation, z: Tensor, columns: Tensor) -> Implementation:
    """What runs for ``impl``; Triton is imported for a GPU alone, or where its interpreter is asked for."""
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    if impl == "auto":
        if z.is_cuda:
            return "triton" if z.dtype != torch.float64 and triton_passes("NT-Xent", _trial) else "reference"
        pairs = z.shape[:2].numel() * columns.shape[:2].numel()
        return "blocked" if z.device.type == "cpu" and pairs >= FEWEST_BLOCKED_PAIRS else "reference"
    if impl == "blocked" and z.device.type != "cpu":
        raise ValueError(f"impl='blocked' runs on the CPU and z is on {z.device}: choose auto")
    if impl == "triton" and not (z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"impl='triton' runs on a GPU and z is on {z.device}: choose auto")
    if impl == "triton" and z.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32 and z is float64: choose reference")
    return impl


def _trial(impl: Implementation, device: str = "cuda") -> tuple[Tensor, ...]:
    """Losses, their gradient, and that of its squared norm."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(2, 40, 32, device=device, generator=generator).requires_grad_()
    losses = nt_xent(z, 0.2, impl=impl)
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
