"""Images that DALI decoded on a CPU -> the batch: crop, resize, flip and colours in one pass of the fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fasttrain.data.augment import coloured
from fasttrain.data.contents import slices
from fasttrain.data.finish import Memory, Mover
from fasttrain.data.prefetch import Workers
from fasttrain_kernels.augment.cpu import augment_cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fasttrain.data import Batch
    from fasttrain.data.augment import Augmentation
    from fasttrain.data.damage import Bad
    from fasttrain.data.pipelines import Whole


class Uncropped(NamedTuple):
    """A :class:`~fasttrain.data.prefetch.Decoded` whose views are not made yet."""

    whole: Whole
    labels: np.ndarray  # [B] int64
    ids: np.ndarray  # [B] int64, of the images shown
    bad: Sequence[Bad] = ()  # those that cannot be


class FinishUncropped:
    """Slices of the batch on several threads: a :class:`~fasttrain.data.prefetch.Finish`."""

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


__all__ = ["FinishUncropped", "Uncropped"]
