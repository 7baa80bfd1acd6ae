"""AutoAttack: searches one after the other, each on the images that still stand (Croce & Hein, ICML 2020).

::

    apgd-ce ── apgd-t, 9 targets ── fab-t, 9 targets ── square        standard
    apgd-ce ── apgd-t, 9 targets                                      first_two

A targeted attack is a stage a target, the others' highest clean score first; an image meets a stage only if it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fasttrain.attacks.apgd import apgd_search
from fasttrain.attacks.fab import fab
from fasttrain.attacks.losses import cross_entropy, dlr, dlr_targeted
from fasttrain.attacks.noise import image_keys, restarted
from fasttrain.attacks.search import Cases, Logits, Search, Victim
from fasttrain.attacks.square import square
from fasttrain.attacks.threat import Threat
from fasttrain.errors import NotFinite, UsageError

AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
VERSIONS: dict[str, tuple[AttackName, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "first_two": ("apgd-ce", "apgd-t"),
}
BY_DLR: tuple[AttackName, ...] = ("apgd-dlr", "apgd-t")
PROBABILITIES, RANDOM, ZERO = 1e-5, 1e-4, 0.002
"The published thresholds: of scores that are probabilities, of a random network, of what square may find."


class Budget(NamedTuple):
    """What an image may cost, at most; the defaults are the published versions'."""

    steps: int = 100  # of each gradient attack
    targets: int = 9  # of a targeted attack, at most all of the other classes
    queries: int = 5000  # of square


STANDARD = Budget()


class Stage(NamedTuple):
    """One search of AutoAttack's."""

    attack: AttackName
    target: int  # of a targeted attack: which of the other classes, from 0
    search: Search

    @property
    def targeted(self) -> bool:
        """Whether it heads for one class."""
        return KINDS[self.attack].targeted

    def cases(self, images: Tensor, labels: Tensor, keys: Tensor, others: Tensor) -> Cases:
        """Of images [B, 3, H, W] that are classified right, ``others`` [B, n] being :func:`other_classes`."""
        number = 1 + 1000 * get_args(AttackName).index(self.attack) + self.target
        return Cases(images, labels, restarted(keys, number), others[:, self.target])


class _Kind(NamedTuple):
    build: Callable[[Threat, Budget], Search]
    targeted: bool = False
    classes: int = 2  # that its loss needs


KINDS: dict[AttackName, _Kind] = {
    "apgd-ce": _Kind(lambda threat, budget: apgd_search(threat, budget.steps, _untargeted(cross_entropy))),
    "apgd-dlr": _Kind(lambda threat, budget: apgd_search(threat, budget.steps, _untargeted(dlr)), classes=3),
    "apgd-t": _Kind(
        lambda threat, budget: apgd_search(
            threat, budget.steps, lambda scores, cases: dlr_targeted(scores, cases.labels, cases.targets)
        ),
        targeted=True,
        classes=4,
    ),
    "fab-t": _Kind(lambda threat, budget: fab(threat, budget.steps), targeted=True),
    "square": _Kind(lambda threat, budget: square(threat, budget.queries)),
}


def _untargeted(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Cases], Tensor]:
    return lambda scores, cases: loss(scores, cases.labels)


def stages(threat: Threat, attacks: Sequence[AttackName], classes: int, budget: Budget = STANDARD) -> list[Stage]:
    """The searches that ``attacks`` are made of, in order.

    Raises:
        UsageError: no attack or an unknown one, too few classes for one, or a budget below 1.
    """
    if not attacks:
        raise UsageError(f"AutoAttack without attacks: give some of {', '.join(KINDS)}")
    for name, number in budget._asdict().items():
        if number < 1:
            raise UsageError(f"AutoAttack with {name}={number}: give at least 1")
    found = []
    for attack in attacks:
        if attack not in KINDS:
            raise UsageError(f"AutoAttack has no attack {attack!r}: give some of {', '.join(KINDS)}")
        kind = KINDS[attack]
        if classes < kind.classes:
            able = ", ".join(name for name in VERSIONS["standard"] if KINDS[name].classes <= classes)
            remedy = f"run {able} alone (version=custom)" if able else "there is nothing to mistake an image for"
            raise UsageError(f"{attack} needs {kind.classes} classes and there are {classes}: {remedy}")
        targets = min(budget.targets, classes - 1) if kind.targeted else 1
        found += [Stage(attack, target, kind.build(threat, budget)) for target in range(targets)]
    return found


def other_classes(scores: Tensor, labels: Tensor, count: int) -> Tensor:
    """Of scores [B, C] the ``count`` highest classes but the label, highest first, [B, count], at most C − 1."""
    others = scores.float().scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, scores.shape[1] - 1)).indices


@torch.no_grad()
def doubts(logits: Logits, images: Tensor) -> list[str]:
    """What makes AutoAttack's figure unreliable and can be seen of clean images: a random network, or probabilities.

    As the published code warns: five passes that differ by more than 1e-4 after normalisation; scores within [0, 1]
    that sum to 1.
    """
    passes = [logits(images).float() for _ in range(5)]
    unit = [scores / (scores.norm(dim=1, keepdim=True) + 1e-10) for scores in passes]
    spread = max(float((one - other).norm(dim=1).max()) for one in unit for other in unit)
    found = []
    if spread > RANDOM or any((one.argmax(1) != passes[0].argmax(1)).any() for one in passes):
        found.append("the network is random: its scores differ from pass to pass, and one attack tells too little")
    scores, alpha = passes[0], PROBABILITIES
    if scores.max() < 1 + alpha and scores.min() > -alpha and ((scores.sum(1) - 1).abs() < alpha).all():
        found.append("the scores are probabilities: attacks need the logits, which softmax has flattened")
    return found


def later_doubts(standing: dict[AttackName, float], flat: int) -> list[str]:
    """What makes the figure unreliable and shows in the end.

    Args:
        standing: the share of images that stood after each attack, in order.
        flat: images that a DLR attack found without a gradient.
    """
    found = []
    if flat:
        found.append(f"{flat:,} images had no gradient where an attack began: gradient attacks say little of them")
    before = [share for name, share in standing.items() if name != "square"]
    if "square" in standing and len(before) > 1 and (gain := min(before) - standing["square"]) > ZERO:
        found.append(
            f"square, which needs no gradients, took another {100 * gain:.2f} points: the gradients may be masked; "
            "give it more queries, or attack the network in a way made for it"
        )
    return found


class AutoAttacked(NamedTuple):
    """What :func:`autoattack` found."""

    standing: dict[str, Tensor]  # "clean" and each attack, in order: [B] bool, classified right and not fooled so far
    images: Tensor  # [B, 3, H, W]: what each image fell to, else the image itself
    doubts: list[str]  # what makes it unreliable


def autoattack(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    attacks: Sequence[AttackName] = VERSIONS["standard"],
    budget: Budget = STANDARD,
    *,
    index: Tensor | None = None,
    batch: int = 256,
    faster: Logits | None = None,
) -> AutoAttacked:
    """AutoAttack on any network, here and now; ``launch/eval.py robust`` shares it among ranks and resumes.

    Args:
        logits: images [b, 3, H, W] in [0, 1] -> logits [b, C]; in evaluation mode.
        images: [B, 3, H, W] in [0, 1].
        labels: [B] int64.
        index: [B], what random numbers depend on; None: the image's place.
        batch: images at a time.
        faster: what apgd-ce goes by where other attacks follow, which then meet what it has missed: ``logits`` in bf16,
            say; what an image has to fool is always ``logits``.

    Raises:
        UsageError: as :func:`stages`; labels outside the classes, no images, or images outside [0, 1].
        NotFinite: a score is not finite.
    """
    if not len(images):
        raise UsageError("AutoAttack on 0 images: give at least one")
    if not 0 <= float(images.min()) <= float(images.max()) <= 1:
        low, high = float(images.min()), float(images.max())
        raise UsageError(f"AutoAttack on values from {low:.4g} to {high:.4g}: give images in [0, 1]")
    keys = image_keys(0, 0, torch.arange(len(images)) if index is None else index).to(images.device)
    with torch.no_grad():
        scores = torch.cat([logits(part).float() for part in images.split(batch)])
    check_scores(scores, labels)
    planned = stages(threat, attacks, scores.shape[1], budget)
    found = images.clone()
    stands = scores.argmax(1) == labels
    standing, flat = {"clean": stands.clone()}, torch.zeros_like(stands)
    others = other_classes(scores, labels, budget.targets)
    for stage in planned:
        hastily = faster is not None and stage.attack == "apgd-ce" and stage is not planned[-1]
        victim = Victim(faster, logits) if hastily else Victim(logits)
        for rows in stands.nonzero()[:, 0].split(batch) if stands.any() else ():
            here = stage.search(victim, stage.cases(images[rows], labels[rows], keys[rows], others[rows]))
            if here.bad.any():
                raise NotFinite(f"{stage.attack} met scores that are not finite, of {int(here.bad.sum()):,} images")
            found[rows], stands[rows] = here.images, ~here.fell
            flat[rows] |= here.flat & (stage.attack in BY_DLR)
        standing[stage.attack] = stands.clone()
    shares = {name: float(mask.double().mean()) for name, mask in standing.items() if name != "clean"}
    return AutoAttacked(standing, found, doubts(logits, images[:batch]) + later_doubts(shares, int(flat.sum())))


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """
    Raises:
        UsageError: a label is none of the classes of scores [B, C].
        NotFinite: a score is not finite.
    """
    outside = labels[(labels < 0) | (labels >= scores.shape[1])]
    if len(outside):
        raise UsageError(
            f"label {int(outside[0])} is outside the network's {scores.shape[1]} classes (from 0): give labels of the "
            "data it was trained on"
        )
    bad = int((~scores.isfinite().all(1)).sum())
    if bad:
        raise NotFinite(f"the scores of {bad:,} of {len(scores):,} images are not finite")


__all__ = [
    "BY_DLR",
    "KINDS",
    "STANDARD",
    "VERSIONS",
    "AttackName",
    "AutoAttacked",
    "Budget",
    "Stage",
    "autoattack",
    "check_scores",
    "doubts",
    "later_doubts",
    "other_classes",
    "stages",
]
