"""Filter-normalised directions in the space of a network's weights, and its loss on a plane that they span."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.evaluation.curvature import Batches, summed_loss, weights_of
from fasttrain.stop import heeded

Direction = dict[str, Tensor]
"A change of each weight, by the weight's name."


def filter_normalised(direction: Tensor, weight: Tensor) -> Tensor:
    """d_k ‖w_k‖ / ‖d_k‖ for each filter w_k = weight[k], in float64; 0 where w_k or d_k is 0.

    A filter is what makes one output: of a convolution's weight [C_out, C_in, h, w] or a linear layer's [C_out, C_in]
    the slices along the first dimension. A tensor of one dimension or none is a bias or BatchNorm's, and stays: 0.

    Li et al.'s code (``xnorm=filter, xignore=biasbn``) divides by ‖d_k‖ + 1e-10; without ``biasbn`` it moves biases and
    BatchNorm's gains along themselves, and its ``dir_type=states`` BatchNorm's running statistics too.
    """
    if weight.dim() < 2:
        return torch.zeros_like(weight, dtype=torch.float64)
    d, w = (x.double().flatten(1) for x in (direction, weight))
    long, wanted = (x.norm(dim=1, keepdim=True) for x in (d, w))
    return (d * torch.where(long > 0, wanted / long, 0)).view(weight.shape)


def random_directions(weights: nn.Module | Mapping[str, Tensor], seed: int = 0, count: int = 2) -> list[Direction]:
    """``count`` filter-normalised Gaussian directions, in the weights' dtypes and on their devices.

    They are drawn and normalised on the CPU in float64, so ``seed`` gives the same on any rank, device and dtype, and
    networks of one architecture get one draw, each normalised to its own weights.

    Args:
        weights: a module, for its parameters, or tensors by name, in their order.
    """
    weights = weights_of(weights) if isinstance(weights, nn.Module) else weights
    generator = torch.Generator().manual_seed(seed)
    directions: list[Direction] = [{} for _ in range(count)]
    for direction in directions:
        for name, weight in weights.items():
            drawn = torch.randn(weight.shape if weight.dim() > 1 else 0, generator=generator, dtype=torch.float64)
            direction[name] = filter_normalised(drawn, weight.detach().cpu()).to(weight.device, weight.dtype)
    return directions


def filter_scales(weights: nn.Module | Mapping[str, Tensor]) -> Tensor:
    """s [P] in float64, s_i = ‖w_k‖ / √n_k for each of the n_k weights of filter k, 0 for biases and BatchNorm.

    Of filter-normalised directions d, Gaussian or s times signs, E[d dᵀ] is the diagonal matrix of s², so Σ s_i² H_ii
    is the mean curvature E[dᵀ H d] along them: at a small distance r the loss rises by half of it times r², on average.
    It does not change when BatchNorm takes back what a filter was multiplied by; the trace itself does.
    """
    weights = weights_of(weights) if isinstance(weights, nn.Module) else weights
    return torch.cat([_root_mean_squares(weight).flatten() for weight in weights.values()])


def _root_mean_squares(weight: Tensor) -> Tensor:
    if weight.dim() < 2:
        return torch.zeros_like(weight, dtype=torch.float64)
    return weight.double().flatten(1).square().mean(1, keepdim=True).sqrt().expand(-1, weight[0].numel())


class Heights(NamedTuple):
    """At P points of a plane."""

    losses: Tensor  # [P] float64, mean cross-entropy
    errors: Tensor  # [P] float64, percent misclassified; logits that are not finite are


@torch.no_grad()
def loss_plane(
    network: nn.Module, directions: Sequence[Direction], coordinates: Iterable[Sequence[float]], batches: Batches
) -> Heights:
    """Loss of ``network`` over ``batches`` with its weights at w + Σ_k c_k d_k, for each point c of ``coordinates``.

    Each point starts from w anew, in the weights' dtype; losses are summed over the batches, in order, in float64.
    The network's mode is left as it is and its buffers stay: in evaluation mode BatchNorm keeps the running statistics
    of w everywhere on the plane, as in Li et al.'s code.

    Args:
        network: inputs -> logits [B, C]; its parameters are w.
        directions: of any number; parameters that one leaves out do not move.
        coordinates: P points, a number for each direction.
    """
    found = [_height(network, moved(weights_of(network), directions, point), batches) for point in coordinates]
    return Heights(*torch.tensor(found, dtype=torch.float64).view(-1, 2).unbind(1))


def moved(weights: Mapping[str, Tensor], directions: Sequence[Direction], point: Sequence[float]) -> dict[str, Tensor]:
    """w + Σ_k c_k d_k by name."""
    steps = list(zip(point, directions, strict=True))
    return {
        name: weight + sum(c * d[name] for c, d in steps if name in d) if any(name in d for _, d in steps) else weight
        for name, weight in weights.items()
    }


def _height(network: nn.Module, weights: Mapping[str, Tensor], batches: Batches) -> tuple[float, float]:
    loss = wrong = count = 0
    for x, labels in heeded(batches):
        batch_loss, logits = summed_loss(network, weights, x, labels)
        right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        loss, wrong, count = loss + batch_loss.double(), wrong + (~right).sum(), count + len(labels)
    return float(loss / count), 100 * int(wrong) / count


def axis_of(extent: float, points: int) -> list[float]:
    """From −extent to extent, each the double nearest to the exact fraction: grids share the points that they share."""
    middle = (points - 1) // 2
    return [float(Fraction(repr(extent)) * i / middle) for i in range(-middle, middle + 1)]


def ring_of(radius: float, count: int) -> list[tuple[float, float]]:
    """Points of a circle in the plane, evenly around, the first on α's axis."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


__all__ = [
    "Direction",
    "Heights",
    "axis_of",
    "filter_normalised",
    "filter_scales",
    "loss_plane",
    "moved",
    "random_directions",
    "ring_of",
]
