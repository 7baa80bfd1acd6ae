"""What an objective is, and what it may ask of the encoding it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.models import Encoded, Encoder

Objective = Callable[[Encoded, Batch], Tensor]
"""(Encoded views [V·B, ...], view-major, and their batch) -> a loss of this rank, whose mean over ranks is the loss.

A vector holds one loss an image ([B]) or a row ([V·B]), each a function of its own image alone (BatchNorm aside); the
loss is its mean. A scalar couples the images of the batch, as contrastive losses do.
"""

OneSided = Callable[[Encoded, Batch], Callable[[Encoded], Tensor]]
"""(The other views [(V−1)·B, ...], held fixed, and their batch) -> (encoded attacked view [B, ...] -> its losses [B]).

For attacks: an image's loss depends on that image alone, so the gradient of the sum has every image's own in its rows.
What comes of the other views is detached, and gathered over the ranks once, not at each step of the attack.
"""

ROWS = ("features", "projections", "logits", "predictions")
"Members of an encoding, and of its layers, that have a row an image and that objectives look at."


class Summand(NamedTuple):
    """weight · L + penalty · R, with R = regulariser(L, its value, encoded views, batch)."""

    loss: Objective
    weight: float = 1.0
    penalty: float = 0.0
    regulariser: Callable[[Objective, Tensor, Encoded, Batch], Tensor] | None = None


class Traits(NamedTuple):
    """What the caller of an objective has to know; set as its attribute ``traits`` where it is not the default."""

    image_gradient: bool = False  # differentiates by encoded.images, which must require gradients before encoding
    full_precision: bool = False  # the encoding must not be autocast
    stops_gradients: bool = False  # what autograd differentiates is not the derivative of the value
    passes: int = 1  # equal parts of the images that are encoded apart, each with BatchNorm statistics of its own
    summands: tuple[Summand, ...] = ()  # what it is the sum of, where R is a function of L's gradient by the images
    scalars: Mapping[str, Tensor] = MappingProxyType({})  # parts of its last value's mean, detached, to be logged


def traits(objective: Objective) -> Traits:
    """The objective's own, or the defaults of a plain function."""
    return getattr(objective, "traits", Traits())


def with_traits(objective: Objective, traits: Traits) -> Objective:
    """``objective``, marked."""
    objective.traits = traits  # type: ignore[attr-defined]
    return objective


def encode(encoder: Encoder, images: Tensor, objectives: Iterable[Objective]) -> Encoded:
    """Encode images [N, 3, H, W] once for all ``objectives``, in the way that they ask for."""
    asked = [traits(objective) for objective in objectives]
    if any(one.image_gradient for one in asked) and not images.requires_grad:
        images = images.detach().requires_grad_()
    full = any(one.full_precision for one in asked)
    passes = max(one.passes for one in asked)
    with torch.autocast(images.device.type, enabled=False) if full else nullcontext():
        return encoder(images) if passes == 1 else _encode_apart(encoder, images, passes)


def _encode_apart(encoder: Encoder, images: Tensor, passes: int) -> Encoded:
    """The encodings of equal parts of ``images``, one part after another, as one."""
    whole = _joined([encoder(part) for part in images.chunk(passes)])
    return whole._replace(images=images, encoder=lambda others: _encode_apart(encoder, others, passes))


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Rows below each other; the stages' maps, which heads alone see, are left out."""
    rows = {name: [getattr(part, name) for part in parts] for name in ROWS}
    layers = tuple(_joined(layer) for layer in zip(*(part.layers for part in parts), strict=True))
    joined = {name: None if each[0] is None else torch.cat(each) for name, each in rows.items()}
    return Encoded(images=None, stages=(), **joined, layers=layers)
