"""A classifier and images of which an attack fools some and not others, without data or training.

The network's weights are random, but for its linear layer: ridge regression of the classes on the features of images
drawn like those that are attacked. ε is the median, over images, of margin / ‖its gradient‖₁: the distance from the
boundary, were the network linear; half of the images would then fall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.attacks import Linf
from fasttrain.attacks.losses import margin
from fasttrain.benchmarks.network import channels_last, plain, settle
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.folding import fold_batchnorm
from fasttrain.precision import Precision, autocast_dtype, decide

CLASSES = 10
CONTRAST, VARIETY = 0.2, 0.05
"Standard deviations of what images of a class share, and of what is an image's own, in the range [0, 1]."
FITTED = 256
"Images that the linear layer is fitted to, at least."
TOUCH = 1e-5
"By how much rounding may carry a change beyond ε."


class Classifier(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> logits W x + b of their features, in evaluation mode."""

    def __init__(self, encoder: Callable[[Tensor], Any], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder, self.weight, self.bias = encoder, nn.Parameter(weight), nn.Parameter(bias)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).features, self.weight, self.bias)


class Attacked(NamedTuple):
    """A classifier in the forms that contestants need, and what it is attacked on."""

    plain: Classifier  # contiguous, PyTorch's own layers, float32: who stands is told by it
    fast: Classifier  # the same, folded and channels-last
    faster: Callable[[Tensor], Tensor] | None  # that under autocast, where there is one
    images: Tensor  # [B, 3, H, W]
    labels: Tensor  # [B]
    threat: Linf

    @property
    def device(self) -> torch.device:
        return self.images.device

    def fell(self, moved: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in the place of its own: which are in the ball, and misclassified."""
        within = (moved - self.images).abs().flatten(1).amax(1) <= self.threat.eps + TOUCH
        within &= ((moved >= 0) & (moved <= 1)).flatten(1).all(1)
        with torch.no_grad():
            return within & (self.plain(moved).argmax(1) != self.labels)


def attacked_classifier(model: ModelConfig, size: int, count: int, precision: Precision) -> Attacked:
    """Of ``count`` images of ``size`` pixels, from a fixed seed, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    encoder = Encoder(model.model_copy(update={"head": HeadConfig(layers=0), "zero_init_residual": False})).to(device)
    shared = _smooth(CLASSES, size)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % CLASSES
        images = 0.5 + CONTRAST * shared[labels] + VARIETY * _smooth(count, size)
        return images.clamp(0, 1).to(device), labels.to(device)

    images, labels = drawn(max(FITTED, count))
    settle(encoder, images)
    reference = plain(encoder).eval()
    with torch.no_grad():
        weight, bias = _ridge(reference(images).features, labels)
    images, labels = drawn(count)
    victim, twin = Classifier(reference, weight, bias), channels_last(encoder)
    fast = Classifier(fold_batchnorm(twin), weight, bias)
    autocast = autocast_dtype(decide(precision, device))
    faster = None if autocast is None else _under(autocast, twin, weight, bias)
    return Attacked(victim, fast, faster, images, labels, Linf(_half(victim, images, labels)))


def _smooth(count: int, size: int) -> Tensor:
    """``count`` random images [count, 3, H, W] of large blobs, around 0."""
    return F.interpolate(torch.randn(count, 3, 4, 4), size=(size, size), mode="bicubic")


def _ridge(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer whose logits are 10 for an image's own class and 0 for the others, as near as may be."""
    x, y = features.double(), 10 * (F.one_hot(labels, CLASSES).double() - 1 / CLASSES)
    mean = x.mean(0)
    x = x - mean
    gram = x.T @ x
    weight = torch.linalg.solve(gram + gram.trace() / len(gram) * torch.eye(len(gram)).to(gram), x.T @ y).T
    return weight.float(), -(weight @ mean).float()


def _under(autocast: torch.dtype, encoder: Encoder, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    kind = weight.device.type
    with torch.autocast(kind, autocast):
        folded = Classifier(fold_batchnorm(encoder), weight, bias)

    def logits(x: Tensor) -> Tensor:
        with torch.autocast(kind, autocast):
            return folded(x)

    return logits


def _half(victim: Classifier, images: Tensor, labels: Tensor) -> float:
    x = images.clone().requires_grad_()
    lead = -margin(victim(x), labels)
    (gradient,) = torch.autograd.grad(lead.sum(), [x])
    return float((lead.detach() / gradient.abs().sum((1, 2, 3)))[lead > 0].median())


__all__ = ["CLASSES", "Attacked", "Classifier", "attacked_classifier"]
