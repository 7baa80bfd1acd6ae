"""Views that an adversary makes who learns, along with the encoder, which change of an image hurts most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.attacks import attacked
from fasttrain.attacks.structured import StructuredConfig, make_transformation
from fasttrain.data import Batch
from fasttrain.models import Encoder
from fasttrain.views.view import put, take


def structured(config: StructuredConfig, features: int, index: int = 0) -> Structured:
    """The batch with one view x changed by an adversary of one layer (Lubana & Aldeeb, section 4)::

        c = bound(W f + b),   f = sg(backbone(x)),        x ← T(x; c)

    T is one of :mod:`fasttrain.attacks.structured`, or several in turn, each with its own rows of W and b; for the
    learned colour space bound is a softmax over each row of α, else a tanh times the largest change. There is
    one c for each image. W and b are trained in the encoder's own backward pass to *raise* the objective: the gradient
    changes sign on its way from c to them, so encoder and adversary play min max L. The encoder's gradient is that of
    training on the changed images as they are, since f is a constant: backbone(x) in evaluation mode, BatchNorm folded.

    The paper does not say where W and b start. Here W = 0 and b gives no change (of colour: α_ii = 0.9), so the
    run begins as the plain one does. They are float32 under autocast too.

    In the optimiser they are a group of their own: no weight decay, no LARS adaptation, ``config.lr_factor`` times
    the scheduled learning rate. Being the module's parameters they are averaged over the ranks, sharded, saved and
    resumed as the encoder's are.

    Args:
        features: dimensions of f, ``encoder.backbone.num_features``.
        index: which of the batch's views.
    """
    return Structured(config, features, index)


class Structured(nn.Module):
    """See :func:`structured`."""

    def __init__(self, config: StructuredConfig, features: int, index: int) -> None:
        super().__init__()
        self.transformations = {name: make_transformation(config, name) for name in config.transformations}
        self.lr_factor, self.index = config.lr_factor, index  # the first is read by build_optimizer
        start = [number for family in self.transformations.values() for number in family.start]
        self.layer = nn.Linear(features, len(start))
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.copy_(torch.tensor(start))
        self._chosen: dict[str, Tensor] = {}

    def forward(self, encoder: Encoder, batch: Batch) -> Batch:
        images, _ = take(batch, self.index)
        with torch.no_grad():
            features = attacked(encoder, "eval")(images).features
        with torch.autocast(images.device.type, enabled=False):
            numbers = reverse_gradient(self.layer(features.to(self.layer.weight.dtype)))
            parts = numbers.split([len(family.start) for family in self.transformations.values()], dim=1)
            for (name, family), part in zip(self.transformations.items(), parts, strict=True):
                constants = family.bound(part)
                images = family.apply(images, constants)
                self._chosen[name] = constants.detach()
        return put(batch, self.index, images)

    def scalars(self) -> dict[str, Tensor]:
        """The size of each constant in the last call: the mean of its absolute value over this rank's images."""
        return {
            f"{name}/{constant}": value
            for name, chosen in self._chosen.items()
            for constant, value in zip(self.transformations[name].constants, chosen.abs().mean(0), strict=True)
        }


def reverse_gradient(x: Tensor) -> Tensor:
    """x; its gradient is −1 times the one that arrives (Ganin & Lempitsky 2015). First derivatives only."""
    return _Reversal.apply(x)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


__all__ = ["Structured", "reverse_gradient", "structured"]
