"""InPCA: points in a plane, or a space, whose distances are those between probabilistic models.

Distances between models need not be those of points in any Euclidean space. InPCA (Quinn et al., PNAS 2019) lets some
axes be imaginary: along them distance squared is negative, and then the embedding is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.errors import UsageError

TIE = 1e-6
"How near, relatively, the magnitudes of two components are as good as equal."


class Embedding(NamedTuple):
    """Of M models; the axis that explains most comes first."""

    eigenvalues: Tensor  # [M] of both signs, by magnitude
    shares: Tensor  # [M] of Σ|eigenvalue|, each axis's
    imaginary: Tensor  # [M] bool: the eigenvalue is negative, and the axis lessens distances
    coordinates: Tensor  # [M, K] of each model along the first K axes


def inpca(distances: Tensor, axes: int | None = None) -> Embedding:
    """InPCA of a matrix of distances [M, M], as those of :func:`fasttrain.evaluation.progress.distances`, in float64.

    W = −½ L D L with L = 1 − 11ᵀ/M has eigenvalues λ_k and unit eigenvectors v_k, and a model's k-th coordinate is
    √|λ_k| v_k. Over all axes, Σ_k sign(λ_k) (x_ik − x_jk)² = D_ij: D takes the place of squared distances, and with
    squared Euclidean ones this is classical multidimensional scaling. (Scale is a convention: Quinn et al. take
    −8·log Σ√p√q for the squared distance, which makes all coordinates √8 as long.) An eigenvector's largest component
    is positive; of several, the first.

    Args:
        axes: K; None: all M.

    Raises:
        UsageError: a distance is not finite, below 0 or another one there and back, or not 0 from a model to itself.
    """
    d = distances.to(torch.float64)
    _check(d)
    centred = d - d.mean(0) - d.mean(1, keepdim=True) + d.mean()
    eigenvalues, vectors = torch.linalg.eigh(-(centred + centred.T) / 4)
    order = eigenvalues.abs().argsort(descending=True, stable=True)
    eigenvalues, vectors = eigenvalues[order], vectors[:, order[:axes]]
    sizes = eigenvalues.abs()
    coordinates = vectors * _signs(vectors) * sizes[:axes].sqrt()
    total = sizes.sum()
    return Embedding(eigenvalues, sizes / total if total > 0 else sizes, eigenvalues < 0, coordinates)


def _signs(vectors: Tensor) -> Tensor:
    """±1 [K] that make the largest component of each column positive."""
    sizes = vectors.abs()
    first = (sizes >= (1 - TIE) * sizes.amax(0)).double().argmax(0)
    return vectors.gather(0, first[None])[0].sign()


def _check(d: Tensor) -> None:
    if d.dim() != 2 or d.shape[0] != d.shape[1] or not len(d):
        raise UsageError(f"distances {list(d.shape)}: a square matrix was expected, [models, models]")
    wrong = (~d.isfinite()).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        raise UsageError(
            f"{len(wrong):,} of {d.numel():,} distances are not finite, the first between models {i} and {j}: they "
            "have no place in a picture; give probabilities a floor, or leave such models out"
        )
    slack = 1e-9 * float(d.abs().amax())
    if float((d - d.T).abs().amax()) > slack or float(d.diagonal().abs().amax()) > slack or float(d.amin()) < -slack:
        raise UsageError(
            "distances should be the same there and back, 0 from a model to itself and never below 0, and these are not"
        )


__all__ = ["Embedding", "inpca"]
