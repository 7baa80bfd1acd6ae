"""Accuracy of a linear classifier on an encoder's features, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fasttrain.attacks import AttackConfig, attacked, make_attack
from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.distributed import all_reduce
from fasttrain.errors import UsageError
from fasttrain.evaluation.attacked import Targets, not_finite, outcomes
from fasttrain.evaluation.classifier import ClassifierConfig, classifier_of
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, Subject
from fasttrain.evaluation.images import chunks, evaluation_batches, thin
from fasttrain.evaluation.linear import ProbedConfig
from fasttrain.evaluation.parts import Found, Parts, Point
from fasttrain.models import Encoder


class RobustConfig(Config):
    """How robust accuracy is measured."""

    attack: AttackConfig = AttackConfig()
    """On the classifier's cross-entropy."""
    images: int | None = Field(None, ge=1)
    """Validation images to attack, evenly spaced over the listing; null: all."""

    @field_validator("attack")
    @classmethod
    def _attacks_what_is_evaluated(cls, attack: AttackConfig) -> AttackConfig:
        if attack.batchnorm == "train":
            raise ValueError("batchnorm=train attacks another network than is evaluated: set batchnorm=eval")
        return attack


class RobustEvaluation(ProbedConfig):
    """Accuracy under attack of a linear probe on an encoder's features."""

    robust: RobustConfig = RobustConfig()


class RobustAccuracy(NamedTuple):
    """Shares of the images in [0, 1]."""

    clean_top1: float
    robust_top1: float
    images: int
    attack: dict[str, Any] | None = None


def evaluate(
    subjects: Sequence[Subject], data: EvaluationData, config: RobustEvaluation, parts: Parts
) -> RobustAccuracy:
    """:func:`robust_accuracy` of the one subject, with the linear probe as classifier; each batch is a part.

    Raises:
        UsageError: no validation image.
        NotFinite: as :func:`robust_accuracy`.
    """
    encoder = subjects[0].load(data.device)
    probe = ClassifierConfig(bank=config.bank, linear=config.linear)
    targets = Targets(data, [(encoder, classifier_of(subjects[0], encoder, data, probe, parts))])
    indices = data.choose("val", config.robust.images)
    settings, attack = config.robust.attack.model_dump(), make_attack(config.robust.attack)
    points = [targets.point(0, chunk, data.autocast, attack=settings) for chunk in chunks(indices, config.batch)]

    def work(point: Point) -> Found:
        found = targets.outcomes(point, attack)
        return {"clean": int(found.clean.sum()), "robust": int(found.robust.sum())}

    counts = parts.run("robust accuracy", points, work)
    clean, robust = (sum(found[key] for found in counts) for key in ("clean", "robust"))
    return _shares(clean, robust, len(indices))._replace(attack=settings)


def robust_accuracy(
    encoder: Encoder,
    classifier: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    attack: AttackConfig,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> RobustAccuracy:
    """Shares of images that ``classifier(encoder(x).features)`` gets right, and that it gets right under attack too.

    The attack raises the cross-entropy of encoder and classifier in evaluation mode, both of which it knows; an image
    that is wrong without an attack counts as wrong under it. Random starts are a function of an image's index alone, so
    each call, on any number of ranks, meets the same attacker. Ranks may have shares of different length.

    Args:
        classifier: features [B, F] -> logits [B, C].
        batches: this rank's; view 0 is taken.

    Raises:
        UsageError: no image on any rank.
        NotFinite: a logit is not finite, or a loss or a gradient that an attack went by.
    """
    attack_images, model = make_attack(attack), attacked(encoder)
    counts = torch.zeros(5, dtype=torch.int64, device=device)  # images; of them clean, robust and both not finite
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for batch in batches:
            here = Batch(*(x.to(device, non_blocking=True) for x in batch[:3]))
            if len(here.labels):
                found = outcomes(lambda x: classifier(model(x).features), here, attack_images)
                counts += torch.stack([torch.ones_like(found.clean).sum(), *(mask.sum() for mask in found)])
    total, clean, robust, *bad = all_reduce(counts).tolist()
    for count, under_attack in zip(bad, (False, True), strict=True):
        if count:
            raise not_finite(count, total, under_attack, autocast)
    return _shares(clean, robust, total)


def _shares(clean: int, robust: int, total: int) -> RobustAccuracy:
    if not total:
        raise UsageError("robust accuracy has 0 validation images: give a data set with a validation split")
    return RobustAccuracy(clean / total, robust / total, total)


class OnlineRobust:
    """``(step) -> {"clean_top1": …, "robust_top1": …}`` of the encoder as it stands; a callback, run by all ranks."""

    metrics = ("clean_top1", "robust_top1")

    def __init__(
        self,
        config: RobustConfig,
        batch: int,
        catalog: Catalog,
        augment: AugmentConfig,
        loader: LoaderConfig,
        encoder: Encoder,
        classifier: Callable[[Tensor], Tensor],
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.config, self.batch, self.catalog, self.augment, self.loader = config, batch, catalog, augment, loader
        self.encoder, self.classifier, self.device, self.autocast = encoder, classifier, device, autocast

    def __call__(self, step: int) -> dict[str, float]:
        indices = thin(self.catalog.indices, self.config.images)
        with evaluation_batches(self.catalog, indices, self.batch, self.augment, self.loader, self.device) as batches:
            found = robust_accuracy(
                self.encoder, self.classifier, batches, self.config.attack, self.device, self.autocast
            )
        return {"clean_top1": found.clean_top1, "robust_top1": found.robust_top1}


EVALUATION = Evaluation(RobustEvaluation, evaluate, "accuracy of that probe, clean and under attack")


__all__ = ["OnlineRobust", "RobustAccuracy", "RobustConfig", "robust_accuracy"]
