"""The views of a batch where its pixels are: by Triton on a GPU that compiles it, by PyTorch's operations elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fasttrain_kernels.augment.batched import augment_batched
from fasttrain_kernels.augment.draws import Column, Draws, packed
from fasttrain_kernels.trial import triton_passes


def augment_gpu(pixels: Tensor, starts: Tensor | None, sizes: Tensor | None, table: Tensor, out: Tensor) -> None:
    """Crop, resize, flip and colour n images in V views, in one launch that the host does not wait for.

    Everything lies on one device, contiguous. With ``starts`` and ``sizes`` None the images are cropped, resized and
    flipped already, each view's own, and are only coloured: a decoder that has a tensor a view calls with V = 1 for
    each.

    Args:
        pixels: uint8; [bytes] of images [H, W, 3] one after the other, or [V, n, S, S, 3] ([n, S, S, 3] for V = 1) that
            are only coloured.
        starts: int64 [n], the first byte of each image; None where they are only coloured.
        sizes: int32 [n, 2], (H, W) of each image; likewise. Boxes lie inside.
        table: int32 [V, n, 10], :func:`~fasttrain_kernels.augment.draws.packed` draws.
        out: [V, n, S, S, 3], written: float32 in [0, 1], coloured; or uint8, cropped, resized and flipped alone.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    _check(pixels, starts, sizes, table, out)
    if out.numel():
        _implementation(out)(pixels, starts, sizes, table, out)


def _implementation(out: Tensor) -> Callable[..., None]:
    if out.is_cuda and triton_passes("augmentation", _trial):
        from fasttrain_kernels.augment.triton import augment_triton

        return augment_triton
    return augment_batched


def _check(pixels: Tensor, starts: Tensor | None, sizes: Tensor | None, table: Tensor, out: Tensor) -> None:
    given = {"pixels": pixels, "starts": starts, "sizes": sizes, "table": table, "out": out}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    found = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors.items())
    views, images, size = out.shape[:3] if out.dim() == 5 else (0, 0, 0)
    crops = starts is not None
    fits = out.shape == (views, images, size, size, 3) and table.shape == (views, images, len(Column))
    types = pixels.dtype == torch.uint8 and table.dtype == torch.int32
    types &= out.dtype in (torch.float32, *[torch.uint8] * crops)
    if crops:
        fits &= sizes is not None and starts.shape == (images,) and sizes.shape == (images, 2) and pixels.dim() == 1
        types &= starts.dtype == torch.int64 and sizes is not None and sizes.dtype == torch.int32
    else:
        fits &= sizes is None and pixels.numel() == out.numel() and pixels.shape[-4:] == out.shape[1:]
    if not (fits and types):
        raise ValueError(f"{found} do not fit: see augment_gpu for their shapes and types")
    if not all(t.is_contiguous() and t.device == out.device for t in tensors.values()):
        raise ValueError(f"{found}: give contiguous tensors on {out.device}")
    if size == 1:
        raise ValueError("views of 1 pixel have nothing that a blur could reflect: give 2 or more")


def _trial(impl: str, device: str = "cuda") -> Iterator[Tensor]:
    """Views of images larger and smaller than they, coloured in all ways; their bytes; the same coloured afterwards."""
    if impl == "triton":
        from fasttrain_kernels.augment.triton import augment_triton as augment
    else:
        augment = augment_batched
    views, size = 2, 24
    random = np.random.default_rng(0)
    sizes = np.int32([[50, 30], [7, 90]])
    n = len(sizes)
    starts = np.concatenate([[0], np.cumsum(3 * sizes.prod(1, dtype=np.int64))])
    corner = random.integers(0, sizes[:, None] // 2 + np.zeros((1, views, 1), int))
    boxes = np.concatenate([corner, np.maximum((sizes[:, None] - corner) * 3 // 4, 1)], axis=2)
    factors = random.uniform(0.2, 1.8, (3, n, views)).astype(np.float32)
    hue, sigma = (random.uniform(low, 1.5, (n, views)).astype(np.float32) for low in (-0.5, 0.1))
    order = random.permuted(np.tile(np.int8([0, 1, 2, 3]), (n, views, 1)), axis=2)
    grey, flip, solarise, blurs = np.arange(4 * n * views).reshape(4, n, views) % 7 % 2 == 1
    draws = Draws(boxes.astype(np.int32), flip, *factors, hue, order, grey, sigma * blurs, solarise)
    pixels = torch.from_numpy(random.integers(0, 256, starts[-1], np.uint8)).to(device)
    place = torch.from_numpy(starts[:-1]).to(device), torch.from_numpy(sizes).to(device)
    table = torch.from_numpy(packed(draws)).to(device)
    shape = (views, n, size, size, 3)
    coloured, levels = (torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.float32, torch.uint8))
    augment(pixels, *place, table, coloured)
    augment(pixels, *place, table, levels)
    yield coloured
    yield levels.float()
    augment(levels, None, None, table, again := torch.empty_like(coloured))
    yield again


__all__ = ["augment_gpu"]
