"""What becomes of each image under attack: the parts that robust accuracy and robustness curves are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.attacks import Attack, attacked, image_keys
from fasttrain.attacks.evaluation import Watched
from fasttrain.attacks.losses import cross_entropy
from fasttrain.attacks.search import Logits, Victim
from fasttrain.data import Batch
from fasttrain.errors import NotFinite
from fasttrain.evaluation.classifier import Linear
from fasttrain.evaluation.evaluation import EvaluationData, fingerprint
from fasttrain.evaluation.parts import Point
from fasttrain.models import Encoded, Encoder
from fasttrain.stop import heed


class Outcomes(NamedTuple):
    """Of each image of a batch."""

    clean: Tensor  # [B] bool: it is classified right
    robust: Tensor  # [B] bool: and under attack too
    bad_clean: Tensor  # [B] bool: a score of it is not finite
    bad_robust: Tensor  # [B] bool: one under attack is not, or a loss or a gradient that the attack went by


def outcomes(logits: Logits, batch: Batch, attack: Attack) -> Outcomes:
    """What becomes of the images (view 0) when ``attack`` raises the cross-entropy of ``logits``, which it knows.

    An image that is wrong without an attack counts as wrong under it. Random starts are a function of an image's index
    alone, so each call, on any number of ranks, meets the same attacker.
    """
    images, labels = batch.images[0], batch.labels
    watched = Watched(lambda x: cross_entropy(logits(x), labels))
    moved = watched.or_nan(attack(watched, images, image_keys(0, 0, batch.index)))
    with torch.no_grad():
        scores = [logits(x) for x in (images, moved)]
    clean, robust = (x.argmax(1) == labels for x in scores)
    return Outcomes(clean, clean & robust, *(~x.isfinite().all(1) for x in scores))


def not_finite(count: int, total: int, under_attack: bool, autocast: torch.dtype | None) -> NotFinite:
    """The error of so many images' scores."""
    where = " under attack" if under_attack else ""
    remedy = ": set precision to fp32 or bf16" if autocast == torch.float16 else ""
    return NotFinite(f"the scores of {count:,} of {total:,} validation images{where} are not finite{remedy}")


class Targets:
    """Encoders with their classifiers, and the validation images that they are attacked on: points, and how to work.

    The network at hand, folded (in two precisions), and the images at hand are kept for the points that follow.
    """

    def __init__(self, data: EvaluationData, targets: Sequence[tuple[Encoder, Linear]]) -> None:
        self._data = data
        self._named = [({"weights": fingerprint(e), "classifier": _digest(c)}, e, c) for e, c in targets]
        self._model, self._batch = lru_cache(maxsize=2)(self._folded), lru_cache(maxsize=1)(self._shown)

    def point(self, target: int, chunk: np.ndarray, autocast: torch.dtype | None, **settings: Any) -> Point:
        """Of the images ``chunk``, at most ``config.batch``, as the ``target``-th sees them in this precision."""
        data, rounding = self._data, autocast or ("tf32" if torch.backends.cudnn.allow_tf32 else torch.float32)
        shown = {"size": data.config.augment.size, "eval_crop": data.config.augment.eval_crop}
        return {
            **self._named[target][0],
            "classes": list(self._named[target][2].task.classes),
            "data": data.val.fingerprint,
            "shown": shown | {"loader": data.config.loader.kind},
            "images": chunk.tolist(),
            "precision": str(rounding).removeprefix("torch."),
            **settings,
        }

    def at(self, point: Point) -> tuple[Logits, Batch]:
        """The network of ``point`` and its images, with labels as in the classifier's task; this rank alone.

        Logits are in float32 or better outside autocast, and end early (:class:`Stopped`) if this rank is told to stop.
        """
        number = self._number(point)
        model, classifier = self._model(number, self._autocast(point)), self._named[number][2]

        def logits(x: Tensor) -> Tensor:
            heed()
            return classifier(model(x).features)

        batch = self._batch(tuple(point["images"]))
        return logits, batch._replace(labels=classifier.task.relabelled(batch.labels))

    def victim(self, point: Point) -> tuple[Victim, Batch]:
        """As :meth:`at`, for a search: judged in the precision of ``point``, and gone by in its ``search``, if any."""
        judge, batch = self._cast(point)
        if "search" not in point:
            return Victim(judge), batch
        return Victim(self._cast(point | {"precision": point["search"]})[0], judge), batch

    def _cast(self, point: Point) -> tuple[Logits, Batch]:
        """As :meth:`at`; logits are in the precision of ``point`` wherever they are asked for."""
        autocast = self._autocast(point)
        plain, batch = self.at(point)

        def logits(x: Tensor) -> Tensor:
            with torch.autocast(self._data.device.type, autocast, enabled=autocast is not None):
                return plain(x)

        return logits, batch

    def outcomes(self, point: Point, attack: Attack) -> Outcomes:
        """:func:`outcomes` at ``point``, on the CPU.

        Raises:
            NotFinite: a score, or what the attack went by, is not finite.
        """
        autocast = self._autocast(point)
        logits, batch = self.at(point)
        with torch.autocast(self._data.device.type, autocast, enabled=autocast is not None):
            found = Outcomes(*(mask.cpu() for mask in outcomes(logits, batch, attack)))
        for bad in (found.bad_clean, found.bad_robust):
            if bad.any():
                raise not_finite(int(bad.sum()), len(bad), bad is found.bad_robust, autocast)
        return found

    def _number(self, point: Point) -> int:
        return next(i for i, (names, *_) in enumerate(self._named) if names.items() <= point.items())

    def _autocast(self, point: Point) -> torch.dtype | None:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(point["precision"])

    def _folded(self, number: int, autocast: torch.dtype | None) -> Callable[[Tensor], Encoded]:
        with torch.autocast(self._data.device.type, autocast, enabled=autocast is not None):
            return attacked(self._named[number][1])

    def _shown(self, indices: tuple[int, ...]) -> Batch:
        with self._data.own_batches("val", np.asarray(indices)) as batches:
            batch = next(batches)
        return Batch(*(x.to(self._data.device) for x in batch[:3]))


def _digest(classifier: Linear) -> str:
    parts = (x.detach().cpu().contiguous().numpy().tobytes() for x in (classifier.weight, classifier.bias))
    return hashlib.blake2b(b"".join(parts), digest_size=12).hexdigest()


__all__ = ["Logits", "Outcomes", "Targets", "not_finite", "outcomes"]
