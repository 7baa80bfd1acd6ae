"""Verify a data set once, and write it as FFCV files if asked.

    python launch/prepare.py data.root=/data/imagenet
    python launch/prepare.py data.root=/data/imagenet beton.folder=/data/imagenet-ffcv beton.max_resolution=400

Every image of the splits is decoded, in several processes. A manifest beside each split then says how large the images
are, and which files cannot be read and why: runs leave those out. Prepare a data set again when its files change; what
vanishes or changes while a run goes on is replaced in it, up to loader.bad_share.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fasttrain import cli
from fasttrain.config import Config, PathText, Where
from fasttrain.data import manifest
from fasttrain.data.catalog import Catalog, DataConfig, NoSplit, Role, open_catalog
from fasttrain.data.verify import verify
from fasttrain.output import try_output
from fasttrain.printable import printable


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

    reads: ClassVar[dict[str, Where]] = {
        **{name: Where("folder") for name in ("mode", "max_resolution", "quality")},
        "jpeg_share": Where("mode", ("proportion",)),
    }


class PrepareConfig(Config):
    data: DataConfig = DataConfig()
    splits: tuple[Role, ...] | None = Field(None, min_length=1)
    """Which splits; null: train, and val where there is one."""
    workers: int | None = Field(None, ge=1)
    """Processes that decode; null: one a core."""
    beton: BetonConfig = BetonConfig()


def prepare(config: PrepareConfig) -> None:
    catalogs = [open_catalog(config.data, split, use_manifest=False) for split in config.splits or ("train",)]
    absent = None
    if config.splits is None:
        try:
            catalogs.append(open_catalog(config.data, "val", use_manifest=False))
        except NoSplit as missing:
            absent = missing
    try_places(config, catalogs)
    for catalog in catalogs:
        print(verify(catalog, config.data.cache_folder, config.workers), flush=True)
    if absent:
        print(f"val: none; {absent}")
    if config.beton.folder is not None:
        for catalog in catalogs:
            write_beton(open_catalog(config.data, catalog.split), config.beton, config.workers)


def try_places(config: PrepareConfig, catalogs: list[Catalog]) -> None:
    """See that the results can be written, before the minutes of work that they take."""
    for catalog in catalogs:
        if catalog.names is not None:
            manifest.try_save(catalog.root, config.data.cache_folder)
        if config.beton.folder is not None:
            try_output(beton_of(config.beton, catalog), "choose another place with beton.folder=…")


def beton_of(settings: BetonConfig, catalog: Catalog) -> Path:
    return Path(settings.folder) / f"{catalog.split}.beton"


def write_beton(catalog: Catalog, settings: BetonConfig, workers: int | None) -> None:
    from fasttrain.data import beton

    chosen = settings.model_dump(exclude={"folder"})
    written = beton.write_beton(catalog, beton_of(settings, catalog), **chosen, workers=workers)
    print("wrote", printable(written))


if __name__ == "__main__":
    cli.main(PrepareConfig, prepare, __doc__)
