"""NVIDIA DALI decodes, and on a GPU crops, resizes and flips; the order and what is drawn are ours.

::

    Order.share ── threads read files ── draws ── external_source ── decode ─┬─ a CPU: Whole, for the fused kernel
                   `_AHEAD` batches ahead         one pipeline for the       └─ a GPU: V x resize(ROI), Decoded
                                                  whole run, `_DEPTH` batches in it
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fasttrain.data.augment import coloured
from fasttrain.data.contents import Rows, contents_of
from fasttrain.data.damage import Bad, is_cut
from fasttrain.data.finish import FinishOnGpu
from fasttrain.data.header import header_size
from fasttrain.data.pipelines import Images, OnCpu, OnGpu, Undecoded
from fasttrain.data.prefetch import Decoded, PrefetchLoader, Workers, slices
from fasttrain.data.uncropped import CropOnCpu, Uncropped, Whole
from fasttrain.data.verify import examine
from fasttrain.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fasttrain.data.augment import Augmentation
    from fasttrain.data.catalog import Catalog
    from fasttrain.data.loader import LoaderConfig
    from fasttrain.data.order import Order
    from fasttrain.data.pipelines import Decoding

_READERS = 4  # threads that read files, at least: they wait more than they work
_AHEAD = 3  # batches whose files are being read beyond those that DALI has
_DEPTH = 2  # batches that DALI works on while the colours of the one before are changed
_ONLY_HERE = "DALI's decoder refuses it in this run, though not by itself on a CPU"


class DaliLoader(PrefetchLoader):
    """The :class:`~fasttrain.data.loader.Loader` of image files and pixel arrays, on the CPU or the GPU."""

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
        if catalog.beton is not None:
            raise UsageError(f"loader.kind=dali cannot read '{catalog.beton}': set loader.kind=ffcv")
        on_gpu, threads = config.colours_on_gpu(device), config.thread_count()
        decoding = device if on_gpu else torch.device("cpu")
        source = DaliSource(catalog, order, augment, decoding, threads, rank, world)
        finish = FinishOnGpu(coloured(augment), device) if on_gpu else CropOnCpu(augment, device, threads)
        super().__init__(source, finish, config, order)


class DaliSource:
    """One rank's images: the :class:`~fasttrain.data.prefetch.Source`.

    DALI refuses all further work after one image that it cannot decode. What reading shows to be bad never reaches it;
    for what does, the batches that it has are tried one image at a time, and all but the bad go to a new pipeline.
    Boxes are drawn for the size that a file's header says. Should DALI's be another, the image is as bad as those. None
    such reaches a crop: that would not ask where an image ends, and read whatever memory holds.
    """

    remedy = "restore or convert the files (a new run can leave them out after launch/prepare.py)"

    def __init__(
        self,
        catalog: Catalog,
        order: Order,
        augment: Augmentation,
        device: torch.device,
        threads: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._catalog, self._order, self._augment = catalog, order, augment
        self._gpu: int | None = None
        if device.type == "cuda":
            self._gpu = torch.cuda.current_device() if device.index is None else device.index
        self._threads, self._rank, self._world = threads, rank, world
        self._readers, self._contents = Workers(max(_READERS, threads)), contents_of(catalog)
        self._decoding: Decoding | None = None  # built with the first batch, then used for the whole run
        self._undecodable: dict[tuple[int, int], str] = {}  # (epoch, id) -> what DALI failed on
        self._reads: deque[_Read] = deque()
        self._running: deque[_Running] = deque()
        self._next, self._end = 0, None

    def seek(self, position: int, end: int | None) -> None:
        self._reads.clear()
        self._next, self._end = position, end
        try:
            while self._running:
                self._collect()
                self._running.popleft()
        except RuntimeError:  # of a batch that nobody waits for any more
            self._give_up()

    def produce(self, position: int) -> Decoded | Uncropped:
        """This rank's part of global micro-batch ``position``.

        Raises:
            UsageError: an image cannot be shown, nor can any that was drawn in its place.
        """
        while True:
            try:
                while len(self._running) < _DEPTH + 1 and self._read_ahead():
                    self._start()
                made = self._collect()
            except Exception as error:
                broken = self._give_up()
                if not isinstance(error, RuntimeError) or not self._find_undecodable(broken):
                    raise
                self._reads.extendleft(self._submit(batch.epoch, batch.wanted) for batch in reversed(broken))
                continue
            images = self._running.popleft().images
            shown = (self._catalog.labels[images.ids], images.ids, images.bad)
            return Uncropped(made, *shown) if isinstance(made, Whole) else Decoded(made, images.draws, *shown)

    def reading(self) -> list[str]:
        return [self._catalog.path(i) for read in list(self._reads) for i in read.wanted[~read.rows.done]]

    def close(self) -> None:
        self._readers.close()
        self._give_up()

    def _give_up(self) -> list[_Running]:
        """Have the next batch build a new pipeline; returns what the old one was working on."""
        running, self._running, self._decoding = list(self._running), deque(), None
        return running

    def _read_ahead(self) -> bool:
        """Have the files of the next batches read; False when there is no batch left."""
        while len(self._reads) < _AHEAD and (self._end is None or self._next < self._end):
            self._reads.append(self._submit(*self._order.share(self._next, self._rank, self._world)))
            self._next += 1
        return bool(self._reads)

    def _submit(self, epoch: int, ids: np.ndarray) -> _Read:
        for _, index in filter(lambda known: known[0] == epoch, self._undecodable):
            self._contents.forget(index)
        rows = self._contents.rows(ids)
        parts = slices(len(ids), self._readers.count)
        parts = [self._readers.submit(self._read_part, epoch, ids, rows, part) for part in parts]
        return _Read(epoch, ids, rows, parts)

    def _read_part(self, epoch: int, ids: np.ndarray, rows: Rows, part: slice) -> dict[int, _Image]:
        """Fill ``part`` of the rows; what stands in the places that :class:`Contents` leaves."""
        others = {}
        for place in self._contents.read(ids, rows, part):
            others[place] = self._read(epoch, int(ids[place]))
            rows.done[place] = True
        return others

    def _read(self, epoch: int, index: int) -> _Image:
        """Sample ``index``, or the first good one of its :meth:`Order.candidates`."""
        bad = []
        for candidate in self._order.candidates(epoch, index):
            try:
                return _Image(candidate, *self._read_sound(epoch, candidate), bad)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                bad.append(Bad(candidate, f"cannot decode '{self._catalog.path(candidate)}' ({reason})"))
        raise UsageError(f"{bad[0].complaint}, nor any of {len(bad) - 1} others: {self.remedy}")

    def _read_sound(self, epoch: int, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """What the catalogue has of a sample, and its size.

        Raises:
            OSError, ValueError: it cannot be read, or cannot be decoded for all that is known.
        """
        content = self._catalog.read(index)
        if self._catalog.encoded:
            if not len(content):
                raise ValueError("empty file")
            size = header_size(content)
            if is_cut(content):
                raise ValueError("truncated: its end is missing")
            if reason := self._undecodable.get((epoch, index)):
                raise ValueError(reason)
            self._contents.learn(index, content)
        else:
            size = content.shape[:2]
        return content, size

    def _start(self) -> None:
        """Wait for the next batch's files and hand them to DALI."""
        read = self._reads[0]
        ids, contents, rows, bad = read.wait()
        self._reads.popleft()  # not before: `reading` names its files
        self._catalog.sizes[ids] = rows.sizes
        draws = self._augment.draw(read.epoch, ids, rows.sizes)
        images = Images(ids, contents, rows.lengths, rows.sizes, draws, bad)
        self._running.append(_Running(read.epoch, read.wanted, images))
        if len(ids):
            if self._decoding is None:
                self._decoding = self._open(-(-self._order.batch // self._world))
            self._decoding.start(images)

    def _collect(self) -> Whole | list[np.ndarray | Tensor]:
        """Wait for the first of what is running."""
        images = self._running[0].images
        if len(images.ids):
            return self._decoding.collect(images)
        if self._gpu is None:
            return Undecoded().collect(images)
        return [np.empty((0, self._augment.size, self._augment.size, 3), np.uint8)] * self._augment.views

    def _find_undecodable(self, broken: list[_Running]) -> bool:
        """Note what DALI fails on. It does not say which: all that it had goes through it again, one at a time.

        Another decoder's opinion alone would condemn images for being in flight with a bad one. Returns False where the
        failure is not the images'.
        """
        failed, sound, decoding = {}, 0, None
        for epoch, _, images in broken if self._catalog.encoded else ():
            for row, index in enumerate(images.ids.tolist()):
                try:
                    decoding = decoding or self._open(1)
                    decoding.start(images.only(row))
                    decoding.collect(images.only(row))
                    sound += 1
                except RuntimeError:
                    (finding,), decoding = examine([images.contents[row][: images.lengths[row]]]), None
                    failed[epoch, index] = finding if isinstance(finding, str) else _ONLY_HERE
        if not sound and _ONLY_HERE in failed.values():
            return False
        self._undecodable |= failed
        return bool(failed)

    def _open(self, batch: int) -> Decoding:
        encoded, views = self._catalog.encoded, self._augment.views
        regional = encoded and views == 1
        if self._gpu is not None:
            return OnGpu(batch, self._threads, self._gpu, encoded, regional, views, self._augment.size)
        return OnCpu(batch, self._threads, regional) if encoded else Undecoded()


class _Image(NamedTuple):
    """What ``Catalog.read`` gave for a place of a batch."""

    index: int
    content: np.ndarray  # uint8: a file's bytes [size], or pixels [H, W, 3]
    size: tuple[int, int]  # (height, width) by the header
    instead_of: list[Bad]


class _Read(NamedTuple):
    """A batch whose files are being read: the futures hold what stands in places that the rows leave."""

    epoch: int
    wanted: np.ndarray  # [B] ids
    rows: Rows
    parts: list[Future]

    def wait(self) -> tuple[np.ndarray, np.ndarray | list[np.ndarray], Rows, list[Bad]]:
        """The ids that are shown, their contents, lengths and sizes, and what is not shown."""
        ids, rows = self.wanted.copy(), self.rows
        others = {place: image for part in self.parts for place, image in part.result().items()}
        contents = rows.apart() if others else rows.together()
        for place, image in others.items():
            ids[place], contents[place], rows.sizes[place] = image.index, image.content, image.size
            rows.lengths[place] = len(image.content)
        return ids, contents, rows, [bad for image in others.values() for bad in image.instead_of]


class _Running(NamedTuple):
    """A batch that DALI works on."""

    epoch: int
    wanted: np.ndarray
    images: Images
