"""Classifiers trained by SGD on an encoder: on its frozen features, or the encoder with them.

::

    features of all images ──────────────── head ── logits      frozen
    drawn crops ── a copy of the encoder ── head ── logits      the whole network

One rank trains, alone and with one thread, so that on a CPU the weights are the same bits for any number of ranks and
cores. What is random (the head's first weights, the order, the crops) is a function of the seed alone.
``launch/pretrain.py model.weights=… terms.supervised.objective=cross_entropy`` spreads one such training over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import Catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import NotFinite
from fasttrain.evaluation.evaluation import ComparisonConfig, EvaluationData
from fasttrain.evaluation.features import Features, evaluation_mode
from fasttrain.evaluation.parts import one_thread
from fasttrain.evaluation.tasks import Task
from fasttrain.models import BatchNorm1d, BatchNorm2d, Encoder
from fasttrain.optim import schedule
from fasttrain.stop import heed

Head = Literal["linear", "mlp"]
"One linear layer, or two with a ReLU between (Campbell, Manta & Iannantuono, p. 2)."


class Recipe(NamedTuple):
    """SGD on the mean cross-entropy, the learning rate a cosine from its peak at the first step to 0 after the last."""

    epochs: int
    batch: int  # images, at most
    lr: float  # peak, of the head
    weight_decay: float = 0.0  # L2, of weights; biases and BatchNorm's parameters have none
    momentum: float = 0.9
    backbone_lr: float | None = None  # peak, of the encoder under the head; None: the head's


class RandomCropConfig(Config):
    """What a whole network in training sees: random crops of an image, some mirrored (SimCLR, appendix B.5)."""

    scale: tuple[float, float] = (0.08, 1.0)
    "smallest and largest crop, as shares of the image's area"
    flip: float = Field(0.5, ge=0, le=1)
    "probability of a left-right flip"

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        return AugmentConfig(scale=scale).scale

    def augment(self, size: int) -> AugmentConfig:
        """One such view of ``size`` pixels a side, its colours as they are."""
        plain = {"jitter_p": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0}
        return AugmentConfig(views=1, size=size, scale=self.scale, flip=self.flip, **plain)


class TrainingConfig(ComparisonConfig):
    """What evaluations that train classifiers are told."""

    seeds: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1)
    "trainings of each classifier; the head's first weights, the order and the crops depend on these alone"
    epochs: int = Field(30, ge=1)
    "of each training"
    train_batch: int = Field(256, ge=2)
    "images a step at most"
    weight_decay: float = Field(1e-4, ge=0)
    "L2, of weights; biases and BatchNorm's parameters have none"
    backbone_lr: float | None = Field(None, gt=0)
    "peak learning rate of the encoder, where it is trained; null: the head's"
    crop: RandomCropConfig = RandomCropConfig()

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if seed < 0 or seeds.count(seed) > 1:
                raise ValueError(f"seed {seed}: should be 0 or more, and given once")
        return seeds

    def recipe(self, lr: float, whole: bool) -> Recipe:
        """``whole``: the encoder is trained too."""
        backbone_lr = self.backbone_lr if whole else None
        return Recipe(self.epochs, self.train_batch, lr, self.weight_decay, backbone_lr=backbone_lr)


def linear_head(features: int, classes: int, seed: int) -> nn.Linear:
    """Features [B, F] -> logits [B, C]."""
    return _initialised(nn.utils.skip_init(nn.Linear, features, classes), seed)


def mlp_head(features: int, classes: int, seed: int, hidden: int | None = None) -> nn.Sequential:
    """Features [B, F] -> ``hidden`` units (None: F) -> ReLU -> logits [B, C]."""
    hidden = hidden or features
    layers = [nn.utils.skip_init(nn.Linear, *shape) for shape in ((features, hidden), (hidden, classes))]
    return _initialised(nn.Sequential(layers[0], nn.ReLU(), layers[1]), seed)


def _initialised(head: nn.Module, seed: int) -> Any:
    """PyTorch's own start of linear layers: weights and biases uniform within ±1/√inputs; drawn on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=draw)
    return head


class Network(nn.Module):
    """A copy of an encoder, whose BatchNorm keeps to this rank, and a head: images [B, 3, H, W] -> logits [B, C]."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(encoder), head
        for part in self.encoder.modules():
            if isinstance(part, BatchNorm1d | BatchNorm2d):
                part.sync = False

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).features)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    recipe: Recipe,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    autocast: torch.dtype | None = None,
) -> None:
    """Train ``model`` in place, in training mode, on this rank alone.

    Args:
        batches: (inputs, labels [B]) of at least ``recipe.epochs * steps`` steps.
        steps: of an epoch.
        after_epoch: is told how many epochs are done: 0 before the first step, and so on.

    Raises:
        NotFinite: a loss is not; found at the end of its epoch.
        Stopped: this rank was told to stop.
    """
    backbone, head = (model.encoder, model.head) if isinstance(model, Network) else (nn.Module(), model)
    rates = {head: recipe.lr, backbone: recipe.lr if recipe.backbone_lr is None else recipe.backbone_lr}
    groups = [group for part, peak in rates.items() for group in _groups(part, peak, recipe.weight_decay)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum)
    factor = schedule(1.0, 0, recipe.epochs * steps)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.train()
    with one_thread():
        after_epoch(0)
        for step, (inputs, labels) in enumerate(islice(batches, recipe.epochs * steps)):
            heed()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor(step)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            epoch, left = divmod(step + 1, steps)
            if not left:
                _require_finite(total, epoch, recipe)
                after_epoch(epoch)


def train_classifier(
    features: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int, nn.Linear], None] = lambda epoch, classifier: None,
) -> nn.Linear:
    """A linear classifier on features [n, F] with labels [n] from 0, by :func:`train`, in the features' dtype.

    Epoch e goes through all n in the order that :class:`~fasttrain.data.order.Order` gives for (seed, e), ``batch`` at
    a time; the last batch may be smaller. Source: Cowlagi, Liu & Neervannan, section 4.
    """
    order = Order(np.arange(len(labels)), seed, recipe.batch, drop_last=False)
    classifier = linear_head(features.shape[1], classes, seed).to(features)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for position in range(recipe.epochs * len(order)):
            rows = torch.tensor(order.at(position)[1], device=labels.device)
            yield features[rows], labels[rows]

    train(classifier, batches(), len(order), recipe, lambda epoch: after_epoch(epoch, classifier))
    return classifier


def train_network(
    encoder: Encoder,
    head: nn.Module,
    data: EvaluationData,
    indices: np.ndarray,
    task: Task,
    recipe: Recipe,
    seed: int,
    crop: RandomCropConfig,
    after_epoch: Callable[[int, Network], None] = lambda epoch, network: None,
) -> Network:
    """Encoder and head together, by :func:`train`, on crops of the training images ``indices``, which are the task's.

    Batches of one epoch have one size: as many images as fit, of at most ``recipe.batch``, so that no small batch is
    left for BatchNorm; what one epoch leaves out another has.
    """
    network = Network(encoder, head).to(data.device)
    shown = crop.augment(data.config.augment.size), data.config.loader, data.device
    with drawn_batches(data.train, indices, recipe.batch, seed, *shown) as (batches, steps):
        pairs = ((b.images[0].to(data.device), task.relabelled(b.labels.to(data.device))) for b in batches)
        train(network, pairs, steps, recipe, lambda epoch: after_epoch(epoch, network), data.autocast)
    return network


@contextmanager
def drawn_batches(
    catalog: Catalog,
    indices: np.ndarray,
    most: int,
    seed: int,
    augment: AugmentConfig,
    loader: LoaderConfig,
    device: torch.device,
) -> Iterator[tuple[Iterator[Batch], int]]:
    """Batches without end on this rank alone, of one size and at most ``most`` images, and how many make an epoch."""
    count = -(-len(indices) // most)
    order = Order(indices, seed, max(len(indices) // count, min(2, len(indices))))
    reader = make_loader(loader, catalog, order, SimCLR(augment, seed), device)
    try:
        yield reader.iterate(), len(order)
    finally:
        reader.close()


@torch.no_grad()
def network_logits(network: Network, data: EvaluationData, indices: np.ndarray, task: Task) -> Features:
    """Logits of the validation images ``indices`` in evaluation mode, on this rank alone, as ``features``."""
    found = []
    with (
        evaluation_mode(network),
        data.own_batches("val", indices) as batches,
        torch.autocast(data.device.type, data.autocast, enabled=data.autocast is not None),
    ):
        for batch in batches:
            logits = network(batch.images[0].to(data.device)).float()
            found.append(Features(logits, task.relabelled(batch.labels.to(data.device)), batch.index))
    return Features(*(torch.cat(members) for members in zip(*found, strict=True)))


def _groups(module: nn.Module, peak: float, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    parts = [([p for p in parameters if p.ndim > 1], weight_decay), ([p for p in parameters if p.ndim <= 1], 0.0)]
    return [{"params": part, "weight_decay": decay, "peak": peak} for part, decay in parts if part]


def _require_finite(total: Tensor, epoch: int, recipe: Recipe) -> None:
    if not bool(total.isfinite()):
        rates = f"lr={recipe.lr:g}"
        if recipe.backbone_lr is not None:
            rates += f" or backbone_lr={recipe.backbone_lr:g}"
        raise NotFinite(f"the loss of a classifier in training is not finite in epoch {epoch}: lower {rates}")


__all__ = [
    "Head",
    "Network",
    "RandomCropConfig",
    "Recipe",
    "TrainingConfig",
    "drawn_batches",
    "linear_head",
    "mlp_head",
    "network_logits",
    "train",
    "train_classifier",
    "train_network",
]
