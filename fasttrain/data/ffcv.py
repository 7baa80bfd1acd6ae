"""The loader over FFCV files: our order, our crop boxes, one decode for all views.

::

    Order.share ── draws ── memory map ── decode once (JPEG) ── V x crop, resize, flip ── Decoded
    `─ a batch ahead ──´    `──────────── slices of the batch, without the GIL ─────´

FFCV's own ``Loader`` is not used: its order is its own, its augmentations are not seeded, it decodes an image once a
view, and its crop-resize (OpenCV's INTER_AREA) hardly interpolates where it enlarges, which ``fasttrain_kernels``'s,
antialiased bilinear like torchvision's, does. Nor are its memory managers: they keep a Python set for each sample and
change a type object that all of numba shares (functions compiled before are no longer found).

Mean absolute difference to the plain reference over SimCLR's crops, in grey levels at 32 and 224 pixels: 0.15 and 0.16
from raw pixels (at most 1), 1.0 and 1.0 from JPEG (the DCT); INTER_AREA's would be 2.1 and 1.4 (at most 56 and 138).
Core time for two views without colours, beside ``ffcv.loader.Loader`` in the same run: CIFAR-10 27 against 41 us from
JPEG, 14 against 17 us raw; Imagenette at 224 0.59 against 0.93 ms from JPEG (loader_cpu_2026-11-28.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from fasttrain.data.augment import coloured
from fasttrain.data.beton import Beton, decode_payload, has_size, jit, open_beton
from fasttrain.data.catalog import Catalog
from fasttrain.data.damage import Bad
from fasttrain.data.finish import FinishOnCpu, FinishOnGpu
from fasttrain.data.prefetch import Decoded, PrefetchLoader, Workers
from fasttrain.errors import UsageError
from fasttrain_kernels.augment.crop import crop_memory, crop_view

if TYPE_CHECKING:
    from fasttrain.data.augment import Augmentation, Draws
    from fasttrain.data.loader import LoaderConfig
    from fasttrain.data.order import Order


class FfcvLoader(PrefetchLoader):
    """The :class:`~fasttrain.data.loader.Loader` of a ``.beton`` catalogue, on the CPU's cores.

    Raises:
        UsageError: the catalogue is no FFCV file, ffcv is missing, or the file is damaged.
    """

    def __init__(
        self,
        config: LoaderConfig,
        catalog: Catalog,
        order: Order,
        augment: Augmentation,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if catalog.beton is None:
            raise UsageError(
                f"loader.kind=ffcv reads .beton files, and '{catalog.root}' is none: write one with launch/prepare.py, "
                f"or set loader.kind=dali"
            )
        beton = open_beton(catalog.beton)
        source = FfcvSource(beton, order, augment, config.thread_count(), rank, world)
        colours, threads = coloured(augment), config.thread_count()
        on_gpu = config.colours_on_gpu(device)
        finish = FinishOnGpu(colours, device) if on_gpu else FinishOnCpu(colours, device, threads)
        super().__init__(source, finish, config, order)


class FfcvSource:
    """One rank's views, decoded by a few threads: the :class:`~fasttrain.data.prefetch.Source`."""

    remedy = "write the file again with launch/prepare.py"

    def __init__(
        self, beton: Beton, order: Order, augment: Augmentation, threads: int, rank: int = 0, world: int = 1
    ) -> None:
        missing = np.setdiff1d(order.indices, beton.samples["id"], assume_unique=True)
        if len(missing):
            raise UsageError(f"'{beton.path}' lacks {len(missing):,} samples of the order, the first is {missing[0]}")
        self._beton, self._order, self._augment, self._rank, self._world = beton, order, augment, rank, world
        most = -(-order.batch // world)
        self._views = np.empty((augment.views, most, augment.size, augment.size, 3), np.uint8)
        self._damaged = np.zeros(most, np.bool_)
        self._workers = Workers(threads)
        self._file = open(beton.path, "rb")  # noqa: SIM115  (to ask for its size as long as the source lives)
        self._decode(slice(0, 0), *self._plan(np.zeros(0, np.int64), epoch=0))  # compiles: seconds, the first time ever

    def seek(self, position: int, end: int | None) -> None:
        self._planned = self._workers.submit(self._plan_share, position)

    def produce(self, position: int) -> Decoded:
        """This rank's part of global micro-batch ``position``; its views are overwritten by the next call.

        Raises:
            UsageError: the file was cut, so that reading the memory map would kill the process; or no payload decodes.
        """
        if (size := os.fstat(self._file.fileno()).st_size) < len(self._beton.data):
            raise UsageError(
                f"'{self._beton.path}' was cut to {size:,} bytes, from {len(self._beton.data):,}, while it was read: "
                f"{self.remedy}"
            )
        epoch, samples, draws = self._planned.result()
        parts = self._workers.over_slices(lambda part: self._decode(part, samples, draws), len(samples))
        self._planned = self._workers.submit(self._plan_share, position + 1)  # by the thread that is done first
        for part in parts:
            part.result()
        bad = [
            damaged
            for row in np.flatnonzero(self._damaged[: len(samples)])
            for damaged in self._replace(row, epoch, samples, draws)
        ]
        return Decoded(self._views[:, : len(samples)], draws, samples["label"], samples["id"], bad)

    def _replace(self, row: int, epoch: int, samples: np.ndarray, draws: Draws) -> list[Bad]:
        """Put the first sample that decodes into ``row`` of the batch; returns those that do not."""
        bad = []
        for candidate in self._order.candidates(epoch, samples["id"][row]):
            if bad:
                samples[row : row + 1], drawn = self._plan(np.array([candidate]), epoch)
                for field, value in zip(draws, drawn, strict=True):
                    field[row] = value[0]
                self._decode(slice(row, row + 1), samples, draws)
                if not self._damaged[row]:
                    return bad
            bad.append(Bad(candidate, f"'{self._beton.path}' is damaged: sample {candidate} does not decode"))
        raise UsageError(f"{bad[0].complaint}, nor do {len(bad) - 1} others: {self.remedy}")

    def reading(self) -> list[str]:
        return [str(self._beton.path)]

    def close(self) -> None:
        self._workers.close()
        self._file.close()

    def _plan_share(self, position: int) -> tuple[int, np.ndarray, Draws]:
        epoch, ids = self._order.share(position, self._rank, self._world)
        return epoch, *self._plan(ids, epoch)

    def _plan(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, Draws]:
        samples = self._beton.samples[np.searchsorted(self._beton.samples["id"], ids)]
        return samples, self._augment.draw(epoch, ids, np.stack([samples["height"], samples["width"]], axis=1))

    def _decode(self, part: slice, samples: np.ndarray, draws: Draws) -> None:
        """Fill ``part`` of the views, on the calling thread, without the GIL."""
        first, last = part.start, part.stop
        _decode_views(self._beton.data, samples, draws.boxes, draws.flip, first, last, self._views, self._damaged)


# The pixels --------------------------------------------------------------------------------------------------------


@jit
def _decode_views(data, samples, boxes, flip, first, last, views, damaged):
    """Samples ``first`` to ``last`` of a batch: decode once, crop, resize and flip into ``views[:, n]``.

    One whose payload is not of the size in the file's tables, for which its boxes are drawn, is damaged.
    """
    longest, largest = 1, 0
    for n in range(first, last):
        damaged[n] = not has_size(data, samples[n])
        if not damaged[n]:
            longest = max(longest, samples[n].height, samples[n].width)
            largest = max(largest, samples[n].height * samples[n].width * 3)
    decoded = np.empty(largest, np.uint8)
    memory = crop_memory(views.shape[2], longest)
    for n in range(first, last):
        damaged[n] = damaged[n] or not decode_payload(data, samples[n], decoded)
        if damaged[n]:
            continue
        height, width = samples[n].height, samples[n].width
        for v in range(views.shape[0]):
            if samples[n].jpeg:
                pixels = decoded[: height * width * 3].reshape(height, 3 * width)
                crop_view(pixels, boxes[n, v], flip[n, v], memory, views[v, n])
            else:  # not one variable for both: to numba, writable memory and a read-only file are two types
                stored = data[samples[n].start : samples[n].start + samples[n].nbytes].reshape(height, 3 * width)
                crop_view(stored, boxes[n, v], flip[n, v], memory, views[v, n])


__all__ = ["FfcvLoader", "FfcvSource"]
