"""The linear probe: multinomial logistic regression on frozen features, by full-batch L-BFGS over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, ClassVar, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.config import Config, Where
from fasttrain.distributed import all_reduce
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation.accuracy import count_classes, hits
from fasttrain.evaluation.evaluation import Evaluation, EvaluationConfig, EvaluationData, Subject
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.finite import check_features
from fasttrain.evaluation.parts import Parts, one_thread

ROWS = 65536  # rows whose logits are held at a time

Total = Callable[[Tensor], Tensor]
"A tensor of this rank's -> its sum over those that hold samples of one set: all_reduce, or alone."


def alone(x: Tensor) -> Tensor:
    """x, where this rank holds all samples."""
    return x


class LinearConfig(Config):
    l2: tuple[Annotated[float, pydantic.Field(gt=0)], ...] = pydantic.Field(
        default=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), min_length=1
    )
    """Weight decays to choose from, on features of unit variance; the choice is made on held-out training images."""
    held_out: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """Share of the training images that the choice of l2 is made on; the last fit uses them too."""
    iterations: int = pydantic.Field(default=200, ge=1)
    """L-BFGS iterations a fit at most."""

    reads: ClassVar[dict[str, Where]] = {"held_out": Where("chooses", why="there is one l2")}

    @property
    def chooses(self) -> bool:
        """Whether one of several l2 is to be chosen."""
        return len(self.l2) > 1


class ProbedConfig(EvaluationConfig):
    """Evaluations of an encoder with a linear probe on it."""

    bank: int | None = pydantic.Field(None, ge=1)
    "training images to use, evenly spaced over the listing; null: all"
    linear: LinearConfig = LinearConfig()


class LinearEvaluation(ProbedConfig):
    """Accuracy of a linear probe on an encoder's frozen features."""


class LinearAccuracy(NamedTuple):
    """Shares in [0, 1]; ``held_out`` has the held-out top-1 of each l2."""

    train_top1: float
    train_top5: float
    val_top1: float
    val_top5: float
    l2: float
    held_out: dict[float, float]


@torch.no_grad()
def linear_probe(
    train: Features, val: Features, config: LinearConfig | None = None, total: Total = all_reduce
) -> LinearAccuracy:
    """Accuracy of a linear classifier fitted to ``train``, features standardised by its mean and deviation.

    Each rank keeps its own samples; what is summed over the ranks is the loss and its gradient, so the fit is that of
    the whole set whatever the number of ranks. Which images are held out depends on their index alone.

    Raises:
        UsageError: no training or validation sample, or none left on one side of the held-out split.
        NotFinite: a feature is not finite.
    """
    config = config or LinearConfig()
    for name, part in (("training", train), ("validation", val)):
        if not _count(part.labels, total):
            raise UsageError(f"the linear probe has 0 {name} images: give a data set with a {name} split")
    check_features("validation images", val)
    found = fit_classifier(train, count_classes(train.labels, val.labels), config, total)
    accuracies = (_accuracy(part, found.weight, found.bias, total) for part in (train, val))
    return LinearAccuracy(*chain(*accuracies), found.l2, found.held_out)


def evaluate(
    subjects: Sequence[Subject], data: EvaluationData, config: LinearEvaluation, parts: Parts
) -> LinearAccuracy:
    """:func:`linear_probe` of the one subject."""
    encoder = subjects[0].load(data.device)
    splits, shared = data.features(encoder, train=data.choose("train", config.bank), val=data.choose("val"))
    return linear_probe(splits["train"], splits["val"], config.linear, all_reduce if shared else alone)


class Classifier(NamedTuple):
    """W x + b, for features as they are; what standardised them is part of it."""

    weight: Tensor  # [C, F]
    bias: Tensor  # [C]
    l2: float
    held_out: dict[float, float]  # held-out top-1 of each l2


@torch.no_grad()
def fit_classifier(train: Features, classes: int, config: LinearConfig, total: Total = all_reduce) -> Classifier:
    """The classifier of :func:`linear_probe`, the same on every rank.

    Args:
        train: this rank's share; all of it with ``total=alone``, the same bits whatever the number of ranks and cores.

    Raises:
        UsageError: no image left on one side of the held-out split.
        NotFinite: a feature is not finite, or the classifier for features as they are would not be.
    """
    if total is not alone:
        check_features("training images", train)
        return _fitted(train, classes, config, total)
    with one_thread():  # sums over the samples in one order
        return _fitted(train, classes, config, total)


def _fitted(train: Features, classes: int, config: LinearConfig, total: Total) -> Classifier:
    mean, deviation = _moments(train, total)
    parts = [((x.double() - mean) / deviation).to(x.dtype) for x in train.features.split(ROWS)]
    standard = train._replace(features=torch.cat(parts))
    choice: dict[float, float] = {}
    if len(config.l2) > 1:
        fitting, choosing = _split(standard, config.held_out, total)
        weight, bias = _zeros(standard, classes)
        for l2 in sorted(config.l2, reverse=True):  # each fit starts from the one more strongly decayed
            weight, bias = fit(fitting, weight, bias, l2, config.iterations, total)
            choice[l2] = _accuracy(choosing, weight, bias, total)[0]
    l2 = max(choice, key=choice.__getitem__) if choice else config.l2[0]
    weight, bias = fit(standard, *_zeros(standard, classes), l2, config.iterations, total)
    weight = weight / deviation
    bias = bias - weight @ mean
    if not (weight.isfinite().all() and bias.isfinite().all()):  # the same on every rank
        raise NotFinite("the linear classifier is not finite: the features are too large, or too small, for fp32")
    return Classifier(weight, bias, l2, choice)


def fit(
    samples: Features, weight: Tensor, bias: Tensor, l2: float, iterations: int, total: Total = all_reduce
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy(W x + b) + l2/2 ‖W‖² over all ranks' samples, from W [C, F] and b [C]."""
    weight, bias = (start.clone().requires_grad_() for start in (weight, bias))
    count = _count(samples.labels, total)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        loss, weight.grad, bias.grad = torch.zeros_like(bias[0]), torch.zeros_like(weight), torch.zeros_like(bias)
        for x, labels in zip(samples.features.split(ROWS), samples.labels.split(ROWS), strict=True):
            log_probability = F.log_softmax(F.linear(x, weight, bias), 1)
            loss += F.nll_loss(log_probability, labels, reduction="sum")
            error = log_probability.exp_()
            error[torch.arange(len(labels), device=labels.device), labels] -= 1
            weight.grad += error.T @ x
            bias.grad += error.sum(0)
        # one buffer for all three: every rank then takes the same steps
        sums = total(torch.cat([loss[None], bias.grad, weight.grad.flatten()])) / count
        bias.grad, weight.grad = sums[1 : 1 + len(bias)], sums[1 + len(bias) :].view_as(weight) + l2 * weight
        return sums[0] + 0.5 * l2 * weight.square().sum()

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _moments(samples: Features, total: Total) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all ranks' samples, in float64: squares may exceed float32."""
    count, dtype = _count(samples.labels, total), samples.features.dtype
    mean = (total(samples.features.sum(0, dtype=torch.double)) / count).to(dtype)
    squares = torch.zeros_like(mean, dtype=torch.double)
    for x in samples.features.split(ROWS):
        squares += (x.double() - mean).square().sum(0)
    deviation = (total(squares) / count).sqrt().to(dtype)
    return mean, deviation.masked_fill(deviation == 0, 1)  # a constant feature says nothing: it becomes 0


def held_out(index: Tensor, share: float) -> Tensor:
    """Which of the images at ``index`` are held out: about ``share`` of them, by a hash that takes neighbours apart."""
    return (index * 2654435761) % 2**32 < share * 2**32


def _split(samples: Features, share: float, total: Total) -> tuple[Features, Features]:
    """Samples to fit on and to choose on, neighbours (of a class, often) spread evenly."""
    held = held_out(samples.index, share)
    parts = tuple(Features(*(member[mask] for member in samples)) for mask in (~held, held))
    if not all(_count(part.labels, total) for part in parts):
        raise UsageError(
            f"held_out={share} of {_count(samples.labels, total)} training images leaves one side empty: set one l2"
        )
    return parts


def _accuracy(samples: Features, weight: Tensor, bias: Tensor, total: Total = all_reduce) -> tuple[float, float]:
    correct = torch.zeros(2, dtype=torch.int64, device=bias.device)
    for x, labels in zip(samples.features.split(ROWS), samples.labels.split(ROWS), strict=True):
        correct += hits(F.linear(x, weight, bias), labels)
    top1, top5 = (total(correct) / _count(samples.labels, total)).tolist()
    return top1, top5


def _zeros(samples: Features, classes: int) -> tuple[Tensor, Tensor]:
    weight = samples.features.new_zeros(classes, samples.features.shape[1])
    return weight, weight.new_zeros(classes)


def _count(labels: Tensor, total: Total) -> int:
    return int(total(torch.tensor(len(labels), device=labels.device)))


EVALUATION = Evaluation(LinearEvaluation, evaluate, "accuracy of a linear probe on frozen features")
