"""The resident loader: the reference's images, the other loaders' order and bad images, one copy, room for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data import pixels as resident
from fasttrain.data import resident as resident_loader
from fasttrain.data.augment import AugmentConfig, CentreCrop, SimCLR, apply_reference
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import Loader, LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.data.resident import ResidentLoader, ResidentSource
from fasttrain.data.uncropped import CropOnCpu, CropOnGpu
from fasttrain.errors import UsageError
from tests.test_dali import assert_equal, batches, encode, photograph

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

COUNT, SIZE, CPU = 40, 32, torch.device("cpu")
PLAIN = dict(jitter_p=0.0, grey=0.0, blur=0.0)


def write_images(root: Path, kind: str = "PNG") -> Path:
    random = np.random.default_rng(5)
    for i in range(COUNT):
        path = root / "train" / "ab"[i % 2] / f"{i:02d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph(i, *random.integers(20, 70, 2)), kind).tobytes())
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(resident, "_kept", {})


@pytest.fixture
def loaders():
    """A factory of loaders that are closed in the end."""
    opened = []

    def make(catalog, order, augment, *place, kind="resident", **settings) -> Loader:
        opened.append(make_loader(LoaderConfig(kind=kind, threads=2, **settings), catalog, order, augment, CPU, *place))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def catalog_of(root: Path) -> Catalog:
    return open_catalog(DataConfig(root=str(root)), "train")


def simclr(**changes) -> SimCLR:
    return SimCLR(AugmentConfig(size=SIZE, **changes), 3)


def pixels_of(catalog: Catalog, index: int) -> np.ndarray:
    return np.asarray(Image.open(catalog.path(index)).convert("RGB"))


@pytest.mark.parametrize("changes", [PLAIN, {}, dict(views=3, solarise=0.3)], ids=["crops", "colours", "three views"])
def test_images_are_the_references(images, loaders, changes):
    """PIL rounds to grey levels between the two directions of the resize: that, and what colours make of it."""
    catalog, augment = catalog_of(images), simclr(**changes)
    for batch in batches(loaders(catalog, Order(catalog.indices, 0, 8), augment), 0, 2):
        ids = batch.index.numpy()
        draws = augment.draw(0, ids, np.array([pixels_of(catalog, i).shape[:2] for i in ids]))
        for view, row in np.ndindex(len(batch.images), len(ids)):
            expected = apply_reference(pixels_of(catalog, ids[row]), draws.take((row, view)), SIZE)
            assert 255 * abs(batch.images[view, row].permute(1, 2, 0).numpy() - expected).mean() < 0.5
        assert batch.labels.tolist() == catalog.labels[ids].tolist()


def test_batches_are_dalis_to_the_bit(images, loaders):
    """On a CPU; a GPU's DALI crops by itself, and sees a little beyond a crop's border."""
    catalog, order = catalog_of(images), Order(catalog_of(images).indices, 1, 8)
    ours, dalis = (batches(loaders(catalog, order, simclr(), kind=kind), 3, 6) for kind in ("resident", "dali"))
    assert_equal(ours, dalis)
    assert ours[0].images.stride() == dalis[0].images.stride()


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("changes", [PLAIN, {}], ids=["crops", "colours"])
def test_images_are_ffcvs_to_the_bit(loaders, tmp_path, mode, changes):
    pytest.importorskip("ffcv.reader", reason="FFCV is not installed")
    from fasttrain.data.beton import write_beton

    catalog = catalog_of(write_images(tmp_path, "JPEG"))
    path = write_beton(catalog, tmp_path / "beton" / "train.beton", mode, progress=False)
    beton, order = catalog_of(path), Order(catalog.indices, 1, 8)
    ffcvs = batches(loaders(beton, order, simclr(**changes), kind="ffcv"), 0, 7)
    assert_equal(batches(loaders(beton, order, simclr(**changes)), 0, 7), ffcvs)
    assert beton.fingerprint == catalog.fingerprint
    if mode == "raw":  # the pixels that DALI decoded: the folder's own
        assert_equal(batches(loaders(catalog, order, simclr(**changes)), 0, 7), ffcvs)


@pytest.mark.parametrize("changes", [PLAIN, {}], ids=["crops", "colours"])
def test_a_gpus_way_makes_the_same_batches(images, changes):
    """On a CPU it is the batched form that makes them."""
    catalog, augment = catalog_of(images), simclr(**changes)
    order = Order(catalog.indices, 0, 8)
    pixels = resident.resident_pixels(LoaderConfig(kind="resident"), catalog, order, CPU)
    source = ResidentSource(catalog, order, augment, pixels)
    source.seek(0, None)
    decoded = source.produce(0)
    ours = CropOnCpu(augment, CPU, 1)(decoded)
    on_gpu = decoded._replace(whole=decoded.whole._replace(pixels=pixels.data))
    theirs = CropOnGpu(augment, CPU)(on_gpu)
    assert ours.images.dtype == theirs.images.dtype and ours.images.stride() == theirs.images.stride()
    grey = 1 if ours.images.dtype == torch.uint8 else 255
    difference = grey * abs(ours.images.float() - theirs.images.float())
    assert (difference > 0.01).float().mean() < 1e-3 and difference.mean() < 0.01
    assert torch.equal(ours.index, theirs.index) and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_split_of_the_run_gives_the_same_images(images, loaders, world):
    catalog, order = catalog_of(images), Order(catalog_of(images).indices, 2, 8)
    whole = batches(loaders(catalog, order, simclr()), 0, 8)
    ranks = [loaders(catalog, order, simclr(), rank, world) for rank in range(world)]
    resumed = [batches(loader, 0, 3) + batches(loader, 3, 5) for loader in ranks]
    for step, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in resumed], 1), expected.images)
        assert torch.equal(torch.cat([part[step].index for part in resumed]), expected.index)


def test_grey_levels_travel_as_they_are(images, loaders):
    catalog = catalog_of(images)
    order = Order(catalog.indices, 0, 7, shuffle=False, drop_last=False)
    for kind in ("resident", "dali"):
        loader = loaders(catalog, order, CentreCrop(AugmentConfig(size=SIZE)), kind=kind)
        levels, floats = list(loader.iterate(levels=True)), list(loader.iterate())
        assert {batch.images.dtype for batch in levels} == {torch.uint8} and len(levels[-1].labels) == COUNT % 7
        for one, other in zip(levels, floats, strict=True):
            torch.testing.assert_close(one.images / 255, other.images, rtol=1e-6, atol=0)
            assert one.images.stride() == other.images.stride()
    coloured = loaders(catalog, Order(catalog.indices, 0, 8), simclr())
    assert next(coloured.iterate(levels=True)).images.dtype == torch.float32


@pytest.fixture
def damaged(tmp_path) -> Path:
    root = write_images(tmp_path, "JPEG")
    a, b = sorted((root / "train" / "a").iterdir()), sorted((root / "train" / "b").iterdir())
    a[3].write_bytes(a[3].read_bytes()[:300])
    content = bytearray(b[2].read_bytes())
    content[2:300] = bytes(298)
    b[2].write_bytes(content)
    return root


def test_bad_images_are_replaced_by_those_that_dali_shows(damaged, loaders):
    catalog = catalog_of(damaged)
    Path(catalog.path(11)).unlink()
    order = Order(catalog.indices, 0, 8)
    ours, dalis = (loaders(catalog, order, simclr(**PLAIN), kind=kind, bad_share=0.5) for kind in ("resident", "dali"))
    for one, other in zip(batches(ours, 0, 10), batches(dalis, 0, 10), strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.labels, other.labels)
    assert ours.bad.found == dalis.bad.found and set(ours.bad.found) == {3, 11, 22}


def test_too_many_bad_images_end_the_run(damaged, loaders):
    loader = loaders(catalog_of(damaged), Order(np.arange(COUNT), 0, 8), simclr(), bad_share=0.03)
    with pytest.raises(UsageError, match=r"06\.jpeg.*2 bad images, and loader\.bad_share=0\.03 of 40 images allows 1"):
        batches(loader, 0, 5)


def test_auto_takes_it_for_training_where_it_fits_and_says_so(images, loaders, capsys, monkeypatch):
    catalog, order = catalog_of(images), Order(np.arange(COUNT), 0, 8)
    evaluation = Order(np.arange(COUNT), 0, 8, shuffle=False, drop_last=False)
    assert isinstance(loaders(catalog, order, simclr(), kind="auto"), ResidentLoader)
    assert "resident, 40 images of" in capsys.readouterr().err
    assert not isinstance(loaders(catalog, evaluation, simclr(), kind="auto"), ResidentLoader)
    resident._kept.clear()
    monkeypatch.setattr(resident, "host_memory", lambda: 100_000)
    assert not isinstance(loaders(catalog, order, simclr(), kind="auto"), ResidentLoader)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "message"),
    [("host_memory", r"resident_share=0\.25 of the memory of this host or container \(0\.1 MB\) is 0\.0 MB"),
     ("free_memory", r"of the memory of this host or container 0\.1 MB are free")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_it_needs(images, loaders, monkeypatch, memory, message):
    monkeypatch.setattr(resident, memory, lambda: 100_000)
    with pytest.raises(UsageError, match=rf"40 images of '.*' take 0\.\d MB when decoded, and .*{message}.*kind=auto"):
        loaders(catalog_of(images), Order(np.arange(COUNT), 0, 8), simclr())


def test_a_part_is_kept_where_the_whole_does_not_fit(images, loaders, monkeypatch):
    catalog = catalog_of(images)
    monkeypatch.setattr(resident, "host_memory", lambda: 100_000)
    loaders(catalog, Order(np.arange(4), 0, 2), simclr(), resident_share=0.5)
    ((_, kept),) = resident._kept.items()
    assert kept.ids.tolist() == [0, 1, 2, 3] and len(kept.data) < 50_000


def test_what_is_kept_needs_no_more_room(images, loaders, monkeypatch):
    catalog, order = catalog_of(images), Order(np.arange(COUNT), 0, 8)
    loaders(catalog, order, simclr())
    monkeypatch.setattr(resident, "free_memory", lambda: 0)
    assert isinstance(loaders(catalog, order, simclr()), ResidentLoader)


def test_a_split_without_a_sound_image_ends_in_a_line(loaders, tmp_path):
    catalog = catalog_of(write_images(tmp_path, "JPEG"))
    for index in range(COUNT):
        Path(catalog.path(index)).write_bytes(Path(catalog.path(index)).read_bytes()[:300])
    with pytest.raises(
        UsageError, match=r"cannot decode '.*' \(truncated: its end is missing\), nor any of 100 others"
    ):
        batches(loaders(catalog, Order(np.arange(COUNT), 0, 8), simclr()), 0, 1)


def test_the_oldest_gives_way(images, loaders, monkeypatch):
    catalog = catalog_of(images)
    monkeypatch.setattr(resident, "host_memory", lambda: 100_000)
    for first in range(3):
        loaders(catalog, Order(np.arange(first, first + 4), 0, 2), simclr(), resident_share=0.5)
    assert sum(pixels.data.nbytes for pixels in resident._kept.values()) <= 50_000
    assert list(resident._kept.values())[-1].ids[0] == 2


def test_files_are_decoded_once_until_they_change(loaders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resident_loader, "_LOOK_EVERY", 0.0)
    catalog, order = catalog_of(write_images(tmp_path)), Order(np.arange(COUNT), 0, 8)
    read, original = [], Catalog.read
    monkeypatch.setattr(Catalog, "read", lambda self, index: read.append(index) or original(self, index))
    before = loaders(catalog, order, simclr(**PLAIN))
    seen = len(read)
    loaders(catalog, Order(np.arange(COUNT), 1, 8), simclr())
    resident._kept.clear()  # another process would find the copy that the first loader still has
    loaders(catalog, order, simclr())
    assert len(read) <= seen + 3 * resident._SAMPLED  # headers that tell whether it fits
    path = Path(catalog.path(7))
    path.write_bytes(encode(np.zeros((30, 30, 3), np.uint8), "PNG").tobytes())
    os.utime(path, ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        shown = {int(i): x for b in batches(before, 0, 20) for i, x in zip(b.index, b.images[0], strict=True)}
    assert shown[7].std() > 0.05  # what the run began with
    assert caplog.text.count("have changed since they were decoded") == 1
    after = batches(loaders(catalog, order, simclr(**PLAIN)), 0, 5)
    assert {int(i): x for b in after for i, x in zip(b.index, b.images[0], strict=True)}[7].max() == 0


def test_a_read_that_hangs_ends_in_a_line_that_names_it(loaders, tmp_path):
    catalog = catalog_of(write_images(tmp_path))
    path = Path(catalog.path(5))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"no image for 0\.5 s while reading '.*' and those after it.*timeout"):
        loaders(catalog, Order(np.arange(COUNT), 0, 8), simclr(), timeout=0.5)


def test_colours_on_a_gpu_that_is_not_there(images, loaders):
    for kind in ("dali", "resident"):
        with pytest.raises(UsageError, match=r"loader\.colours=gpu, and this run's device is cpu"):
            loaders(catalog_of(images), Order(np.arange(COUNT), 0, 8), simclr(), kind=kind, colours="gpu")
