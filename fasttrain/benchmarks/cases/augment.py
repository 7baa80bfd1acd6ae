"""Two views of each image: crops of images that lie on the device, and all colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.benchmarks.cases import OURS, REFERENCE, Case, Results
from fasttrain.benchmarks.ceilings import Work
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain_kernels.augment import packed
from fasttrain_kernels.augment.batched import augment_batched
from fasttrain_kernels.augment.cpu import augment_cpu
from fasttrain_kernels.augment.draws import unpacked
from fasttrain_kernels.augment.gpu import augment_gpu
from fasttrain_kernels.threads import in_slices

Augment = Callable[..., None]


class Views(NamedTuple):
    """What is to be done to noise, all of it on one device."""

    pixels: Tensor  # uint8, one image after the other
    starts: Tensor
    sizes: Tensor
    table: Tensor  # [V, n, 10]
    size: int
    read: int  # bytes under the boxes

    def made(self, augment: Augment, dtype: torch.dtype = torch.float32) -> Tensor:
        """[V, n, S, S, 3] from the images' bytes."""
        out = torch.empty((*self.table.shape[:2], *[self.size] * 2, 3), dtype=dtype, device=self.table.device)
        augment(self.pixels, self.starts, self.sizes, self.table, out)
        return out


def by_kernel(pixels: Tensor, starts: Tensor, sizes: Tensor, table: Tensor, out: Tensor) -> None:
    """Ours: a GPU's kernel, or the CPU's on all of PyTorch's threads."""
    if out.is_cuda:
        return augment_gpu(pixels, starts, sizes, table, out)
    draws, arrays = unpacked(table.numpy()), [tensor.numpy() for tensor in (pixels, starts, sizes, out)]

    def work(first: int, last: int) -> None:
        part = slice(first, last)
        augment_cpu(arrays[0], arrays[1][part], arrays[2][part], draws.take(part), arrays[3], first)

    in_slices(len(starts), work)


def views_to_make(images: int, source: tuple[int, int], config: AugmentConfig, device: torch.device) -> Views:
    """SimCLR's views of ``images`` images of ``source`` (height, width) pixels."""
    sizes = np.tile(np.int32(source), (images, 1))
    draws = SimCLR(config, 0).draw(0, np.arange(images), sizes)
    each = 3 * source[0] * source[1]
    pixels = torch.randint(0, 256, (images * each,), dtype=torch.uint8, device=device)
    place = torch.arange(images, device=device) * each, torch.from_numpy(sizes).to(device)
    read = 3 * int(draws.boxes[..., 2:].prod(-1, dtype=np.int64).sum())
    return Views(pixels, *place, torch.from_numpy(packed(draws)).to(device), config.size, read)


def augment_cases(images: int, source: tuple[int, int], config: AugmentConfig, device: torch.device) -> Iterator[Case]:
    views = views_to_make(images, source, config, device)
    shape = [*views.table.shape[:2], *[config.size] * 2, 3]

    def by(augment: Augment, dtype: torch.dtype = torch.float32) -> Results:
        return (views.made(augment, dtype),)

    yield Case(
        "augmentation",
        "crop to colours",
        "x".join(map(str, shape)),
        torch.float32,
        Work(0, views.read + 4 * int(np.prod(shape))),
        ("views",),
        lambda: by(augment_batched, torch.float64),
        {OURS: lambda: by(by_kernel), REFERENCE: lambda: by(augment_batched)},
        rounded=3e-4,  # of crops, one value in a thousand is the next grey level
    )


__all__ = ["Views", "augment_cases", "by_kernel", "views_to_make"]
