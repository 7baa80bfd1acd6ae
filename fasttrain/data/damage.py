"""Images that turn out bad while a run goes on: how they are noticed, and how many are borne.

::

    read ── cheap checks ── decode ── Batch           catalogue, is_cut, header; then the decoder itself
              └─ bad ─────────┴─ bad ── Order.candidates(epoch, id): the first that is good is shown instead

Which images a batch shows then follows from the files' state alone: not from the rank, the world size, the threads, or
where a run was interrupted. Batches keep their size. A bad image is logged once with its path, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fasttrain import distributed
from fasttrain.errors import UsageError
from fasttrain.printable import printable

PNG_END = b"IEND\xaeB`\x82"

_log = logging.getLogger(__name__)


class Bad(NamedTuple):
    """An image that cannot be shown."""

    index: int  # its id
    complaint: str  # with its path and the reason


class BadImages:
    """The distinct bad images met since the process was started, against a budget.

    Args:
        share: of the images that may be bad (:attr:`LoaderConfig.bad_share`).
        total: images there are.
        remedy: what else to do about them.
    """

    def __init__(self, share: float, total: int, remedy: str) -> None:
        self.found: dict[int, str] = {}  # id -> complaint
        self.budget = int(share * total + 1e-6)  # 0.29 of 100 is 28.999…
        self._limit = f"loader.bad_share={share:g} of {total:,} images allows {self.budget:,}"
        self._remedy = remedy
        self._untold: list[Bad] = []

    def add(self, bad: Iterable[Bad]) -> None:
        """Log and count what is new in ``bad``.

        Raises:
            UsageError: with it there are more than the budget allows.
        """
        new = [(index, printable(complaint)) for index, complaint in dict(bad).items() if index not in self.found]
        for index, complaint in new:
            self.found[index] = complaint
            _log.warning("%s; another is shown instead (%d bad so far)", complaint, len(self.found))
        self._untold += [Bad(*item) for item in new]
        if new and len(self.found) > self.budget:
            raise UsageError(self._verdict([complaint for _, complaint in new]))

    def agree(self) -> int:
        """Join what all ranks have met, and return how many there are; all ranks call it together.

        Afterwards ``found`` is the same on every rank, in the same order.

        Raises:
            UsageError: all ranks' together are more than the budget allows; on all ranks.
        """
        parts, self._untold = distributed.all_gather_object(self._untold), []
        self.found = dict(sorted((self.found | dict(bad for part in parts for bad in part)).items()))
        if len(self.found) > self.budget:
            raise UsageError(self._verdict(list(self.found.values())), everywhere=True)
        return len(self.found)

    def _verdict(self, complaints: list[str]) -> str:
        shown = "; ".join(complaints[:3]) + (f" and {len(complaints) - 3:,} more" if len(complaints) > 3 else "")
        return f"{shown}: {len(self.found):,} bad images, and {self._limit}: {self._remedy}, or raise loader.bad_share"


def is_cut(encoded: np.ndarray) -> bool:
    """Whether a JPEG's or PNG's bytes lack the end marker. Microseconds, for it is almost always the last thing there.

    A JPEG's thumbnail has an end marker of its own: the one meant comes after the last start of a scan.
    """
    start = encoded[:2].tobytes()
    if start == b"\xff\xd8":
        if encoded[-2:].tobytes() == b"\xff\xd9":
            return False
        data = encoded.tobytes()
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") or b"\xff\xd9" not in data
    if start == b"\x89P":
        return encoded[-len(PNG_END) :].tobytes() != PNG_END and PNG_END not in encoded.tobytes()
    return False


__all__ = ["PNG_END", "Bad", "BadImages", "is_cut"]
