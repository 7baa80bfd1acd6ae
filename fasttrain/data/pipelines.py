"""What DALI does with a batch's contents: on a CPU it decodes, on a GPU it decodes, crops, resizes and flips.

On a CPU the crops are our own kernel's (``uncropped.py``): one of 224 pixels takes DALI 0.59 ms of a core there, beside
0.24 ms for decoding the image, and the kernel 0.18 ms. On a GPU a crop is DALI's antialiased triangle filter
over a region of interest, flipped by a region whose ends are swapped. It agrees with Pillow's to one grey level (0.17
on average), but for the crop's border, where the filter reaches the pixels just outside the box and Pillow's, after a
crop, does not: with it 0.19 on average at 224 pixels and 0.43 at 32.

With one view only its region of a file is decoded, with more the image is decoded once for all. Core-milliseconds an
image on a CPU, for one view by region / whole: Imagenette at 224 0.41 / 0.45, 400 x 500 pixels at 224 1.21 / 1.49,
CIFAR-10 (JPEG) 0.038 / 0.033.

Tried for batches of 512 and left out: all views' regions as one input, which DALI splits, saves 0.1 ms of the lock and
takes 2.6 ms of the cores; all views as one output is a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from fasttrain.data.decoder import DECODING
from fasttrain.data.uncropped import Whole

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.tensors import TensorListCPU, TensorListGPU
    from torch import Tensor

    from fasttrain.data.augment import Draws
    from fasttrain.data.damage import Bad


_MIXED = dict(device="mixed", hw_decoder_load=1.0)
"""On a GPU. By default a share of each batch goes to the JPEG engines, the rest to another decoder, and an image could
depend, by a grey level, on its place in the batch. At 1 the engines take all that they can."""


class Images(NamedTuple):
    """What is shown in a batch."""

    ids: np.ndarray  # [B] int64
    contents: np.ndarray | list[np.ndarray]  # uint8: files' bytes, perhaps padded, or pixels [H, W, 3]
    lengths: np.ndarray  # [B] of the files without their padding
    sizes: np.ndarray  # [B, 2] int32 (height, width) by the headers
    draws: Draws  # [B, V]
    bad: list[Bad]  # what is not shown

    def only(self, row: int) -> Images:
        one = slice(row, row + 1)
        fields = (self.ids[one], self.contents[one], self.lengths[one], self.sizes[one], self.draws.take(one))
        return Images(*fields, [])


class Decoding(Protocol):
    """Batches on their way through DALI. After an error the next one goes to another."""

    def start(self, images: Images) -> None:
        """Their contents are not copied, which ``feed_input`` would do under the interpreter's lock: the caller keeps
        them until they are collected."""
        ...

    def collect(self, images: Images) -> Whole | list[Tensor]:
        """Wait for what was started first; the memory is DALI's, and the result's for as long as it lives.

        Raises:
            RuntimeError: an image cannot be decoded, or has another size than its header says.
        """
        ...


class Undecoded:
    """No work: these are pixels, to be cropped on a CPU."""

    def start(self, images: Images) -> None: ...

    def collect(self, images: Images) -> Whole:
        pixels = images.contents
        if isinstance(pixels, list):
            pixels = np.concatenate([np.zeros(0, np.uint8), *(image.reshape(-1) for image in pixels)])
        return Whole.of(pixels.reshape(-1), images.sizes, images.draws)


class _Pipeline(ABC):
    """One of DALI's, whose inputs are fed by name."""

    def __init__(self, batch: int, threads: int, gpu: int | None) -> None:
        self._pipeline = pipeline_def(
            batch_size=batch,
            num_threads=threads,
            device_id=gpu,
            exec_dynamic=True,  # outputs live as long as they are referred to, and runs queue up beyond the depth
            prefetch_queue_depth=1,
        )(self._define)()
        self._pipeline.build()

    @abstractmethod
    def _define(self) -> tuple[DataNode, ...]:
        """Its operators."""

    def _contents(self, ndim: int = 1) -> DataNode:
        return _external("content", types.UINT8, ndim, no_copy=True)

    def _outputs(self) -> list[TensorListCPU | TensorListGPU]:
        outputs = self._pipeline.share_outputs()
        self._pipeline.release_outputs()
        return list(outputs)


class OnCpu(_Pipeline):
    """Decodes files, to be cropped on the CPU too."""

    def __init__(self, batch: int, threads: int, regional: bool) -> None:
        self._regional = regional
        super().__init__(batch, threads, None)

    def _define(self) -> tuple[DataNode, ...]:
        content = self._contents()
        if self._regional:
            return _region(content, device="cpu")
        return (fn.decoders.image(content, device="cpu", **DECODING),)

    def start(self, images: Images) -> None:
        self._pipeline.feed_input("content", images.contents)
        if self._regional:
            _feed_region(self._pipeline, images.draws)
        self._pipeline.schedule_run()

    def collect(self, images: Images) -> Whole:
        decoded, *found = self._outputs()
        shapes, sizes, draws = np.array(decoded.shape(), np.int32), images.sizes, images.draws
        if self._regional:
            _check(np.asarray(found[0].as_tensor())[:, :2], sizes)
            sizes = np.ascontiguousarray(draws.boxes[:, 0, 2:])
            draws = draws._replace(boxes=np.concatenate([np.zeros_like(sizes), sizes], axis=1)[:, None])
        _check(shapes[:, :2], sizes)
        pixels = np.asarray(decoded.as_reshaped_tensor([int(shapes.prod(axis=1, dtype=np.int64).sum())]))
        return Whole.of(pixels, sizes, draws)


class OnGpu(_Pipeline):
    """Decodes files, or takes pixels, and makes V views uint8 [B, size, size, 3]."""

    def __init__(
        self, batch: int, threads: int, gpu: int, encoded: bool, regional: bool, views: int, size: int
    ) -> None:
        self._encoded, self._regional, self._views, self._size = encoded, regional, views, size
        super().__init__(batch, threads, gpu)

    def _define(self) -> tuple[DataNode, ...]:
        content, found = self._contents(1 if self._encoded else 3), []
        if self._regional:
            images, *found = _region(content, **_MIXED)
        elif self._encoded:
            images = fn.decoders.image(content, **_MIXED, **DECODING)
            found = [images.shape()]
            # costs nothing, and fails where there are more or fewer pixels than the header says
            images = fn.reshape(images, shape=_external("shape", types.INT32, 1))
        else:
            images = content.gpu()
        views = [
            fn.resize(
                images,
                roi_start=_external(f"start{view}", types.FLOAT, 1),
                roi_end=_external(f"end{view}", types.FLOAT, 1),
                size=[self._size] * 2,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            for view in range(self._views)
        ]
        return *views, *found

    def start(self, images: Images) -> None:
        feed, draws = self._pipeline.feed_input, images.draws
        feed("content", images.contents)
        if self._regional:
            _feed_region(self._pipeline, draws)
        elif self._encoded:
            feed("shape", np.insert(images.sizes, 2, 3, axis=1))
        for view in range(self._views):
            corner, extent = draws.boxes[:, view, :2], draws.boxes[:, view, 2:]
            if self._regional:
                corner = np.zeros_like(corner)
            ends = np.stack([corner, corner + extent]).astype(np.float32)
            flip = draws.flip[:, view]
            ends[:, flip, 1] = ends[::-1, flip, 1]
            feed(f"start{view}", ends[0])
            feed(f"end{view}", ends[1])
        self._pipeline.schedule_run()

    def collect(self, images: Images) -> list[Tensor]:
        outputs = [output.as_tensor() for output in self._outputs()]
        if self._encoded:
            _check(np.asarray(outputs.pop())[:, :2], images.sizes)
        return [torch.from_dlpack(view) for view in outputs]


def _external(name: str, dtype: types.DALIDataType, ndim: int, **settings: Any) -> DataNode:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, **settings)


def _region(content: DataNode, **decoding: Any) -> tuple[DataNode, DataNode]:
    """The only view's region, and the whole image's shape."""
    corner, extent = _external("corner", types.INT32, 1), _external("extent", types.INT32, 1)
    images = fn.decoders.image_slice(content, start=corner, shape=extent, axes=[0, 1], **decoding, **DECODING)
    return images, fn.peek_image_shape(content, adjust_orientation=False)


def _feed_region(pipeline: Pipeline, draws: Draws) -> None:
    pipeline.feed_input("corner", np.ascontiguousarray(draws.boxes[:, 0, :2]))
    pipeline.feed_input("extent", np.ascontiguousarray(draws.boxes[:, 0, 2:]))


def _check(found: np.ndarray, said: np.ndarray) -> None:
    if (found != said).any():
        raise RuntimeError("an image has another size than its header says")


__all__ = ["Decoding", "Images", "OnCpu", "OnGpu", "Undecoded"]
