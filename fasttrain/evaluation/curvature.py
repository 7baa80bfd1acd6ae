"""How curved a network's loss is in its weights: Hessian-vector products, the trace, the top eigenvalue.

Nothing here holds a Hessian: P weights have P² of its entries. What is told of it comes from products H v, each two
backward passes over the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fasttrain.config import Config, Where
from fasttrain.stop import heed, heeded

Batches = Sequence[tuple[Tensor, Tensor]]
"(inputs [B, ...], labels [B] int64), the same batches for each who asks."
Product = Callable[[Tensor], Tensor]
"v [P] -> H v [P], of a symmetric H."


class HessianConfig(Config):
    """How the curvature at the weights is measured, of the mean cross-entropy by all weights, biases included."""

    probes: int = Field(32, ge=0)
    "random vectors for the trace; 0: no trace"
    iterations: int = Field(30, ge=0)
    "Lanczos iterations at most, for the top eigenvalue; 0: no eigenvalue"
    tolerance: float = Field(1e-3, gt=0)
    "the iterations end when the eigenvalue's residual is this share of it"
    images: int | None = Field(256, ge=1)
    "images, evenly spaced over the landscape's; null: all of those"
    batch: int = Field(32, ge=1)
    "images that are differentiated twice at a time: memory goes by it"

    reads: ClassVar[dict[str, Where]] = {
        "tolerance": Where("iterations"),
        **{name: Where("measures", why="probes=0 and iterations=0") for name in ("images", "batch")},
    }

    @property
    def measures(self) -> bool:
        """Whether anything is measured."""
        return bool(self.probes or self.iterations)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name, without their history: what directions and Hessians are about."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def summed_loss(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log softmax(logits)_label in float64, and the logits [B, C], of ``network`` with other ``weights``."""
    logits = functional_call(network, dict(weights), (x,))
    return F.cross_entropy(logits.double(), labels, reduction="sum"), logits


def hessian_product(network: nn.Module, batches: Batches, vector: Tensor) -> Tensor:
    """H v [P], with H the Hessian of the mean cross-entropy over ``batches`` by all P weights, in the vector's dtype.

    H v = ∇ (vᵀ ∇ loss), a backward pass through a backward pass, summed over batches in float64. The weights are those
    of ``network.named_parameters()``, in that order, each flattened; the network's mode is left as it is: in evaluation
    mode BatchNorm's statistics are constants. ReLU and max-pooling have second derivative 0, as everywhere in autograd.

    Args:
        vector: [P], converted to each weight's own dtype.
    """
    weights = {name: weight.requires_grad_() for name, weight in weights_of(network).items()}
    tensors = list(weights.values())
    parts = split_like(vector, tensors)
    total, count = torch.zeros(vector.shape, dtype=torch.float64, device=vector.device), 0
    with torch.enable_grad():
        for x, labels in heeded(batches):
            loss, _ = summed_loss(network, weights, x, labels)
            gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
            along = sum((g * v).sum() for g, v in zip(gradients, parts, strict=True))
            products = torch.autograd.grad(along, tensors, materialize_grads=True)
            total += torch.cat([product.detach().flatten() for product in products])
            count += len(labels)
    return (total / count).to(vector.dtype)


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A vector [P] in parts of the tensors' shapes and dtypes."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def signs(size: int, seed: int, number: int) -> Tensor:
    """Independent ±1 of equal probability, float64 [size]: the ``number``-th Rademacher vector of ``seed``, on the CPU,
    the same on any machine."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    return torch.from_numpy(generator.integers(0, 2, size, dtype=np.int8)).double().mul_(2).sub_(1)


class Estimate(NamedTuple):
    """A mean over random probes; the standard error of it is NaN of a single one."""

    mean: float
    standard_error: float
    probes: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), error, len(x))


def hutchinson(product: Product, size: int, probes: int, seed: int = 0, scales: Tensor | None = None) -> Estimate:
    """The trace of H by Hutchinson's estimator: the mean of vᵀ H v over ±1 vectors v.

    Its variance is 2 Σ_{i≠j} H_ij² a probe: none where H is diagonal.

    Args:
        size: P.
        scales: s [P]; v_i is then ±s_i, and the mean Σ s_i² H_ii.
    """
    vectors = (signs(size, seed, number) for number in range(probes))
    return estimate([quadratic_form(product, v if scales is None else v * scales) for v in vectors])


def quadratic_form(product: Product, vector: Tensor) -> float:
    """vᵀ H v, summed in float64."""
    return _dot(vector, product(vector))


class Eigenvalue(NamedTuple):
    """The largest eigenvalue that was found. Some eigenvalue lies within ``residual`` of ``value``."""

    value: float
    residual: float  # ‖H u − value · u‖ of the unit vector u that belongs to it
    iterations: int  # products
    converged: bool  # residual ≤ tolerance · |value|


def top_eigenvalue(product: Product, start: Tensor, iterations: int, tolerance: float = 1e-3) -> Eigenvalue:
    """The largest (not the largest in magnitude) eigenvalue of H by the Lanczos process from ``start`` [P].

    Each new vector is made orthogonal to all before it, twice, so that no eigenvalue appears again by rounding; that
    holds ``iterations`` vectors. The residual is β_k |s_k|, s the last component of the tridiagonal matrix's
    eigenvector (Parlett, "The Symmetric Eigenvalue Problem", 1998, section 13.2). NaN where a product is not finite.
    """
    basis, diagonal, beside = [start / start.norm()], [], []
    for count in range(1, iterations + 1):
        heed()
        w = product(basis[-1])
        diagonal.append(_dot(basis[-1], w))
        if not math.isfinite(diagonal[-1]):
            return Eigenvalue(math.nan, math.nan, count, False)
        for _ in range(2):
            for q in basis:
                w = w - _dot(q, w) * q
        beta = math.sqrt(_dot(w, w))
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        exhausted = count == len(start) or beta <= torch.finfo(w.dtype).eps * float(values.abs().max())
        found = Eigenvalue(value, residual, count, exhausted or residual <= tolerance * abs(value))
        if found.converged:
            break
        beside.append(beta)
        basis.append(w / beta)
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)


__all__ = [
    "Batches",
    "Eigenvalue",
    "Estimate",
    "HessianConfig",
    "estimate",
    "hessian_product",
    "hutchinson",
    "quadratic_form",
    "signs",
    "split_like",
    "summed_loss",
    "top_eigenvalue",
    "weights_of",
]
