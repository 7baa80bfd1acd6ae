"""Images on disk -> batches on the device: catalog, order, augment, and the loaders."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a loader yields: V views of B images.

    ``index`` holds the positions, in the data set's full listing, of the images that are shown. Where one turned out
    bad and another is shown instead (:mod:`fasttrain.data.damage`), index and label are the other's.
    """

    images: Tensor  # [V, B, 3, H, W] float32 in [0, 1], each image channels-last in memory
    labels: Tensor  # [B] int64
    index: Tensor  # [B] int64
    targets: Tensor | None = None  # [B, F] what a frozen reference encoder makes of the images; no loader sets it


__all__ = ["Batch"]
