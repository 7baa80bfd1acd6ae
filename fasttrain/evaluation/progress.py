"""Distances between what models say of the same images, and how far each has come from ignorance to the truth.

A model is the distributions p_n over C classes that it gives N images (Cowlagi, Liu & Neervannan, eq. 4); their square
roots are unit vectors, so a model is a point on a product of N spheres. Whatever type goes in, all is computed in
float64, and given back so. Each image's distribution is divided by its sum; zeros are zeros, unless a ``floor`` is
given for those that rounding made (:func:`floor_of`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fasttrain.errors import UsageError
from fasttrain.evaluation.trajectories import TOLERANCE, check_probabilities
from fasttrain.stop import heed

MEMORY = 1 << 28
"Bytes that blocks may take unless told otherwise; smaller ones are faster on a CPU, whose caches they fit."
TILE = 128
"Models whose distances to as many others are computed at a time: what is read from disk is read M / TILE times."
CLOSE = 2 * torch.finfo(torch.float64).eps
"A Newton step shorter than this is rounding."
STEPS = 200


def uniform(images: int, classes: int) -> Tensor:
    """P_0, which knows nothing: [N, C] of 1 / C, in the memory of one number."""
    return torch.full((1, 1), 1 / classes, dtype=torch.float64).expand(images, classes)


def truth(labels: Tensor, classes: int) -> Tensor:
    """P*, which is certain of the labels [N]: [N, C] of 0 and 1, as float16, where both are exact."""
    return torch.zeros(len(labels), classes, dtype=torch.float16).scatter_(1, labels.cpu().long()[:, None], 1)


def floor_of(dtype: torch.dtype) -> float:
    """The largest probability that is rounded to 0 in this type: 3.0e-8 of float16, 7.0e-46 of float32; 0 of float64.

    A stored 0 is anything up to it. Taken for 0, one image whose true class is stored as 0 puts a model at an infinite
    distance from the truth; taken for this, at the least that it can be.
    """
    about = torch.finfo(dtype)
    return 0.0 if dtype == torch.float64 else about.tiny * about.eps / 2


def roots(probabilities: Tensor, floor: float = 0.0) -> Tensor:
    """√p, in float64, of distributions [..., C] -> unit vectors [..., C]; each is divided by its sum first.

    Args:
        floor: what smaller values are taken for, before that.

    Raises:
        UsageError: these are no probabilities.
    """
    p = probabilities.to(torch.float64, copy=True)
    sums = p.sum(-1, keepdim=True)
    if not p.numel():
        raise UsageError(f"probabilities {list(p.shape)} are of no image or no class: give [images, classes]")
    if not bool(((sums - 1).abs().amax() <= TOLERANCE) & (p.amin() >= 0)):
        check_probabilities(probabilities, "the values of these models")
    if floor:
        p.clamp_(min=floor)
        sums = p.sum(-1, keepdim=True)
    return p.div_(sums).sqrt_()


def bhattacharyya(p: Tensor, q: Tensor) -> Tensor:
    """d_B(P, Q) = −(1/N) Σ_n log Σ_c √(p_nc q_nc) of [..., N, C] and [..., N, C] -> [...], in nats (eq. 7).

    Near 0 it is as exact as elsewhere, for 1 − Σ√(pq) = ½ Σ(√p − √q)², and 0 of equal ones. It is infinite where a
    single image is given to disjoint sets of classes (the truth, and a model that holds it for impossible).

    Raises:
        UsageError: these are no probabilities, or not of as many images and classes.
    """
    _same_shape(p, q)
    u, v = roots(p), roots(q)
    gap = (u - v).square().sum(-1) / 2
    return torch.where(gap < 0.5, -torch.log1p(-gap), -(u * v).sum(-1).log()).mean(-1)


def angles(p: Tensor, q: Tensor) -> Tensor:
    """cos⁻¹ Σ_c √(p_nc q_nc) of [N, C] and [N, C] -> [N] in [0, π/2], without its loss of digits near 0.

    Raises:
        UsageError: as :func:`bhattacharyya`.
    """
    _same_shape(p, q)
    return 2 * torch.asin(((roots(p) - roots(q)).norm(dim=-1) / 2).clamp(max=math.sqrt(0.5)))


def geodesic(p: Tensor, q: Tensor, at: float | Tensor) -> Tensor:
    """The models at λ = ``at`` in [0, 1] of the shortest way from P to Q, [N, C] each -> [*λ's shape, N, C] (eq. 5).

    Each image's √p moves on a great circle at constant speed,
    √p^λ = (sin((1 − λ)θ) √p + sin(λθ) √q) / sin θ, where the angle θ is 0 as well, and squares are given back.

    Raises:
        UsageError: as :func:`bhattacharyya`, or λ outside [0, 1].
    """
    at = torch.as_tensor(at, dtype=torch.float64, device=p.device)[..., None, None]
    if not bool(((at >= 0) & (at <= 1)).all()):
        raise UsageError(f"a geodesic goes from λ = 0 to 1, and {float(at.reshape(-1)[0])} was asked for")
    angle = angles(p, q)[:, None]
    root = (_share(1 - at, angle) * roots(p) + _share(at, angle) * roots(q)) / _sinc(angle)
    return root.square() / root.square().sum(-1, keepdim=True)


def progress(
    models: Sequence[Tensor] | Tensor,
    start: Tensor,
    end: Tensor,
    memory: int = MEMORY,
    floor: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """t_w = argmin over λ in [0, 1] of d_B(P_w, P^λ), P^λ on the geodesic from ``start`` to ``end`` (eq. 6).

    Of an image, Σ_c √(p_w p^λ) = (a sin((1 − λ)θ) + b sin(λθ)) / sin θ with a, b = Σ_c √(p_w p_start), Σ_c √(p_w p_end)
    is some A sin(λθ + φ), and −log of that has the second derivative θ² + (its own slope)². So d_B is strictly convex
    in λ and has one minimiser: the root of its derivative, or the end towards which that points. It is found by
    Newton's steps within a bracket, to rounding: about 1e-16 / θ². Where start and end are the same it is 0.

    (The authors' code searches to 1e-5, and their script gives it p_w where √p_w belongs, which moves t_w by as much as
    0.2; others minimise the sum of the angles instead of d_B.)

    Args:
        models: M of [N, C]; they may be mapped from disk.
        start, end: [N, C]; the truth at 1, ignorance at 0: ``uniform(…), truth(…)``.
        memory: bytes that blocks of images, and of models, may take, beside a and b of all.
        floor: what smaller probabilities of the models are taken for.
        device: where to compute; None: where the models are.

    Returns:
        [M] float64.

    Raises:
        UsageError: no probabilities, not of as many images and classes, less memory than an image takes, or an image
            for which a model shares no class with either end.
    """
    return progress_of(*coefficients(models, start, end, memory, floor, device), memory)


def coefficients(
    models: Sequence[Tensor] | Tensor,
    start: Tensor,
    end: Tensor,
    memory: int = MEMORY,
    floor: float = 0.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a [M, N] and b [M, N], Σ_c √(p q) of each model with ``start`` and with ``end``, and the angles [N] of these.

    Arguments and errors are those of :func:`progress`.
    """
    device = models[0].device if device is None else device
    _same_shape(start, end)
    size = block_size(len(models), 2, start.shape[-1], memory)
    found = torch.cat(list(_products(models, (start, end), size, (floor, 0.0), device)))
    angle = [angles(start[i : i + size].to(device), end[i : i + size].to(device)) for i in range(0, len(start), size)]
    return found[..., 0].T, found[..., 1].T, torch.cat(angle)


def progress_of(a: Tensor, b: Tensor, angle: Tensor, memory: int = MEMORY) -> Tensor:
    """:func:`progress`, from what :func:`coefficients` found."""
    lost = ((a == 0) & (b == 0)).nonzero()
    if len(lost):
        model, image = lost[0].tolist()
        raise UsageError(
            f"model {model} gives image {image} to no class that either end of the geodesic knows of: it is infinitely "
            "far from all of it; give a floor, if rounding made these zeros"
        )
    count = max(1, memory // (64 * a.shape[1]))
    return torch.cat([_minimiser(*part, angle) for part in zip(a.split(count), b.split(count), strict=True)])


def _minimiser(a: Tensor, b: Tensor, angle: Tensor) -> Tensor:
    """λ of each of M models from a, b [M, N] and the angles [N]; what becomes of one does not depend on the others."""

    def derivatives(at: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second, [M] each, of d_B at λ [M]."""
        at = at[:, None]
        height = _share(1 - at, angle) * a + _share(at, angle) * b
        ratio = ((at * angle).cos() * b - ((1 - at) * angle).cos() * a) / height
        return -ratio.mean(1), (angle.square() + ratio.square()).mean(1)

    low, high = torch.zeros_like(a[:, 0]), torch.ones_like(a[:, 0])
    done = derivatives(low)[0] >= 0
    at = torch.where(done, low, torch.where(derivatives(high)[0] <= 0, high, 0.5))
    done |= at == 1
    for _ in range(STEPS):
        if bool(done.all()):
            break
        heed()
        slope, curvature = derivatives(at)
        low, high = torch.where(slope < 0, at, low), torch.where(slope < 0, high, at)
        newton = at - slope / curvature
        step = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        step, done = torch.where(done, at, step), done | ((step - at).abs() <= CLOSE)
        at = step
    return at


def _share(part: Tensor, angle: Tensor) -> Tensor:
    """sin(part · angle) / angle, at 0 too."""
    return part * _sinc(part * angle)


def _sinc(x: Tensor) -> Tensor:
    """sin x / x."""
    return torch.sinc(x / math.pi)


def distances(
    models: Sequence[Tensor] | Tensor, memory: int = MEMORY, floor: float = 0.0, device: torch.device | None = None
) -> Tensor:
    """:func:`bhattacharyya` of all pairs of M models of [N, C] -> [M, M], symmetric, 0 on the diagonal.

    N M² C / 2 multiplications in float64, in blocks of images (as ``memory`` has it) and of :data:`TILE` models. From
    Σ_c √(p q) itself, so that 1e-16 is the error of small distances too: those below 1e-8 lose digits.

    Args:
        models: as of :func:`progress`; each is read M / TILE times.
        memory: bytes that blocks may take, beside the result.
        floor: what smaller probabilities are taken for.
        device: where to compute; None: where the models are.

    Returns:
        [M, M] float64, on the CPU.

    Raises:
        UsageError: no probabilities, not of as many images and classes, or less memory than an image takes.
    """
    tiles = tiles_of(len(models))
    found = [cross(models[one], models[other], memory, floor, device) for one, other in tiles]
    return assembled(len(models), tiles, found)


def tiles_of(count: int) -> list[tuple[slice, slice]]:
    """The blocks of rows and columns that make up one half of a symmetric matrix."""
    cuts = [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]
    return [(one, other) for i, one in enumerate(cuts) for other in cuts[i:]]


def assembled(count: int, tiles: Sequence[tuple[slice, slice]], found: Sequence[Tensor]) -> Tensor:
    """The symmetric matrix with zeros on the diagonal of which ``found`` are the tiles."""
    whole = torch.zeros(count, count, dtype=torch.float64)
    for (rows, columns), tile in zip(tiles, found, strict=True):
        whole[rows, columns] = tile.cpu()
    upper = whole.triu(1)
    return upper + upper.T


def cross(
    rows: Sequence[Tensor] | Tensor,
    columns: Sequence[Tensor] | Tensor,
    memory: int = MEMORY,
    floor: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """The distances of A models from B others -> [A, B]; arguments and errors are those of :func:`distances`."""
    device = rows[0].device if device is None else device
    size = block_size(len(rows), len(columns), rows[0].shape[-1], memory)
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=device)
    for product in _products(rows, columns, size, (floor, floor), device):
        total -= product.clamp_(max=1).log_().sum(0)
    return total / len(rows[0])


def block_size(rows: int, columns: int, classes: int, memory: int) -> int:
    """How many images at a time keep within ``memory`` bytes.

    Raises:
        UsageError: not one.
    """
    each = block_bytes(rows, columns, classes)
    if each > memory:
        raise UsageError(
            f"an image of {rows + columns} models and {classes:,} classes takes {each / 2**20:.3g} MiB, and "
            f"{memory / 2**20:.3g} are allowed: allow more memory"
        )
    return memory // each


def block_bytes(rows: int, columns: int, classes: int) -> int:
    """What an image takes: as stored, its roots and a copy on the way, and the products of all pairs."""
    return 28 * (rows + columns) * classes + 16 * rows * columns


def _products(
    rows: Sequence[Tensor] | Tensor,
    columns: Sequence[Tensor] | Tensor,
    size: int,
    floors: tuple[float, float],
    device: torch.device,
) -> Iterator[Tensor]:
    """Σ_c √(p q) of each image, model of A and model of B, ``size`` images at a time -> [images, A, B]."""
    shape = rows[0].shape
    for one in (*rows, *columns):
        if one.shape != shape:
            raise UsageError(f"models of {list(shape)} and {list(one.shape)}: give as many images and classes of each")
    for start in range(0, shape[0], size):
        heed()
        left, right = (
            roots(torch.stack([one[start : start + size] for one in models]).to(device), floor).transpose(0, 1)
            for models, floor in zip((rows, columns), floors, strict=True)
        )
        yield left @ right.transpose(1, 2)


def _same_shape(p: Tensor, q: Tensor) -> None:
    if p.shape[-2:] != q.shape[-2:] or p.dim() < 2:
        raise UsageError(f"models of {list(p.shape)} and {list(q.shape)}: give as many images and classes of each")


__all__ = [
    "MEMORY",
    "TILE",
    "angles",
    "assembled",
    "bhattacharyya",
    "block_bytes",
    "block_size",
    "coefficients",
    "cross",
    "distances",
    "floor_of",
    "geodesic",
    "progress",
    "progress_of",
    "roots",
    "tiles_of",
    "truth",
    "uniform",
]
