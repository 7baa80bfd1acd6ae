"""Searches: attacks that ask of each image only whether it can be misclassified, and are then done with it.

::

    images that are classified right ── search ── which fell, and what they fell to

An :class:`~fasttrain.attacks.evaluation.Attack` makes every image's loss as high as it can; a search stops for an image
at the first misclassified one it meets, and the batch shrinks to those that still stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"Images [B, 3, H, W] in [0, 1] -> logits [B, C], each image's a function of itself alone."

SIZES = 16
"The sizes that a shrinking batch may have, at most: a new shape costs libraries of convolutions a new plan."


class Victim(NamedTuple):
    """The network under attack."""

    logits: Logits
    "what a search goes by"
    judge: Logits | None = None
    "what an image has to fool, where that is another: the network in full precision, say; None: ``logits``"

    @property
    def judged(self) -> Logits:
        """Whose classes count."""
        return self.logits if self.judge is None else self.judge


class Cases(NamedTuple):
    """Images for a search, in which each is on its own."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    labels: Tensor  # [B]
    keys: Tensor  # [B] int64: what an image's random numbers depend on
    targets: Tensor  # [B]: the class that a targeted search heads for, another than the label


class Found(NamedTuple):
    """What a search found, of each image."""

    fell: Tensor  # [B] bool: it is misclassified somewhere in the ball
    images: Tensor  # [B, 3, H, W]: there, or where it was
    bad: Tensor  # [B] bool: a score or a gradient of it that the search met is not finite
    flat: Tensor  # [B] bool: the first gradient that the search went by is 0 everywhere


class Search(Protocol):
    """``search(victim, cases)``: looks in the ball around each image for one that is misclassified.

    Touches no running statistics, asks for gradients of the images alone, and waits once a step for the number of
    images that fell. What becomes of an image depends on it and its key, not on the others.
    """

    def __call__(self, victim: Victim, cases: Cases) -> Found: ...


class Standing:
    """The images of a search that still stand, each with what the search keeps of it; the others are let go.

    A loop evaluates candidates, hands them to :meth:`strike`, ends when that says so, and passes all that it keeps
    through :meth:`shrink`, with which :attr:`cases` shrinks too.
    """

    def __init__(self, victim: Victim, cases: Cases) -> None:
        self.cases = cases
        self._judge = victim.judge
        everyone = torch.zeros_like(cases.labels, dtype=torch.bool)
        self._found = Found(everyone, cases.images.clone(), everyone.clone(), everyone.clone())
        self._rows = torch.arange(len(everyone), device=everyone.device)  # of what is found, of those at hand
        self._down, self._bad = everyone.clone(), everyone.clone()  # of those at hand
        self._left = len(everyone)
        self._begun = False
        self._unit = max(1, -(-len(everyone) // SIZES))

    @property
    def found(self) -> Found:
        """Of all images, so far."""
        self._found.bad[self._rows] |= self._bad
        return self._found

    @torch.no_grad()
    def strike(self, x: Tensor, scores: Tensor, within: Tensor | None = None) -> bool:
        """Take in candidates x [b, 3, H, W] and their ``scores``: whether none stands now.

        Waits for their number, once. Those count that lie ``within`` [b] their balls; None: all do.
        """
        self.note_bad(scores)
        new = (scores.argmax(1) != self.cases.labels) & ~self._down
        new = new if within is None else new & within
        if int(new.sum()):
            rows = new.nonzero()[:, 0]
            if self._judge is not None:
                judged = self._judge(x[rows])
                rows = rows[judged.argmax(1) != self.cases.labels[rows]]
            self._found.images[self._rows[rows]] = x[rows]
            self._found.fell[self._rows[rows]] = True
            self._down[rows] = True
            self._left -= len(rows)
        return not self._left

    def note(self, gradient: Tensor) -> None:
        """Take note of a gradient [b, 3, H, W]: whose is not finite, and whose first one is 0 everywhere."""
        self._bad |= _not_finite(gradient.sum((1, 2, 3)))
        if not self._begun:
            self._found.flat[self._rows] = (gradient == 0).all(3).all(2).all(1)
            self._begun = True

    def note_bad(self, scores: Tensor) -> None:
        """Note of which image a score of [b, C] is not finite."""
        self._bad |= _not_finite(scores.abs().amax(1))

    def shrink(self, *kept: Tensor) -> tuple[Tensor, ...]:
        """``kept`` [b, ...] without images that fell, but for those that fill up one of the few sizes."""
        size = -(-self._left // self._unit) * self._unit
        if size >= len(self._rows):
            return kept
        self._found.bad[self._rows] |= self._bad
        at_hand = self._down.to(torch.uint8).argsort(stable=True)[:size].sort().values
        self._rows, self._down, self._bad = _at(at_hand, (self._rows, self._down, self._bad))
        self.cases = Cases(*_at(at_hand, self.cases))
        return _at(at_hand, kept)


def _not_finite(x: Tensor) -> Tensor:
    """As ``~x.isfinite()``, in half the launches."""
    return ~(x.abs() < torch.inf)


def _at(rows: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x[rows] for x in tensors)  # indexed so, channels-last stays channels-last


__all__ = ["Cases", "Found", "Logits", "Search", "Standing", "Victim"]
