"""Accuracy of a linear classifier on an encoder's features, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from fasttrain.attacks import AttackConfig, attacked, image_keys, make_attack
from fasttrain.attacks.evaluation import Watched
from fasttrain.attacks.losses import cross_entropy
from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.distributed import all_reduce
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, Subject
from fasttrain.evaluation.images import evaluation_batches, thin
from fasttrain.evaluation.linear import ProbedConfig, alone, fit_classifier
from fasttrain.evaluation.parts import Parts
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
    """:func:`robust_accuracy` of the one subject, with the linear probe as classifier."""
    encoder = subjects[0].load(data.device)
    banks, shared = data.features(encoder, train=data.choose("train", config.bank))
    probe = fit_classifier(banks["train"], len(data.train.classes), config.linear, all_reduce if shared else alone)
    classify = partial(F.linear, weight=probe.weight, bias=probe.bias)
    with data.batches("val", data.choose("val", config.robust.images)) as batches:
        found = robust_accuracy(encoder, classify, batches, config.robust.attack, data.device, data.autocast)
    return found._replace(attack=config.robust.attack.model_dump())


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
    counts = torch.zeros(5, dtype=torch.int64, device=device)  # clean, robust, all; not finite clean, under attack
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for batch in batches:
            images, labels, index = (x.to(device, non_blocking=True) for x in (batch.images[0], *batch[1:3]))
            if len(labels):
                watched = Watched(lambda x, labels=labels: cross_entropy(classifier(model(x).features), labels))
                moved = watched.or_nan(attack_images(watched, images, image_keys(0, 0, index)))
                with torch.no_grad():
                    logits = [classifier(model(x).features) for x in (images, moved)]
                clean, robust = (scores.argmax(1) == labels for scores in logits)
                bad = [~scores.isfinite().all(1) for scores in logits]
                found = [clean, clean & robust, torch.ones_like(clean), *bad]
                counts += torch.stack([mask.sum() for mask in found])
    clean, robust, total, *bad = all_reduce(counts).tolist()
    if not total:
        raise UsageError("robust accuracy has 0 validation images: give a data set with a validation split")
    for count, where in zip(bad, ("", " under attack"), strict=True):
        if count:
            remedy = ": set precision to fp32 or bf16" if autocast == torch.float16 else ""
            raise NotFinite(f"the scores of {count:,} of {total:,} validation images{where} are not finite{remedy}")
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
