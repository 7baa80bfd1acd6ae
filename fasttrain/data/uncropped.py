"""Decoded images -> the batch: crop, resize, flip and colours in one pass of a fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fasttrain.data.augment import coloured
from fasttrain.data.finish import Memory, Mover
from fasttrain.data.prefetch import Workers, slices
from fasttrain_kernels.augment.cpu import augment_cpu
from fasttrain_kernels.augment.draws import packed
from fasttrain_kernels.augment.gpu import augment_gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fasttrain.data import Batch
    from fasttrain.data.augment import Augmentation, Draws
    from fasttrain.data.damage import Bad


class Whole(NamedTuple):
    """Images that are not cropped yet, in one piece of memory."""

    pixels: np.ndarray | Tensor  # uint8 [bytes], where they are cropped: image n is [H, W, 3] from starts[n] on
    starts: np.ndarray  # [B] int64
    sizes: np.ndarray  # [B, 2] int32 (height, width)
    draws: Draws  # [B, V], their boxes within these sizes

    @staticmethod
    def of(pixels: np.ndarray, sizes: np.ndarray, draws: Draws) -> Whole:
        nbytes = 3 * sizes.prod(axis=1, dtype=np.int64)
        return Whole(pixels, np.cumsum(nbytes) - nbytes, sizes, draws)


class Uncropped(NamedTuple):
    """A :class:`~fasttrain.data.prefetch.Decoded` whose views are not made yet."""

    whole: Whole
    labels: np.ndarray  # [B] int64
    ids: np.ndarray  # [B] int64, of the images shown
    bad: Sequence[Bad] = ()  # those that cannot be


class CropOnCpu:
    """Slices of the batch on several threads."""

    def __init__(self, augment: Augmentation, device: torch.device, threads: int) -> None:
        self._size, self._type = augment.size, np.float32 if coloured(augment) else np.uint8
        self._workers, self._memory, self._move = Workers(threads), Memory(), Mover(device)

    def __call__(self, decoded: Uncropped) -> Batch:
        pixels, starts, sizes, draws = decoded.whole
        images = self._memory.take((draws.flip.shape[1], len(starts), self._size, self._size, 3), self._type)
        out = images.numpy()

        def work(part: slice) -> None:
            augment_cpu(pixels, starts[part], sizes[part], draws.take(part), out, part.start)

        for done in [self._workers.submit(work, part) for part in slices(len(starts), self._workers.count)]:
            done.result()
        return self._move(images, decoded)

    def close(self) -> None:
        self._workers.close()


class CropOnGpu:
    """On a stream of its own."""

    def __init__(self, augment: Augmentation, device: torch.device) -> None:
        self._size, self._type = augment.size, torch.float32 if coloured(augment) else torch.uint8
        self._move = Mover(device)

    def __call__(self, decoded: Uncropped) -> Batch:
        pixels, *drawn = decoded.whole
        with self._move.stream():
            places = (*drawn[:2], packed(drawn[2]))
            starts, sizes, table = (self._move.tensor(torch.from_numpy(array)) for array in places)
            shape = (*table.shape[:2], self._size, self._size, 3)
            images = torch.empty(shape, dtype=self._type, device=pixels.device)
            augment_gpu(pixels, starts, sizes, table, images)
            return self._move(images, decoded)

    def close(self) -> None: ...


__all__ = ["CropOnCpu", "CropOnGpu", "Uncropped", "Whole"]
