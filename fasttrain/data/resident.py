"""The loader of data that fits: pixels decoded once, kept where the step is; a batch is one pass of a fused kernel.

::

    files ── decode once ── uint8, one copy a host ── (a GPU: one there) ─┐
    Order.share ── draws, a batch ahead ──────────────────────────────────┴─ crop, resize, flip, colours ── Batch

The order, the draws and what is shown for a bad image are those of the other loaders. From raw pixels its images are
FFCV's to the bit; from JPEG they are DALI's decoder's, cropped as FFCV's are: 0.2 grey levels from the plain reference.

The copy is made at the start, with a bar, and is of the files as they were then: one that changes later is told of.
Ranks of a host, loaders of a process and jobs side by side share it; it ends with the last of them.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch

from fasttrain.data import Batch
from fasttrain.data.augment import Augmentation, coloured
from fasttrain.data.damage import Bad
from fasttrain.data.finish import Memory, Mover
from fasttrain.data.pixels import Pixels, file_state
from fasttrain.data.prefetch import Decoded, PrefetchLoader, Workers
from fasttrain.errors import UsageError
from fasttrain.printable import printable
from fasttrain_kernels.augment.cpu import augment_cpu
from fasttrain_kernels.augment.draws import packed
from fasttrain_kernels.augment.gpu import augment_gpu

if TYPE_CHECKING:
    from fasttrain.data.catalog import Catalog
    from fasttrain.data.loader import LoaderConfig
    from fasttrain.data.order import Order

_LOOK_EVERY = 60.0  # seconds, and at an epoch's beginning, between two looks at whether files have changed

_log = logging.getLogger(__name__)


class ResidentLoader(PrefetchLoader):
    """The :class:`~fasttrain.data.loader.Loader` over :func:`~fasttrain.data.pixels.resident_pixels`."""

    def __init__(
        self,
        config: LoaderConfig,
        catalog: Catalog,
        order: Order,
        augment: Augmentation,
        pixels: Pixels,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        config.colours_on_gpu(device)  # refuses what the device cannot do
        source = ResidentSource(catalog, order, augment, pixels, rank, world)
        finish = FusedOnGpu if device.type == "cuda" else FusedOnCpu
        super().__init__(source, finish(pixels, augment, config.thread_count(), device), config, order)


class ResidentSource:
    """Which images, and what is drawn for them, no pixels: the :class:`~fasttrain.data.prefetch.Source`."""

    remedy = "restore or convert the files (a new run can leave them out after launch/prepare.py)"

    def __init__(
        self, catalog: Catalog, order: Order, augment: Augmentation, pixels: Pixels, rank: int = 0, world: int = 1
    ) -> None:
        self._catalog, self._order, self._augment, self._pixels = catalog, order, augment, pixels
        self._rank, self._world = rank, world
        self._is_bad = np.zeros(len(catalog.labels), bool)
        self._is_bad[list(pixels.bad)] = True
        self._workers = Workers(1)
        self._changed, self._next_look = False, time.monotonic() + _LOOK_EVERY
        self._planned: Future

    def seek(self, position: int, end: int | None) -> None:
        self._planned = self._workers.submit(self._plan, position)

    def produce(self, position: int) -> Decoded:
        """This rank's part of global micro-batch ``position``.

        Raises:
            UsageError: an image cannot be shown, nor can any that was drawn in its place.
        """
        decoded = self._planned.result()
        self._planned = self._workers.submit(self._plan, position + 1)
        if self._order.drop_last and position % len(self._order) == 0 and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_EVERY
            self._workers.submit(self._look_for_changes)
        return decoded

    def reading(self) -> list[str]:
        return []

    def close(self) -> None:
        self._workers.close()

    def _plan(self, position: int) -> Decoded:
        epoch, wanted = self._order.share(position, self._rank, self._world)
        ids, bad = np.array(wanted), []
        for row in np.flatnonzero(self._is_bad[ids]):
            ids[row] = self._instead(epoch, ids[row], bad)
        draws = self._augment.draw(epoch, ids, self._pixels.sizes[ids])
        return Decoded((), draws, self._catalog.labels[ids], ids, bad)

    def _instead(self, epoch: int, index: int, bad: list[Bad]) -> int:
        """The first good one of an image's :meth:`Order.candidates`; those before it are added to ``bad``."""
        tried = []
        for candidate in self._order.candidates(epoch, index):
            if not self._is_bad[candidate]:
                bad += tried
                return candidate
            tried.append(Bad(candidate, self._pixels.bad[candidate]))
        raise UsageError(f"{tried[0].complaint}, nor any of {len(tried) - 1} others: {self.remedy}")

    def _look_for_changes(self) -> None:
        """Told once: the copy is what the run goes on with."""
        if not self._changed and file_state(self._catalog, self._pixels.ids) != self._pixels.state:
            self._changed = True
            _log.warning(
                "files in '%s' have changed since they were decoded: this run goes on with what they were, one that is "
                "started or resumed from now on reads what they are",
                printable(str(self._catalog.root)),
            )


class FusedOnCpu:
    """The fused kernel, slices of the batch on several threads: a :class:`~fasttrain.data.prefetch.Finish`."""

    def __init__(self, pixels: Pixels, augment: Augmentation, threads: int, device: torch.device) -> None:
        self._pixels, self._data, self._size = pixels, pixels.data.numpy(), augment.size
        self._type = np.float32 if coloured(augment) else np.uint8
        self._workers, self._memory, self._move = Workers(threads), Memory(), Mover(device)

    def __call__(self, decoded: Decoded) -> Batch:
        ids, draws = decoded.ids, decoded.draws
        images = self._memory.take((draws.flip.shape[1], len(ids), self._size, self._size, 3), self._type)
        starts, sizes = self._pixels.starts[ids], self._pixels.sizes[ids]

        out = images.numpy()

        def work(part: slice) -> None:
            augment_cpu(self._data, starts[part], sizes[part], draws.take(part), out, part.start)

        for done in self._workers.over_slices(work, len(ids)):
            done.result()
        return self._move(images, decoded)

    def close(self) -> None:
        self._workers.close()


class FusedOnGpu:
    """The fused kernel on a stream of its own: a :class:`~fasttrain.data.prefetch.Finish`."""

    def __init__(self, pixels: Pixels, augment: Augmentation, threads: int, device: torch.device) -> None:
        self._pixels, self._size, self._device, self._move = pixels, augment.size, device, Mover(device)
        self._type = torch.float32 if coloured(augment) else torch.uint8

    def __call__(self, decoded: Decoded) -> Batch:
        with self._move.stream():
            drawn = (self._pixels.starts[decoded.ids], self._pixels.sizes[decoded.ids], packed(decoded.draws))
            starts, sizes, table = (self._move.tensor(torch.from_numpy(array)) for array in drawn)
            shape = (*table.shape[:2], self._size, self._size, 3)
            images = torch.empty(shape, dtype=self._type, device=self._device)
            augment_gpu(self._pixels.data, starts, sizes, table, images)
            return self._move(images, decoded)

    def close(self) -> None: ...


__all__ = ["FusedOnCpu", "FusedOnGpu", "ResidentLoader", "ResidentSource"]
