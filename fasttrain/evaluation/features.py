"""Features of a data set, each rank holding those of its own share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.data import Batch
from fasttrain.errors import UsageError


class Features(NamedTuple):
    """This rank's n samples; ``index`` is each one's position in the data set."""

    features: Tensor  # [n, F] float32
    labels: Tensor  # [n] int64
    index: Tensor  # [n] int64


@torch.no_grad()
def extract(
    encode: nn.Module, batches: Iterable[Batch], device: torch.device, autocast: torch.dtype | None = None
) -> Features:
    """``encode(view 0 of each batch).features`` in evaluation mode, on ``device``; the mode before is restored.

    Ranks may have shares of different length, and empty batches: nothing here waits for another rank.

    Raises:
        UsageError: no batch at all, or labels that a classifier cannot use.
    """
    parts: list[Features] = []
    with evaluation_mode(encode), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for batch in batches:
            images = batch.images[0].to(device, non_blocking=True)
            if len(images):
                features = encode(images).features
            else:  # of no use but for its width
                features = encode(images.new_zeros(1, *images.shape[1:])).features[:0]
            parts.append(Features(features.float(), batch.labels.to(device), batch.index.to(device)))
    if not parts:
        raise UsageError("no batch to evaluate on: give a data set with at least one image")
    found = Features(*(torch.cat(members) for members in zip(*parts, strict=True)))
    if len(found.labels) and found.labels.min() < 0:
        raise UsageError(f"label {found.labels.min()} among the samples: evaluation needs labels from 0 upwards")
    return found


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` within, and each part's own mode again after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
