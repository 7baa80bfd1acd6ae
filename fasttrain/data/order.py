"""The order of samples: a pure function of (seed, epoch), cut into batches by the global position alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fasttrain.errors import UsageError

_DOMAIN = 0x6F72646572000000  # "order": the same seed draws something else here than in the augmentation
_INSTEAD = 0x696E737465616400  # "instead": and else again for what replaces a bad image

TRIES = 100
"""Candidates for a place: with half of the images bad all would be so once in 10^30 times."""


@dataclass(frozen=True, eq=False)
class Order:
    """Which samples make up which global micro-batch, for every world size the same.

    In epoch e the samples are sorted by random 64-bit keys. The key of sample i is the i-th output of the counter-based
    generator Philox4x64-10 keyed by the two, whatever the other samples are: leaving one out does not move the rest
    against each other. Any position is reached in O(1) once the epoch's order is known, which takes one sort.

    Args:
        indices: [n] ids of the samples that may be used, sorted (:attr:`Catalog.indices`).
        seed: of the run.
        batch: samples in a global micro-batch, all ranks together.
        accumulation: micro-batches to an optimiser step; an epoch of training is a whole number of steps.
        shuffle: off, every epoch goes through ``indices`` as they are.
        drop_last: training drops the samples that do not fill the last step; evaluation keeps them.

    Raises:
        UsageError: an epoch would have no step.
    """

    indices: np.ndarray
    seed: int
    batch: int
    accumulation: int = 1
    shuffle: bool = True
    drop_last: bool = True
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.indices) == 0:
            raise UsageError("the data set has no usable image")
        if self.drop_last and len(self) == 0:
            step = self.batch * self.accumulation
            times = f" ({self.batch} x {self.accumulation} accumulated micro-batches)" if self.accumulation > 1 else ""
            raise UsageError(
                f"a batch of {step}{times} is larger than the data set's {len(self.indices)} images: "
                f"lower it to at most {len(self.indices)}, or give more images"
            )

    def __len__(self) -> int:
        """Global micro-batches in an epoch."""
        if not self.drop_last:
            return -(-len(self.indices) // self.batch)
        return len(self.indices) // (self.batch * self.accumulation) * self.accumulation

    def at(self, position: int) -> tuple[int, np.ndarray]:
        """The epoch and the ids [<= batch] of the ``position``-th micro-batch since the start of the run."""
        epoch, step = divmod(position, len(self))
        return epoch, self._epoch(epoch)[step * self.batch : (step + 1) * self.batch]

    def share(self, position: int, rank: int, world: int) -> tuple[int, np.ndarray]:
        """The part of :meth:`at` that ``rank`` of ``world`` takes: contiguous, and split as ``np.array_split`` would.

        Raises:
            UsageError: in training, ranks would get unequal parts, whose means no average over the ranks puts right.
        """
        if self.drop_last and self.batch % world:
            raise UsageError(
                f"a micro-batch of {self.batch} does not divide among {world} ranks: use a multiple of {world}"
            )
        epoch, ids = self.at(position)
        size, longer = divmod(len(ids), world)
        start = rank * size + min(rank, longer)
        return epoch, ids[start : start + size + (rank < longer)]

    def candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The ids to try in turn for the place of sample ``index``: itself, then up to ``TRIES`` at random.

        They are uniform over the samples: outputs of Philox keyed by seed and epoch, with ``index`` in the counter.
        """
        yield int(index)
        generator = np.random.Philox(
            key=np.array([self.seed, _INSTEAD + epoch], np.uint64), counter=np.array([0, index, 0, 0], np.uint64)
        )
        for word in generator.random_raw(TRIES):
            yield int(self.indices[word % np.uint64(len(self.indices))])

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self.indices
        order = self._epochs.get(epoch)
        if order is None:
            order = self.indices[np.argsort(_keys(self.seed, epoch, self.indices), kind="stable")]
            order.setflags(write=False)
            # Prefetching threads straddle the end of an epoch, so its neighbours stay; one assignment, so no lock.
            near = {other: ids for other, ids in self._epochs.items() if abs(other - epoch) == 1}
            object.__setattr__(self, "_epochs", {**near, epoch: order})
        return order


def _keys(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    generator = np.random.Philox(key=np.array([seed, _DOMAIN + epoch], np.uint64))
    return generator.random_raw(int(indices[-1]) + 1)[indices]


__all__ = ["TRIES", "Order"]
