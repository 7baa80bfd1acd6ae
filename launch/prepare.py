"""Verify a data set once, and write it as FFCV files if asked.

    python launch/prepare.py data.root=/data/imagenet
    python launch/prepare.py data.root=/data/imagenet beton.folder=/data/imagenet-ffcv beton.max_resolution=400

Every image of both splits is decoded, in several processes. A manifest beside each split then says how large the images
are, and which files cannot be read and why: runs leave those out. Prepare a data set again when its files change; what
vanishes or changes while a run goes on is replaced in it, up to loader.bad_share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fasttrain import cli
from fasttrain.config import Config, PathText
from fasttrain.data.catalog import Catalog, DataConfig, Role, open_catalog
from fasttrain.data.verify import verify


class BetonConfig(Config):
    folder: PathText | None = None
    """Where to write train.beton and val.beton; null: nowhere."""
    mode: Literal["jpg", "raw", "smart", "proportion"] = "jpg"
    """Store JPEG, raw pixels, JPEG of large images only (smart), or JPEG of a share of the images (proportion)."""
    max_resolution: int | None = Field(None, ge=1)
    """Longer side of the stored images at most, pixels; null: as they are."""
    quality: int = Field(90, ge=1, le=100)
    """Of the JPEGs that are encoded anew."""
    jpeg_share: float = Field(0.5, ge=0, le=1)
    """Share of JPEGs in mode proportion."""


class PrepareConfig(Config):
    data: DataConfig = DataConfig()
    splits: tuple[Role, ...] = ("train", "val")
    """Which splits."""
    workers: int | None = Field(None, ge=1)
    """Processes that decode; null: one a core."""
    beton: BetonConfig = BetonConfig()


def prepare(config: PrepareConfig) -> None:
    catalogs = [open_catalog(config.data, split, use_manifest=False) for split in config.splits]
    for catalog in catalogs:
        print(verify(catalog, config.data.cache_folder, config.workers), flush=True)
    if config.beton.folder is not None:
        for split in config.splits:
            write_beton(open_catalog(config.data, split), config.beton, config.workers)


def write_beton(catalog: Catalog, settings: BetonConfig, workers: int | None) -> None:
    from fasttrain.data import beton

    folder = Path(settings.folder)
    chosen = settings.model_dump(exclude={"folder"})
    print("wrote", beton.write_beton(catalog, folder / f"{catalog.split}.beton", **chosen, workers=workers))


if __name__ == "__main__":
    cli.main(PrepareConfig, prepare, __doc__)
