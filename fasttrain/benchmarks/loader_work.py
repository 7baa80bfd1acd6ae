"""What every contestant of the loaders' benchmark loads, and how: the same images, by as many threads or processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain.data.augment import AugmentConfig, blur_radius
from fasttrain.data.catalog import Catalog
from fasttrain.errors import UsageError

Epoch = Callable[[], Iterator[Sequence[Tensor]]]
"Goes through an epoch: batches, each as its views [B, 3, size, size] on the device."


@dataclass(frozen=True, eq=False)
class Work:
    """What every contestant loads."""

    catalog: Catalog  # of these images alone
    batch: int
    threads: int  # or worker processes
    device: torch.device
    scratch: Path  # an empty folder that outlives the work
    beton: Catalog | None  # an FFCV file of the same images

    @cached_property
    def folder(self) -> Path:
        """The images, and no others, as links <label>/<id>.jpg; what they are is read from their content."""
        self._require_images()
        for label in np.unique(self.catalog.labels[self.catalog.indices]):
            (self.scratch / f"{label:06}").mkdir()
        for index in self.catalog.indices:
            link = self.scratch / f"{self.catalog.labels[index]:06}" / f"{index:09}.jpg"
            link.symlink_to(Path(self.catalog.path(index)).absolute())
        return self.scratch

    @cached_property
    def pixels(self) -> Tensor:
        """The images, decoded: uint8 [n, 3, H, W] on the device."""
        self._require_images()
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self._decode, self.catalog.indices))
        if len(sizes := {image.shape for image in images}) > 1:
            raise UsageError(f"its batch is one tensor, and the images have {len(sizes):,} sizes")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(self.device)

    def dataset(self, transform: Callable[[Image.Image], Any] | None) -> Dataset:
        """As torchvision's ImageFolder and CIFAR10 give them: a PIL image, ``transform``ed, and its label."""
        if not self.catalog.encoded:
            self._require_images()
            kept = self.catalog.indices
            return _Pixels(self.catalog.pixels[kept], self.catalog.labels[kept], transform)
        from torchvision.datasets import ImageFolder

        return ImageFolder(str(self.folder), transform)

    def require_files(self) -> None:
        if not self.catalog.encoded:
            raise UsageError(f"it reads image files, and '{self.catalog.root}' is none")

    def require_beton(self) -> Catalog:
        if self.beton is None:
            raise UsageError(
                "a .beton file is needed: launch/prepare.py writes one of the images, and beton=… names it"
            )
        return self.beton

    def _require_images(self) -> None:
        if self.catalog.beton is not None:
            raise UsageError(
                f"'{self.catalog.root}' is an FFCV file: give data.root=… of its images, and it as beton=…"
            )

    def _decode(self, index: int) -> np.ndarray:
        if not self.catalog.encoded:
            return self.catalog.pixels[index]
        with Image.open(self.catalog.path(index)) as image:
            return np.array(image.convert("RGB"))


class _Pixels(Dataset):
    """An archive's images, which lie in memory."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Any] | None) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


def by_workers(work: Work, dataset: Dataset) -> Epoch:
    """Of a data set whose samples begin with their views, by processes that stay from epoch to epoch."""
    gpu = work.device.type == "cuda"
    loader = DataLoader(
        dataset, work.batch, shuffle=True, num_workers=work.threads, persistent_workers=True, pin_memory=gpu
    )

    def epoch() -> Iterator[Sequence[Tensor]]:
        for views, *_ in loader:
            yield [view.to(work.device, non_blocking=True) for view in views]

    return epoch


def spreads(augment: AugmentConfig) -> tuple[float, float, float, float]:
    """Of brightness, contrast, saturation and hue, as torchvision's ColorJitter takes them."""
    return (0.8 * augment.jitter,) * 3 + (0.2 * augment.jitter,)


def window(augment: AugmentConfig) -> int:
    """Side of the blur's kernel, pixels, which ours has."""
    return 2 * blur_radius(augment.size) + 1


def insist(who: str, augment: AugmentConfig, **fixed: Any) -> None:
    """Refuse an augmentation that differs from what ``who`` has for good.

    Raises:
        UsageError: it does.
    """
    for key, value in fixed.items():
        if (asked := getattr(augment, key)) != value:
            raise UsageError(f"{who} knows augment.{key}={value} alone, not {asked}")
