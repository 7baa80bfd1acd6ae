"""What a view is, and the plain one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoder

View = Callable[[Encoder, Batch], Batch]
"""(encoder, batch as the loader made it) -> the batch that an objective gets to see.

One that has state or parameters is a module. What it gives as ``scalars()`` after a call, name -> number, is logged.
"""


def clean(encoder: Encoder, batch: Batch) -> Batch:
    """The batch as the loader made it."""
    return batch


def take(batch: Batch, index: int) -> tuple[Tensor, list[Tensor]]:
    """View ``index`` [B, 3, H, W] of a batch, and its other views.

    Raises:
        UsageError: the batch has no such view.
    """
    views = list(batch.images)
    if index >= len(views):
        raise UsageError(f"view.index={index}: the batch has {len(views)} views, counted from 0", everywhere=True)
    return views.pop(index), views


def put(batch: Batch, index: int, images: Tensor) -> Batch:
    """The batch with ``images`` for its view ``index``; after its last view, where that is the next number."""
    views = list(batch.images)
    views[index : index + 1] = [images.contiguous(memory_format=torch.channels_last)]
    # a stack would not stay channels-last
    return batch._replace(images=torch.cat(views).unflatten(0, (len(views), -1)))
