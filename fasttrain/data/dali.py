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

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from fasttrain.data.contents import Rows, contents_of
from fasttrain.data.damage import Bad, is_cut
from fasttrain.data.decoder import DECODING
from fasttrain.data.finish import make_finish
from fasttrain.data.header import header_size
from fasttrain.data.prefetch import Decoded, PrefetchLoader, Workers
from fasttrain.data.verify import examine
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
        super().__init__(source, make_finish(augment.coloured, device, threads, on_gpu), config, order)


class DaliSource:
    """One rank's crops: the :class:`~fasttrain.data.prefetch.Source`.

    DALI refuses all further work after one image that it cannot decode. What reading shows to be bad never reaches it;
    for what does, the batches that it has are tried one image at a time, and all but the bad go to a new pipeline.
    Boxes are drawn for the size that a file's header says. Should DALI's be another, the image is as bad as those. None
    such reaches a resize: that would not ask where a region ends, and read whatever memory holds.
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
        self._regional = catalog.encoded and augment.views == 1
        self._readers, self._contents = Workers(max(_READERS, threads)), contents_of(catalog)
        self._pipeline: Pipeline | None = None  # built with the first batch, then used for the whole run
        self._undecodable: dict[tuple[int, int], str] = {}  # (epoch, id) -> what DALI failed on
        self._reads: deque[_Read] = deque()
        self._running: deque[_Running] = deque()
        self._next, self._end = 0, None

    def seek(self, position: int, end: int | None) -> None:
        self._reads.clear()
        self._next, self._end = position, end
        try:
            while self._running:
                self._collect(self._pipeline, self._running.popleft().images)
        except RuntimeError:  # of a batch that nobody waits for any more
            self._forget_pipeline()

    def produce(self, position: int) -> Decoded:
        """This rank's part of global micro-batch ``position``.

        Raises:
            UsageError: an image cannot be shown, nor can any that was drawn in its place.
        """
        while True:
            try:
                while len(self._running) < _DEPTH + 1 and self._read_ahead():
                    self._start(self._reads.popleft())
                views = self._collect(self._pipeline, self._running[0].images)
            except Exception as error:
                broken = self._forget_pipeline()
                if not isinstance(error, RuntimeError) or not self._find_undecodable(broken):
                    raise
                self._reads.extendleft(self._submit(batch.epoch, batch.wanted) for batch in reversed(broken))
                continue
            _, _, images, draws = self._running.popleft()
            return Decoded(views, draws, self._catalog.labels[images.ids], images.ids, images.bad)

    def reading(self) -> list[str]:
        return [self._catalog.path(i) for read in list(self._reads) for i in read.wanted[~read.rows.done]]

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
            self._reads.append(self._submit(*self._order.share(self._next, self._rank, self._world)))
            self._next += 1
        return bool(self._reads)

    def _submit(self, epoch: int, ids: np.ndarray) -> _Read:
        for _, index in filter(lambda known: known[0] == epoch, self._undecodable):
            self._contents.forget(index)
        rows = self._contents.rows(ids)
        parts = self._readers.over_slices(lambda part: self._read_part(epoch, ids, rows, part), len(ids))
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

    def _start(self, read: _Read) -> None:
        """Wait for a batch's files and hand them to DALI."""
        images = _Images.of(read)
        self._catalog.sizes[images.ids] = images.sizes
        draws = self._augment.draw(read.epoch, images.ids, images.sizes)
        self._running.append(_Running(read.epoch, read.wanted, images, draws))
        if len(images.ids):
            if self._pipeline is None:
                self._pipeline = self._build(-(-self._order.batch // self._world))
            self._feed(self._pipeline, images, draws)

    def _feed(self, pipeline: Pipeline, images: _Images, draws: Draws) -> None:
        feed = pipeline.feed_input
        feed("content", images.contents)
        if self._catalog.encoded and not self._regional:
            feed("shape", images.shapes())
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
        pipeline.schedule_run()

    def _collect(self, pipeline: Pipeline | None, images: _Images) -> list[np.ndarray | Tensor]:
        """Wait for the V views uint8 [B, size, size, 3]; the memory is DALI's, and theirs for as long as they live."""
        if not len(images.ids):
            size = self._augment.size
            return [np.empty((0, size, size, 3), np.uint8)] * self._augment.views
        outputs = [output.as_tensor() for output in pipeline.share_outputs()]
        pipeline.release_outputs()
        if self._catalog.encoded and (np.asarray(outputs.pop()) != images.shapes()).any():
            raise RuntimeError("an image has another size than its header says")
        return [np.asarray(x) if self._gpu is None else torch.from_dlpack(x) for x in outputs]

    def _find_undecodable(self, broken: list[_Running]) -> bool:
        """Note what DALI fails on. It does not say which: all that it had goes through it again, one at a time.

        Another decoder's opinion alone would condemn images for being in flight with a bad one. Returns False where the
        failure is not the images'.
        """
        failed, sound, pipeline = {}, 0, None
        for epoch, _, images, draws in broken if self._catalog.encoded else ():
            for row, index in enumerate(images.ids.tolist()):
                try:
                    pipeline = pipeline or self._build(1)
                    self._feed(pipeline, images.only(row), draws.take(slice(row, row + 1)))
                    self._collect(pipeline, images.only(row))
                    sound += 1
                except RuntimeError:
                    (finding,), pipeline = examine([images.contents[row][: images.lengths[row]]]), None
                    failed[epoch, index] = finding if isinstance(finding, str) else _ONLY_HERE
        if not sound and _ONLY_HERE in failed.values():
            return False
        self._undecodable |= failed
        return bool(failed)

    def _build(self, batch_size: int) -> Pipeline:
        decoding = dict(device="cpu", **DECODING)
        if self._gpu is not None:
            # By default a share of each batch goes to the JPEG engines and the rest to another decoder, and an image
            # could depend, by a grey level, on its place in the batch. At 1 the engines take all that they can.
            decoding |= dict(device="mixed", hw_decoder_load=1.0)

        def external(name: str, dtype: types.DALIDataType, ndim: int, **settings: Any) -> DataNode:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim, **settings)

        @pipeline_def(
            batch_size=batch_size,
            num_threads=self._threads,
            device_id=self._gpu,
            exec_dynamic=True,  # outputs live as long as they are referred to, and runs queue up beyond the depth
            prefetch_queue_depth=1,
        )
        def define() -> tuple[DataNode, ...]:
            # not copied, which feed_input would do under the lock: `_Running` keeps them until DALI is done
            content = external("content", types.UINT8, 1 if self._catalog.encoded else 3, no_copy=True)
            found = []
            if self._regional:
                corner, extent = external("corner", types.INT32, 1), external("extent", types.INT32, 1)
                images = fn.decoders.image_slice(content, start=corner, shape=extent, axes=[0, 1], **decoding)
                found.append(fn.peek_image_shape(content, adjust_orientation=False))
            elif self._catalog.encoded:
                images = fn.decoders.image(content, **decoding)
                found.append(images.shape())
                # costs nothing, and fails where there are more or fewer pixels than the header says
                images = fn.reshape(images, shape=external("shape", types.INT32, 1))
            else:
                images = content if self._gpu is None else content.gpu()
            views = [
                fn.resize(
                    images,
                    roi_start=external(f"start{view}", types.FLOAT, 1),
                    roi_end=external(f"end{view}", types.FLOAT, 1),
                    size=[self._augment.size] * 2,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for view in range(self._augment.views)
            ]
            return *views, *found

        pipeline = define()
        pipeline.build()
        return pipeline


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


class _Images(NamedTuple):
    """What is shown in a batch."""

    ids: np.ndarray  # [B] int64
    contents: np.ndarray | list[np.ndarray]  # uint8: files' bytes, perhaps padded, or pixels [H, W, 3]
    lengths: np.ndarray  # [B] of the files without their padding
    sizes: np.ndarray  # [B, 2] int32 (height, width) by the headers
    bad: list[Bad]  # what is not shown

    @staticmethod
    def of(read: _Read) -> _Images:
        """Waits until all is read."""
        ids, rows = read.wanted.copy(), read.rows
        others = {place: image for part in read.parts for place, image in part.result().items()}
        contents = rows.apart() if others else rows.together()
        for place, image in others.items():
            ids[place], contents[place], rows.sizes[place] = image.index, image.content, image.size
            rows.lengths[place] = len(image.content)
        bad = [bad for image in others.values() for bad in image.instead_of]
        return _Images(ids, contents, rows.lengths, rows.sizes, bad)

    def only(self, row: int) -> _Images:
        one = slice(row, row + 1)
        return _Images(self.ids[one], self.contents[one], self.lengths[one], self.sizes[one], [])

    def shapes(self) -> np.ndarray:
        """int32 [B, 3] (height, width, channels)."""
        return np.insert(self.sizes, 2, 3, axis=1)


class _Running(NamedTuple):
    """A batch that DALI works on."""

    epoch: int
    wanted: np.ndarray
    images: _Images
    draws: Draws
