"""AutoAttack over ranks and in parts: each stage's batches are points, of the images that stood the stages before.

::

    clean ── who is right ── apgd-ce ── who stands ── apgd-t, target 1 ── … ── square ── robust accuracy

What falls to one stage is gone for the next, which fills its batches anew: a batch is always full of images that stand.
A batch is one rank's work and kept when it is done, so that an interrupted evaluation loses the batches under way.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch

from fasttrain import distributed
from fasttrain.accuracies import interval_text
from fasttrain.attacks import L2, AttackConfig, Linf, image_keys
from fasttrain.attacks.autoattack import (
    BY_DLR,
    STANDARD,
    VERSIONS,
    AttackName,
    Budget,
    Stage,
    check_scores,
    doubts,
    later_doubts,
    other_classes,
    stages,
)
from fasttrain.evaluation.attacked import Targets, not_finite
from fasttrain.evaluation.images import chunks
from fasttrain.evaluation.parts import Found, Parts, Point


class EvaluatedAttackConfig(AttackConfig):
    """An attack that a robust accuracy is of."""

    name: Literal["fgsm", "pgd", "apgd", "autoattack"] = "apgd"  # type: ignore[assignment]
    """fgsm, pgd, apgd (each on cross-entropy alone, whose figure is an upper bound) or autoattack, the field's."""
    steps: int | None = pydantic.Field(default=None, ge=1)  # type: ignore[assignment]
    """Steps of pgd, apgd and autoattack's gradient attacks; null: 10, of autoattack 100."""
    version: Literal["standard", "first_two", "custom"] = "standard"
    """autoattack: standard (apgd-ce, apgd-t, fab-t, square), first_two (apgd-ce, apgd-t), or custom: `attacks`."""
    attacks: tuple[AttackName, ...] | None = None
    """autoattack, custom: some of apgd-ce, apgd-dlr, apgd-t, fab-t, square, in this order; null: standard's."""
    targets: int = pydantic.Field(default=STANDARD.targets, ge=1)
    """autoattack, custom: classes that apgd-t and fab-t head for, one after the other."""
    queries: int = pydantic.Field(default=STANDARD.queries, ge=1)
    """autoattack, custom: of square, an image."""

    users = AttackConfig.users | {
        "steps": ("pgd", "apgd", "autoattack"),
        "version": ("autoattack",),
        "attacks": ("autoattack",),
        "targets": ("autoattack",),
        "queries": ("autoattack",),
    }

    @pydantic.model_validator(mode="after")
    def _versions_are_what_they_are(self) -> EvaluatedAttackConfig:
        if self.attacks is not None and not self.attacks:
            raise ValueError(f"attacks=[]: give some of {', '.join(VERSIONS['standard'])}, or leave it out")
        if self.attacks is not None and len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks=[{', '.join(self.attacks)}]: give each once")
        if self.name != "autoattack" or self.version == "custom":
            return self
        changed = {"attacks": self.attacks} if self.attacks is not None else {}
        changed |= {key: value for key, value in self.budget._asdict().items() if value != getattr(STANDARD, key)}
        for key, value in changed.items():
            raise ValueError(f"{key}={value} is not AutoAttack's {self.version} version: set version=custom")
        return self

    @property
    def settled(self) -> EvaluatedAttackConfig:
        """Itself, with the number of steps."""
        if self.steps is not None:
            return self
        usual = STANDARD.steps if self.name == "autoattack" else AttackConfig.model_fields["steps"].default
        return self.model_copy(update={"steps": usual})

    @property
    def budget(self) -> Budget:
        """AutoAttack's."""
        return Budget(self.settled.steps, self.targets, self.queries)

    def planned(self, classes: int) -> list[Stage]:
        """AutoAttack's stages.

        Raises:
            UsageError: too few classes for one of the attacks.
        """
        threat = (Linf if self.norm == "linf" else L2)(self.eps_255 / 255)
        attacks = self.attacks or VERSIONS.get(self.version, VERSIONS["standard"])
        return stages(threat, attacks, classes, self.budget)


class Stood(NamedTuple):
    """What AutoAttack left."""

    standing: dict[str, np.ndarray]  # "clean" and each attack, in order: the images that are right and not fooled yet
    doubts: list[str]  # what makes the figure unreliable


def autoattacked(
    targets: Targets,
    indices: np.ndarray,
    attack: EvaluatedAttackConfig,
    classes: int,
    batch: int,
    autocast: torch.dtype | None,
    parts: Parts,
    faster: torch.dtype | None = None,
) -> Stood:
    """AutoAttack on the first of ``targets``; :func:`fasttrain.attacks.autoattack.autoattack`, all ranks together.

    Args:
        indices: of the validation images.
        classes: that the network tells apart.
        batch: images of a part, at most.
        autocast: of the network that is judged.
        faster: of the one that apgd-ce goes by, where other attacks follow, which then meet what it has missed.

    Raises:
        UsageError: too few classes for an attack, or labels outside them.
        NotFinite: a score, or a gradient that an attack went by, is not finite.
    """
    planned = distributed.agree(lambda: attack.planned(classes))

    def points(images: np.ndarray, **settings: Any) -> list[Point]:
        return [targets.point(0, chunk, autocast, **settings) for chunk in chunks(images, batch)]

    def clean(point: Point) -> Found:
        victim, shown = targets.victim(point)
        with torch.no_grad():
            scores = victim.judged(shown.images[0])
        check_scores(scores, shown.labels)
        others = other_classes(scores, shown.labels, attack.targets)
        return {"right": (scores.argmax(1) == shown.labels).tolist(), "others": others.tolist()}

    def doubtful(point: Point) -> Found:
        victim, shown = targets.victim(point)
        return {"doubts": doubts(victim.judged, shown.images[0])}

    def searched(stage: Stage, point: Point) -> Found:
        victim, shown = targets.victim(point)
        heads = torch.tensor([others[index] for index in point["images"]], device=shown.labels.device)
        cases = stage.cases(shown.images[0], shown.labels, image_keys(0, 0, shown.index), heads)
        found = stage.search(victim, cases)
        if bad := int(found.bad.sum()):
            raise not_finite(bad, len(found.bad), True, autocast)
        return {"fell": found.fell.tolist(), "flat": int(found.flat.sum()) if stage.attack in BY_DLR else 0}

    found = parts.run("clean scores", points(indices, attack="none", targets=attack.targets), clean)
    right = np.asarray([mask for part in found for mask in part["right"]], dtype=bool)
    others = dict(zip(indices.tolist(), (row for part in found for row in part["others"]), strict=True))
    (fit,) = parts.run("doubts", points(indices[:batch], attack="doubts"), doubtful)
    standing, flat = {"clean": indices[right]}, 0
    for stage, following in zip(planned, [*planned[1:], None], strict=True):
        stands = list(standing.values())[-1]
        settings = settings_of(stage, attack)
        if faster is not None and stage.attack == "apgd-ce" and stage is not planned[-1]:
            settings["search"] = str(faster).removeprefix("torch.")
        listed = points(stands, **settings)
        found = parts.run(called(stage), listed, partial(searched, stage))
        fell = np.asarray([mask for part in found for mask in part["fell"]], dtype=bool)
        standing[stage.attack] = stands[~fell]
        flat += sum(part["flat"] for part in found)
        if following is None or following.attack != stage.attack:
            share = len(standing[stage.attack]) / len(indices)
            distributed.say(f"{stage.attack}: {interval_text(share, len(indices))} stand")
    shares = {name: len(images) / len(indices) for name, images in standing.items() if name != "clean"}
    return Stood(standing, fit["doubts"] + later_doubts(shares, flat))


def settings_of(stage: Stage, attack: EvaluatedAttackConfig) -> dict[str, Any]:
    """What a part of ``stage`` depends on but for network and images, so that versions share what they have alike."""
    cost = {"queries": attack.queries} if stage.attack == "square" else {"steps": attack.steps}
    return {"attack": stage.attack, "towards": stage.target, "norm": attack.norm, "eps_255": attack.eps_255, **cost}


def called(stage: Stage) -> str:
    """``apgd-t, target 3``."""
    return f"{stage.attack}, target {stage.target + 1}" if stage.targeted else stage.attack
