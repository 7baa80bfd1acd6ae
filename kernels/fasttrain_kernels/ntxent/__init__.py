"""NT-Xent, the contrastive loss of SimCLR; the mathematics of every pass is in this folder's README."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from fasttrain_kernels.ntxent.reference import nt_xent_reference

Implementation = Literal["auto", "reference"]


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
    z and in columns. Computed in float32 (float64 for float64 z), autocast or not; rows need not be normalised.

    Args:
        z: this rank's rows [V, n, d], view-major. A row of zeros has similarity 0 to all and gets no gradient.
        temperature: τ > 0.
        columns: the rows of all ranks [V, N, d], this rank's among them; ``None``: z itself.
        offset: where this rank's n images start among the N.
        impl: "auto" takes the fastest there is for z's device (today the plain reference on all), "reference" that.

    Raises:
        ValueError: temperature not positive and finite, shapes that do not fit, an unknown ``impl``.
    """
    columns = z if columns is None else columns
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be positive and finite; SimCLR uses 0.1 to 0.5")
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    if z.dim() != 3 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"z has shape {list(z.shape)}: give [views, images, dimensions] with at least 2 views, 1 image"
        )
    if columns.dim() != 3 or columns.shape[0] != z.shape[0] or columns.shape[2] != z.shape[2]:
        raise ValueError(
            f"columns have shape {list(columns.shape)}, z {list(z.shape)}: give the same views and dimensions"
        )
    if not 0 <= offset <= columns.shape[1] - z.shape[1]:
        raise ValueError(
            f"offset={offset}: {z.shape[1]} rows from there do not lie within the {columns.shape[1]} columns; "
            "give this rank's first position"
        )
    return nt_xent_reference(z, temperature, columns, offset)


__all__ = ["nt_xent"]
