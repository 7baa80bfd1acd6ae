"""NVIDIA DALI decodes, crops, resizes and flips; the order and what is drawn are ours.

::

    Order.share ── threads read files ── draws ── external_source ── decode ── V x resize(ROI) ── Decoded
                   `_AHEAD` batches ahead          one pipeline for the whole run, `_DEPTH` batches in it

A crop is DALI's antialiased triangle filter over a region of interest, flipped by a region whose ends are swapped. It
agrees with Pillow's to one grey level (0.17 on average), but for the crop's border, where the filter reaches the pixels
just outside the box and Pillow's, after a crop, does not: with it 0.19 on average at 224 pixels and 0.43 at 32.

With one view only its region of the JPEG is decoded, with more the image is decoded once for all. Core-milliseconds an
image for decode and crops, by region / whole:

    ==========================  ============  ============
    images -> crops             one view      two views
    ==========================  ============  ============
    Imagenette 224 -> 224       0.59 / 0.65   1.15 / 1.01
    ImageNet 393 x 464 -> 224   1.62 / 1.86   3.11 / 2.58
    CIFAR-10 (JPEG) 32 -> 32    0.029 / 0.029 0.057 / 0.042
    ==========================  ============  ============
"""

from __future__ import annotations

import io
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fasttrain.data.catalog import header_size
from fasttrain.data.prefetch import Decoded, PrefetchLoader, Workers
from fasttrain.errors import UsageError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode
    from torch import Tensor

    from fasttrain.data.augment import Augmentation, Draws
    from fasttrain.data.catalog import Catalog
    from fasttrain.data.loader import LoaderConfig
    from fasttrain.data.order import Order

_READERS = 4  # threads that read files, at least: they wait more than they work
_AHEAD = 3  # batches whose files are being read beyond those that DALI has
_DEPTH = 2  # batches that DALI works on while the colours of the one before are changed


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
        source = DaliSource(catalog, order, augment, device, config.thread_count(), rank, world)
        super().__init__(source, config, order, device)


class DaliSource:
    """One rank's crops: the :class:`~fasttrain.data.prefetch.Source`."""

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
        self._regional = catalog.encoded and augment.views == 1
        self._readers = Workers(max(_READERS, threads))
        self._pipeline: Pipeline | None = None  # built with the first batch, then used for the whole run
        self._reads: deque[_Read] = deque()
        self._running: deque[_Running] = deque()
        self._next, self._end = 0, None

    def seek(self, position: int, end: int | None) -> None:
        self._reads.clear()
        self._next, self._end = position, end
        try:
            while self._running:
                self._collect(self._running.popleft())
        except RuntimeError:  # of a batch that nobody waits for any more
            self._forget_pipeline()

    def produce(self, position: int) -> Decoded:
        try:
            while len(self._running) < _DEPTH + 1 and self._read_ahead():
                self._start(self._reads[0])
                self._reads.popleft()
            views = self._collect(self._running[0])
        except Exception as error:
            # DALI refuses all further work, and its complaint may be about any of the batches that it has.
            suspects = self._forget_pipeline()
            culprit = self._find_culprit(suspects) if isinstance(error, RuntimeError) else None
            if culprit is None:
                raise
            raise culprit from error
        current = self._running.popleft()
        return Decoded(views, current.draws, self._catalog.labels[current.ids], current.ids)

    def reading(self) -> list[str]:
        return [self._catalog.path(i) for read in list(self._reads) for i in read.unread()]

    def close(self) -> None:
        self._readers.close()
        self._forget_pipeline()

    def _forget_pipeline(self) -> list[_Running]:
        """Have the next batch build a new one; returns what the old one was working on."""
        running, self._running, self._pipeline = list(self._running), deque(), None
        return running

    def _read_ahead(self) -> bool:
        """Have the files of the next batches read; False when there is no batch left."""
        while len(self._reads) < _AHEAD and (self._end is None or self._next < self._end):
            epoch, ids = self._order.share(self._next, self._rank, self._world)
            parts = self._readers.over_slices(lambda part, ids=ids: [self._read(i) for i in ids[part]], len(ids))
            self._reads.append(_Read(epoch, ids, parts))
            self._next += 1
        return bool(self._reads)

    def _read(self, index: int) -> np.ndarray:
        try:
            return self._catalog.read(index)
        except OSError as error:
            raise _unusable(self._catalog.path(index), error.strerror or error) from None

    def _start(self, read: _Read) -> None:
        """Wait for a batch's files and hand them to DALI."""
        contents = [content for part in read.parts for content in part.result()]
        draws = self._augment.draw(read.epoch, read.ids, self._sizes(read.ids, contents))
        self._running.append(_Running(read.ids, draws, contents))
        if contents:
            self._feed(contents, draws)

    def _sizes(self, ids: np.ndarray, contents: list[np.ndarray]) -> np.ndarray:
        known = self._catalog.sizes
        for row in np.flatnonzero((known[ids] == 0).any(axis=1)):
            try:
                known[ids[row]] = header_size(contents[row]) if self._catalog.encoded else contents[row].shape[:2]
            except ValueError as error:
                raise _unusable(self._catalog.path(ids[row]), error) from None
        return known[ids]

    def _feed(self, contents: list[np.ndarray], draws: Draws) -> None:
        if self._pipeline is None:
            self._pipeline = self._build()
        feed = self._pipeline.feed_input
        feed("content", contents)
        for view in range(self._augment.views):
            corner, extent = draws.boxes[:, view, :2], draws.boxes[:, view, 2:]
            if self._regional:
                feed("corner", np.ascontiguousarray(corner))
                feed("extent", np.ascontiguousarray(extent))
                corner = np.zeros_like(corner)
            ends = np.stack([corner, corner + extent]).astype(np.float32)
            flip = draws.flip[:, view]
            ends[:, flip, 1] = ends[::-1, flip, 1]
            feed(f"start{view}", ends[0])
            feed(f"end{view}", ends[1])
        self._pipeline.schedule_run()

    def _collect(self, running: _Running) -> list[np.ndarray | Tensor]:
        """Wait for the V views uint8 [B, size, size, 3]; the memory is DALI's, and theirs for as long as they live."""
        if not running.contents:
            size = self._augment.size
            return [np.empty((0, size, size, 3), np.uint8)] * self._augment.views
        outputs = [output.as_tensor() for output in self._pipeline.share_outputs()]
        self._pipeline.release_outputs()
        return [np.asarray(x) if self._gpu is None else torch.from_dlpack(x) for x in outputs]

    def _build(self) -> Pipeline:
        # Boxes are drawn for the header's size, which knows no EXIF rotation; neither do torchvision's loaders.
        decoding = dict(device="cpu" if self._gpu is None else "mixed", output_type=types.RGB, adjust_orientation=False)

        def external(name: str, dtype: types.DALIDataType, ndim: int) -> DataNode:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        @pipeline_def(
            batch_size=-(-self._order.batch // self._world),
            num_threads=self._threads,
            device_id=self._gpu,
            exec_dynamic=True,  # outputs live as long as they are referred to, and runs queue up beyond the depth
            prefetch_queue_depth=1,
        )
        def define() -> tuple[DataNode, ...]:
            content = external("content", types.UINT8, 1 if self._catalog.encoded else 3)
            if self._regional:
                corner, extent = external("corner", types.INT32, 1), external("extent", types.INT32, 1)
                images = fn.decoders.image_slice(content, start=corner, shape=extent, axes=[0, 1], **decoding)
            elif self._catalog.encoded:
                images = fn.decoders.image(content, **decoding)
            else:
                images = content if self._gpu is None else content.gpu()
            return tuple(
                fn.resize(
                    images,
                    roi_start=external(f"start{view}", types.FLOAT, 1),
                    roi_end=external(f"end{view}", types.FLOAT, 1),
                    size=[self._augment.size] * 2,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for view in range(self._augment.views)
            )

        pipeline = define()
        pipeline.build()
        return pipeline

    def _find_culprit(self, suspects: list[_Running]) -> UsageError | None:
        """DALI does not say which file it failed on: decode them one by one."""
        for running in suspects if self._catalog.encoded else ():
            for index, content in zip(running.ids, running.contents, strict=True):
                try:
                    Image.open(io.BytesIO(content)).convert("RGB")
                except Exception as error:  # Pillow's decoders raise many kinds
                    return _unusable(self._catalog.path(index), error)
        return None


class _Read(NamedTuple):
    """A batch whose files are being read: the futures hold lists of arrays, in the order of the ids."""

    epoch: int
    ids: np.ndarray
    parts: list[Future]

    def unread(self) -> list[int]:
        parts = np.array_split(self.ids, max(1, len(self.parts)))
        return [int(i) for ids, part in zip(parts, self.parts, strict=False) if not part.done() for i in ids]


class _Running(NamedTuple):
    """A batch that DALI works on."""

    ids: np.ndarray
    draws: Draws
    contents: list[np.ndarray]


def _unusable(path: str, reason: object) -> UsageError:
    return UsageError(
        f"cannot decode '{path}' ({reason}): run launch/prepare.py, which finds and leaves out such files"
    )
