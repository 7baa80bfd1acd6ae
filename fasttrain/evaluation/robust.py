"""Accuracy of a linear classifier on an encoder's features, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fasttrain import distributed
from fasttrain.accuracies import UPPER_BOUND, attack_text, interval_text, wilson
from fasttrain.attacks import AttackConfig, attacked, make_attack
from fasttrain.config import Config, Where
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.distributed import all_reduce
from fasttrain.errors import UsageError
from fasttrain.evaluation.attacked import Targets, not_finite, outcomes
from fasttrain.evaluation.autoattack import EvaluatedAttackConfig, Stood, autoattacked
from fasttrain.evaluation.classifier import ClassifierConfig, classifier_of
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, Subject, place_of
from fasttrain.evaluation.images import chunks, evaluation_batches, thin
from fasttrain.evaluation.linear import ProbedConfig
from fasttrain.evaluation.parts import Found, Parts, Point
from fasttrain.evaluation.robustbench import Measured, Shown, check_claim, write_claim
from fasttrain.models import Encoder


class RobustConfig(Config):
    """How robust accuracy is measured."""

    attack: AttackConfig = AttackConfig()
    """On the classifier's cross-entropy, so that the figure is an upper bound of what AutoAttack leaves."""
    images: int | None = Field(None, ge=1)
    """Validation images to attack, evenly spaced over the listing; null: all."""

    @field_validator("attack")
    @classmethod
    def _attacks_what_is_evaluated(cls, attack: AttackConfig) -> AttackConfig:
        if attack.batchnorm == "train":
            raise ValueError("batchnorm=train attacks another network than is evaluated: set batchnorm=eval")
        return attack


class EvaluatedConfig(RobustConfig):
    """How robust accuracy is measured after training."""

    attack: EvaluatedAttackConfig = EvaluatedAttackConfig()
    """On the classifier."""


class KindConfig(Config):
    """Whose classifier it is."""

    kind: Literal["probe", "own"] = "probe"
    "probe: fitted to the encoder's features of the training images; own: the one a supervised run was trained with"


class RobustEvaluation(ProbedConfig):
    """Accuracy under attack of a classifier on an encoder's features."""

    classifier: KindConfig = KindConfig()
    robust: EvaluatedConfig = EvaluatedConfig()
    format: Literal["json", "robustbench"] = "json"
    "robustbench: beside the result also the claim and the model as RobustBench takes them, in <output>.robustbench"

    reads: ClassVar[dict[str, Where]] = {name: Where("fits", why="classifier.kind=own") for name in ("bank", "linear")}

    @property
    def fits(self) -> bool:
        """Whether a classifier is fitted."""
        return self.classifier.kind == "probe"


class RobustAccuracy(NamedTuple):
    """Shares of the images in [0, 1]; the intervals are Wilson's, of 95 %."""

    clean_top1: float
    robust_top1: float
    images: int
    clean_interval: tuple[float, float]
    robust_interval: tuple[float, float]
    attack: dict[str, Any] | None = None
    standing: dict[str, float] | None = None  # AutoAttack's: the share that stands after each attack, in order
    doubts: tuple[str, ...] = ()  # what makes the figure unreliable
    claim: tuple[str, ...] = ()  # RobustBench's: what was written, and what is left to do


def evaluate(
    subjects: Sequence[Subject], data: EvaluationData, config: RobustEvaluation, parts: Parts
) -> RobustAccuracy:
    """Robust accuracy of the one subject's classifier; each batch is a part.

    Raises:
        UsageError: no validation image; as :func:`~fasttrain.evaluation.autoattack.autoattacked`.
        NotFinite: as :func:`robust_accuracy`.
    """
    attack, shown = config.robust.attack.settled, Shown(data.val.root.name, data.val.classes, config.augment)
    if config.format == "robustbench":
        distributed.agree(lambda: check_claim(attack, shown))
    indices = data.choose("val", config.robust.images)
    check_count(len(indices))
    encoder = subjects[0].load(data.device)
    chosen = ClassifierConfig(kind=config.classifier.kind, bank=config.bank, linear=config.linear)
    classifier = classifier_of(subjects[0], encoder, data, chosen, parts)
    targets = Targets(data, [(encoder, classifier)])
    if attack.name == "autoattack":
        # what is judged is the network in full, unless a precision is asked for
        judged, faster = (None, data.autocast) if config.precision == "auto" else (data.autocast, None)
        classes = len(classifier.task.classes)
        stood = autoattacked(targets, indices, attack, classes, config.batch, judged, parts, faster)
        found = of_autoattack(stood, len(indices), attack)
        if config.format == "json":
            return found
        measured = Measured(found.clean_top1, found.robust_top1, found.images, found.doubts)
        place = place_of(config, subjects).with_suffix(".robustbench")
        told = distributed.on_rank_zero(
            lambda: write_claim(place, encoder, classifier.weight, classifier.bias, attack, shown, measured)
        )
        return found._replace(claim=tuple(told))
    settings = attack.model_dump(include=set(AttackConfig.model_fields))
    points = [targets.point(0, chunk, data.autocast, attack=settings) for chunk in chunks(indices, config.batch)]
    moves = make_attack(attack)

    def work(point: Point) -> Found:
        found = targets.outcomes(point, moves)
        return {"clean": int(found.clean.sum()), "robust": int(found.robust.sum())}

    counts = parts.run("robust accuracy", points, work)
    clean, robust = (sum(found[key] for found in counts) for key in ("clean", "robust"))
    return shares(clean, robust, len(indices))._replace(attack=settings)


def of_autoattack(stood: Stood, total: int, attack: EvaluatedAttackConfig) -> RobustAccuracy:
    """What AutoAttack left of ``total`` images."""
    counts = {name: len(images) for name, images in stood.standing.items()}
    found = shares(counts["clean"], list(counts.values())[-1], total)
    standing = {name: count / total for name, count in counts.items() if name != "clean"}
    return found._replace(attack=attack.model_dump(), standing=standing, doubts=tuple(stood.doubts))


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
    return shares(clean, robust, total)


def check_count(total: int) -> None:
    """
    Raises:
        UsageError: there is no image.
    """
    if not total:
        raise UsageError("robust accuracy has 0 validation images: give a data set with a validation split")


def shares(clean: int, robust: int, total: int) -> RobustAccuracy:
    """Of counts of images; as :func:`check_count`."""
    check_count(total)
    return RobustAccuracy(clean / total, robust / total, total, wilson(clean, total), wilson(robust, total))


def lines(found: RobustAccuracy) -> list[str]:
    """Clean and robust accuracy, each with its count and interval, what of each attack, and which attack that was."""
    told = [f"{'clean_top1':16s}{interval_text(found.clean_top1, found.images)}"]
    told += [f"{'  ' + name:16s}{interval_text(share, found.images)}" for name, share in (found.standing or {}).items()]
    told.append(f"{'robust_top1':16s}{interval_text(found.robust_top1, found.images)}")
    told.append(f"{'attack':16s}{attack_text(found.attack)}")
    if found.attack["name"] != "autoattack":
        told.append(f"{'':16s}{UPPER_BOUND}")
    elif found.attack["version"] != "standard":
        told.append(f"{'':16s}an upper bound of what the standard version leaves")
    told += [f"{'DOUBT':16s}{doubt}" for doubt in found.doubts]
    return told + [f"{'robustbench':16s}{line}" for line in found.claim]


class OnlineRobust:
    """``(step) -> {"clean_top1": …, "robust_top1": …, "robust_images": …}``; a callback, run by all ranks."""

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
        return {"clean_top1": found.clean_top1, "robust_top1": found.robust_top1, "robust_images": found.images}


EVALUATION = Evaluation(
    RobustEvaluation,
    evaluate,
    "accuracy of that probe, clean and under attack: by APGD on cross-entropy, an upper bound, or by AutoAttack",
    lines,
)


__all__ = ["OnlineRobust", "RobustAccuracy", "RobustConfig", "robust_accuracy"]
