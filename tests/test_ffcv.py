"""FFCV files and their loader: pixels against the plain reference, order and draws against every way to split a run."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data import Batch, ffcv
from fasttrain.data import beton as beton_files
from fasttrain.data.augment import AugmentConfig, CentreCrop, SimCLR, apply_reference
from fasttrain.data.beton import open_beton, read_listing, verify_beton, write_beton
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import UsageError

SIZE = 32
CPU = torch.device("cpu")
IMAGES = 23


@pytest.fixture(scope="module")
def installed():
    return pytest.importorskip("ffcv.reader", reason="FFCV is not installed: " + beton_files.INSTALL)


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth shading, an edge and a little grain."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.full((height, width, 3), 128.0)
    for _ in range(5):
        wave = np.sin(random.uniform(-10, 10) * x + random.uniform(-10, 10) * y + random.uniform(0, 6))
        image += wave[..., None] * random.uniform(-30, 30, 3)
    image[(x - random.uniform()) ** 2 + (y - random.uniform()) ** 2 < 0.06] += random.uniform(-60, 60, 3)
    return Image.fromarray((image + random.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes, all sizes; among them CMYK, greyscale and progressive JPEGs, a PNG named .jpg, an empty file."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        image, options = photograph(i, *random.integers(24, 120, 2).tolist()), {"format": "JPEG", "quality": 92}
        if i == 3:
            image = image.convert("CMYK")
        elif i == 5:
            image = image.convert("L")
        elif i == 7:
            options["progressive"] = True
        elif i == 11:
            options = {"format": "PNG"}
        path = root / "train" / ("cat" if i < 10 else "dog") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    (root / "train/cat/04a.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def source(folder) -> Catalog:
    return open_catalog(DataConfig(root=str(folder), cache=str(folder / "cache")), "train")


@pytest.fixture(scope="module")
def written(installed, source, tmp_path_factory) -> dict[str, Path]:
    """The same images as JPEG, as pixels, and mixed."""
    root = tmp_path_factory.mktemp("beton")
    modes = ("jpg", "raw", "proportion")
    return {mode: write_beton(source, root / mode / "train.beton", mode, progress=False) for mode in modes}


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """An FFCV file and its sidecar, to be damaged."""
    for suffix in ("", ".json"):
        shutil.copy(f"{written['jpg']}{suffix}", tmp_path / f"train.beton{suffix}")
    return tmp_path / "train.beton"


@pytest.fixture
def loaders():
    """A factory of loaders that are closed in the end."""
    opened = []

    def make(catalog, order, augment, *place, device=CPU, kind="ffcv", threads=2):
        opened.append(make_loader(LoaderConfig(kind=kind, threads=threads), catalog, order, augment, device, *place))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def catalog_of(path: Path) -> Catalog:
    return open_catalog(DataConfig(root=str(path)), "train")


def pixels_of(catalog: Catalog, index: int) -> np.ndarray:
    return np.asarray(Image.open(catalog.path(index)).convert("RGB"))


def batches(loader, start: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.iterate(start), count))


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def errors(batch: Batch, source: Catalog, augment, epoch: int = 0) -> np.ndarray:
    """Mean absolute difference to the reference in grey levels, [V, B]."""
    ids = batch.index.numpy()
    images = [pixels_of(source, i) for i in ids]
    draws = augment.draw(epoch, ids, np.array([image.shape[:2] for image in images]))
    found = batch.images.permute(0, 1, 3, 4, 2).cpu().numpy()
    expected = [
        [apply_reference(image, draws.take((i, view)), augment.size) for i, image in enumerate(images)]
        for view in range(augment.views)
    ]
    return 255 * abs(found - expected).mean(axis=(2, 3, 4))


# The file ----------------------------------------------------------------------------------------------------------


def test_jpegs_keep_their_bytes_and_the_rest_becomes_rgb(written, source):
    beton = open_beton(written["jpg"])
    assert beton.samples["id"].tolist() == source.indices.tolist() and len(source) == IMAGES
    reencoded = []
    for sample in beton.samples:
        payload = beton.data[sample["start"] : sample["start"] + sample["nbytes"]]
        expected = pixels_of(source, sample["id"])
        assert sample["jpeg"] and (sample["height"], sample["width"]) == expected.shape[:2]
        assert sample["label"] == source.labels[sample["id"]]
        if payload.tobytes() != Path(source.path(sample["id"])).read_bytes():
            reencoded.append(Path(source.path(sample["id"])).name)
            stored = Image.open(io.BytesIO(payload.tobytes()))
            assert stored.format == "JPEG" and stored.mode == "RGB"
            assert abs(np.asarray(stored) - expected.astype(float)).mean() < 4
    assert reencoded == ["03.jpg", "11.jpg"], "the CMYK JPEG and the PNG, no other"


def test_pixels_are_stored_exactly(written, source):
    beton = open_beton(written["raw"])
    for sample in beton.samples:
        stored = beton.data[sample["start"] : sample["start"] + sample["nbytes"]]
        assert np.array_equal(stored.reshape(sample["height"], sample["width"], 3), pixels_of(source, sample["id"]))


def test_what_is_encoded_anew_is_what_dalis_loader_sees(installed, tmp_path):
    """Pillow turns a TIFF as its tag says, and cuts 16-bit grey off at 255."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fasttrain.data.decoder import Decoder

    image, folder = photograph(1, 40, 64), tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    image.save(folder / "0.tif", tiffinfo={274: 6})
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "1.png")
    image.convert("CMYK").save(folder / "2.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "3.tif")
    catalog = open_catalog(DataConfig(root=str(tmp_path)), "train")
    beton = open_beton(write_beton(catalog, tmp_path / "train.beton", "raw", progress=False))
    for sample in beton.samples:
        (expected,) = Decoder().decode([catalog.read(int(sample["id"]))])
        assert (sample["height"], sample["width"]) == (40, 64)
        stored = beton.data[sample["start"] : sample["start"] + sample["nbytes"]]
        assert np.array_equal(stored, expected.reshape(-1))
    Image.fromarray(np.asarray(image.convert("L")).astype(np.float32)).save(folder / "4.tif")
    catalog = open_catalog(DataConfig(root=str(tmp_path), train="train"), "train")
    with pytest.raises(UsageError, match=r"4\.tif does not decode \(a TIFF of signed or floating-point numbers"):
        write_beton(catalog, tmp_path / "refused.beton", progress=False)


def test_a_payload_of_another_size_than_the_tables_say_is_damage(copy):
    """FFCV's decoder would scale it to fit, or leave what was in memory."""
    catalog, sample = catalog_of(copy), next(s for s in open_beton(copy).samples if s["jpeg"] and s["nbytes"] > 2000)
    other = io.BytesIO()
    photograph(9, sample["width"], sample["height"] + 8).resize((30, 20)).save(other, "JPEG")
    with open(copy, "r+b") as file:
        file.seek(sample["start"])
        file.write(other.getvalue().ljust(sample["nbytes"], b"\0"))
    order = Order(catalog.indices, 0, IMAGES)
    loader = make_loader(
        LoaderConfig(kind="ffcv", threads=2, bad_share=0.1), catalog, order, SimCLR(AugmentConfig(size=SIZE), 0), CPU
    )
    try:
        (batch,) = batches(loader, 0, 1)
    finally:
        loader.close()
    assert set(loader.bad.found) == {int(sample["id"])} and int(sample["id"]) not in batch.index.tolist()

    sidecar = copy.with_name("train.beton.json")
    described = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(described | {"sha256": hashlib.sha256(copy.read_bytes()).hexdigest()}))
    with pytest.raises(UsageError, match=rf"1 of {IMAGES} samples do not decode with FFCV.*\(ids {sample['id']}\)"):
        verify_beton(copy, progress=False)


def test_ffcv_itself_reads_the_file(written, source):
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader

    reader = Reader(str(written["proportion"]))
    assert reader.field_names == ["image", "label", "index"] and reader.num_samples == IMAGES
    image, label, index = (reader.metadata[name] for name in reader.metadata.dtype.names)
    assert index.tolist() == source.indices.tolist()
    assert label.tolist() == source.labels[source.indices].tolist()
    manager, content = OSCacheManager(reader), written["proportion"].read_bytes()
    for mode, start, i in zip(image["mode"], image["data_ptr"].tolist(), index, strict=True):
        end = start + int(manager.ptr_to_size[start])
        assert start // reader.page_size == (end - 1) // reader.page_size
        expected, payload = pixels_of(source, i), content[start:end]
        if mode == 1:
            assert payload == expected.tobytes()
        else:
            assert np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).shape == expected.shape


def test_a_file_of_ffcvs_own_writer(installed, tmp_path, loaders):
    """No sidecar, no index, other field names: ids are positions, labels their own names."""
    images = [np.asarray(photograph(i, 20 + i, 40)) for i in range(6)]
    path = tmp_path / "theirs.beton"
    np.savez(tmp_path / "images.npz", *images)
    # in a process of its own: it forks, after which numba's threads never end where there is but one core
    program = f"""
        import os
        import numpy as np
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        images = np.load({str(tmp_path / "images.npz")!r}).values()
        writer = DatasetWriter({str(path)!r}, {{"target": IntField(), "picture": RGBImageField("raw")}}, num_workers=1)
        writer.from_indexed_dataset([(i % 3, image) for i, image in enumerate(images)])
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    catalog = catalog_of(path)
    assert catalog.indices.tolist() == list(range(6)) and catalog.classes == ["0", "1", "2"]
    assert catalog.labels.tolist() == [0, 1, 2, 0, 1, 2]
    augment = CentreCrop(AugmentConfig(size=SIZE))
    (batch,) = loaders(catalog, Order(catalog.indices, 0, 6, shuffle=False, drop_last=False), augment).iterate()
    for i, image in enumerate(images):
        draws = augment.draw(0, np.array([i]), np.array([image.shape[:2]])).take((0, 0))
        assert 255 * abs(batch.images[0, i].permute(1, 2, 0).numpy() - apply_reference(image, draws, SIZE)).mean() < 0.5
    with pytest.raises(UsageError, match="no sidecar"):
        verify_beton(path)


def test_mixed_modes_are_reproducible(written, source, tmp_path):
    jpeg = open_beton(written["proportion"]).samples["jpeg"]
    assert 4 < jpeg.sum() < IMAGES - 4
    again = write_beton(source, tmp_path / "again.beton", "proportion", workers=3, progress=False)
    assert again.read_bytes() == written["proportion"].read_bytes()
    smart = open_beton(write_beton(source, tmp_path / "smart.beton", "smart", smart_threshold=9000, progress=False))
    large = [np.prod(pixels_of(source, i).shape) > 9000 for i in source.indices]
    assert smart.samples["jpeg"].tolist() == large and any(large) and not all(large)


def test_images_are_made_smaller_on_demand(installed, source, tmp_path):
    small = write_beton(source, tmp_path / "small.beton", "jpg", max_resolution=48, progress=False)
    listing = read_listing(small)
    for sample in open_beton(small).samples:
        expected = pixels_of(source, sample["id"])
        longer = max(expected.shape)
        assert max(sample["height"], sample["width"]) == min(longer, 48)
        assert listing.sizes[sample["id"]].tolist() == [sample["height"], sample["width"]]
    assert listing.fingerprint != source.fingerprint, "other sizes, other crop boxes"


def test_the_sidecar(written, source):
    listing = read_listing(written["raw"])
    assert listing.classes == ["cat", "dog"]
    assert len(listing.labels) == IMAGES + 1 and listing.labels[5] == -1, "the empty file keeps its id"
    assert listing.fingerprint == source.fingerprint and listing.excluded == source.excluded
    verify_beton(written["raw"], progress=False)


# Mistakes and damage -----------------------------------------------------------------------------------------------


def test_ffcv_missing(monkeypatch, tmp_path):
    beton_files._import_ffcv.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UsageError, match=r"apt-get install libopencv-dev .* && pip install -e '\.\[ffcv\]'"):
        open_beton(tmp_path / "train.beton")


def test_importing_is_quiet_and_leaves_threads_alone(written):
    program = f"""
        import torch
        from fasttrain.data.beton import open_beton
        torch.set_num_threads(3)
        open_beton({str(written["jpg"])!r})
        assert torch.get_num_threads() == 3, torch.get_num_threads()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_truncated(copy):
    with open(copy, "r+b") as file:
        file.truncate(copy.stat().st_size - 100)
    with pytest.raises(UsageError, match="its sidecar says"):
        open_beton(copy)
    copy.with_name("train.beton.json").unlink()
    with pytest.raises(UsageError, match="cut off"):
        open_beton(copy)
    with open(copy, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(UsageError, match="cut off"):
        open_beton(copy)


@pytest.mark.parametrize("content", [b"", b"\x02", b"no FFCV file at all " * 99, b"\x02\x00" + b"\xff" * 9000])
def test_garbage(installed, tmp_path, content):
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.beton"):
        open_beton(tmp_path / "x.beton")


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_garbage_in_the_sidecar(copy, content):
    copy.with_name("train.beton.json").write_text(content)
    if content == "[]":
        open_beton(copy)  # says nothing, so contradicts nothing
    else:
        with pytest.raises(UsageError, match="cannot read"):
            open_beton(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"count": "12"},
        {"count": 2},
        {"bytes": "many"},
        {"classes": 3},
        {"classes": ["a"]},
        {"classes": [1, 2, 3]},
        {"excluded": 5},
        {"excluded": [["only a path"]]},
        {"excluded": [[1, 2]]},
        {"fingerprint": 7},
        {"sha256": []},
    ],
    ids=str,
)
def test_a_sidecar_with_anything_in_it_is_one_line(copy, change):
    sidecar = copy.with_name("train.beton.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    with pytest.raises(UsageError, match=r"write (it|the FFCV file) again"):
        read_listing(copy)


def test_a_file_that_is_not_there(installed, tmp_path):
    with pytest.raises(UsageError, match=r"no FFCV file .*prepare\.py"):
        open_beton(tmp_path / "x.beton")


def test_a_flipped_bit_is_found_by_the_hash(copy):
    sample = open_beton(copy).samples[4]
    with open(copy, "r+b") as file:
        file.seek(sample["start"] + sample["nbytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UsageError, match="SHA-256"):
        verify_beton(copy, progress=False)


def test_a_payload_that_does_not_decode_ends_the_run(copy, loaders):
    sample = open_beton(copy).samples[4]
    with open(copy, "r+b") as file:
        file.seek(sample["start"])
        file.write(bytes(int(sample["nbytes"])))
    catalog = catalog_of(copy)
    order = Order(catalog.indices, 0, 4, shuffle=False, drop_last=False)
    loader = loaders(catalog, order, CentreCrop(AugmentConfig(size=SIZE)))
    iterator = loader.iterate()
    next(iterator)
    with pytest.raises(UsageError, match=rf"train\.beton' is damaged: sample {sample['id']} "):
        next(iterator)


def test_writing_is_all_or_nothing(installed, folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "train", images / "train")
    broken = images / "train/dog/15.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    source = open_catalog(DataConfig(root=str(images), cache=str(tmp_path / "cache")), "train")
    target = tmp_path / "out"
    with pytest.raises(UsageError, match=r"15\.jpg does not decode .*prepare\.py"):
        write_beton(source, target / "train.beton", progress=False)
    assert list(target.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_beton(source, tmp_path / "file/train.beton", progress=False)


def test_what_cannot_be_written(written, source, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="an FFCV file already"):
        write_beton(catalog_of(written["jpg"]), tmp_path / "x.beton", progress=False)
    with pytest.raises(UsageError, match="give jpg, raw, smart or proportion"):
        write_beton(source, tmp_path / "x.beton", "png", progress=False)
    monkeypatch.setattr(beton_files, "PAGE", 1 << 12)
    with pytest.raises(UsageError, match="exceed an FFCV page of 4,096: store JPEG, or set max_resolution"):
        write_beton(source, tmp_path / "x.beton", "raw", progress=False)


def test_loader_and_data_must_fit(written, source, loaders):
    augment = SimCLR(AugmentConfig(size=SIZE), 0)
    with pytest.raises(UsageError, match=r"reads \.beton files, .* set loader\.kind=dali"):
        loaders(source, Order(source.indices, 0, 4), augment)
    with pytest.raises(UsageError, match="lacks 1 samples of the order, the first is 999"):
        loaders(catalog_of(written["jpg"]), Order(np.append(source.indices, 999), 0, 4), augment)


# Pixels ------------------------------------------------------------------------------------------------------------


def test_crop_resize_is_exact_antialiased_bilinear(installed):
    """Against torch in float64, shrinking, enlarging and both at once: half a grey level, the rounding."""
    random = np.random.default_rng(0)
    for _ in range(150):
        height, width, size = (int(x) for x in random.integers((1, 1, 8), (90, 90, 50)))
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        crop = torch.from_numpy(pixels[top : top + h, left : left + w]).double().permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        expected = expected[0].permute(1, 2, 0).numpy()
        for flip in (False, True):
            view = _crop_resize(pixels, (top, left, h, w), flip, size)
            assert abs(view - (expected[:, ::-1] if flip else expected)).max() < 0.501


def _crop_resize(pixels: np.ndarray, box: tuple[int, ...], flip: bool, size: int) -> np.ndarray:
    """One image through the loader's kernel, as raw pixels in a file of their own."""
    samples = np.zeros(1, beton_files.SAMPLE)
    samples["height"], samples["width"], samples["nbytes"] = *pixels.shape[:2], pixels.size
    data, views = pixels.reshape(-1).copy(), np.empty((1, 1, size, size, 3), np.uint8)
    data.flags.writeable = False
    boxes, flips = np.array(box, np.int32).reshape(1, 1, 4), np.array([[flip]])
    ffcv._decode_views(data, samples, boxes, flips, 0, 1, views, np.zeros(1, bool))
    return views[0, 0]


@pytest.mark.parametrize(("mode", "most"), [("raw", 0.4), ("jpg", 2.0), ("proportion", 2.0)])
def test_crops_meet_the_reference(written, source, loaders, mode, most):
    augment = SimCLR(AugmentConfig(size=SIZE, jitter_p=0, grey=0, blur=0), 3)
    catalog = catalog_of(written[mode])
    batch = batches(loaders(catalog, Order(catalog.indices, 1, IMAGES), augment), 0, 1)[0]
    found = errors(batch, source, augment)
    plain = np.array([i != source.indices[3] and i != source.indices[11] for i in batch.index])  # not encoded anew
    assert found[:, plain].max() < most and found.max() < 5


def test_whole_augmentation_meets_the_reference(written, source, loaders):
    augment = SimCLR(AugmentConfig(size=SIZE, solarise=0.2, views=3), 3)
    catalog = catalog_of(written["raw"])
    batch = batches(loaders(catalog, Order(catalog.indices, 1, IMAGES), augment), 0, 1)[0]
    assert batch.images.shape == (3, IMAGES, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
    assert batch.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    found = errors(batch, source, augment)
    assert np.median(found) < 0.5 and found.max() < 3, found
    assert not torch.equal(batch.images[0], batch.images[1])


def test_the_same_batches_as_dali_from_the_folder(written, source, loaders):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    augment = SimCLR(AugmentConfig(size=SIZE), 5)
    theirs = batches(loaders(source, Order(source.indices, 2, 8), augment, kind="dali"), 1, 4)
    catalog = catalog_of(written["jpg"])
    ours = batches(loaders(catalog, Order(catalog.indices, 2, 8), augment), 1, 4)
    reencoded = {int(source.indices[3]), int(source.indices[11])}
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        plain = [i for i, where in enumerate(a.index.tolist()) if where not in reencoded]
        difference = 255 * (a.images - b.images)[:, plain].abs().mean(dim=(2, 3, 4))
        assert difference.median() < 1.5 and difference.max() < 5, difference


# The order ---------------------------------------------------------------------------------------------------------


def test_seeking_and_threads_change_nothing(written, loaders):
    catalog, augment = catalog_of(written["proportion"]), SimCLR(AugmentConfig(size=SIZE), 3)
    order = Order(catalog.indices, 1, 6)
    straight = batches(loaders(catalog, order, augment), 0, 11)  # over three epochs
    for threads, start in ((1, 0), (3, 4), (2, 9)):
        loader = loaders(catalog, order, augment, threads=threads)
        assert_equal(batches(loader, start, 11 - start), straight[start:])
        assert_equal(batches(loader, 2, 1), straight[2:3])  # a second call starts anew
    for position, batch in enumerate(straight):
        assert batch.index.tolist() == order.at(position)[1].tolist()
        assert batch.labels.tolist() == catalog.labels[batch.index].tolist()


def test_ranks_share_the_batch(written, loaders):
    catalog, augment = catalog_of(written["jpg"]), SimCLR(AugmentConfig(size=SIZE), 3)
    order = Order(catalog.indices, 1, 8)
    whole = batches(loaders(catalog, order, augment), 0, 3)
    parts = [batches(loaders(catalog, order, augment, rank, 2), 0, 3) for rank in (0, 1)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([left.images, right.images], dim=1))
        assert torch.equal(batch.index, torch.cat([left.index, right.index]))


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (11, 2)])
def test_evaluation_sees_every_image_once(written, source, loaders, batch, world):
    """The last batch is partial; 23 images in batches of 11 on two ranks leave one rank an empty one."""
    catalog, augment = catalog_of(written["raw"]), CentreCrop(AugmentConfig(size=SIZE))
    order = Order(catalog.indices, 0, batch, shuffle=False, drop_last=False)
    passes = [list(loaders(catalog, order, augment, rank, world).iterate()) for rank in range(world)]
    assert all(len(seen) == len(order) for seen in passes)
    ids = [i for position in zip(*passes, strict=True) for part in position for i in part.index.tolist()]
    assert ids == source.indices.tolist()
    if world == 2 and batch == 11:
        assert passes[1][-1].images.shape == (1, 0, 3, SIZE, SIZE)
    assert errors(passes[0][0], source, augment).max() < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_colours_on_the_gpu(written, loaders):
    catalog, augment = catalog_of(written["jpg"]), SimCLR(AugmentConfig(size=SIZE), 3)
    order = Order(catalog.indices, 1, 8)
    on_cpu = batches(loaders(catalog, order, augment), 0, 3)
    on_gpu = batches(loaders(catalog, order, augment, device=torch.device("cuda")), 0, 3)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.images.is_cuda and torch.equal(a.index, b.index.cpu())
        assert (a.images - b.images.cpu()).abs().mean() < 1e-3


def test_the_sidecar_is_plain_json(written):
    described = json.loads(written["jpg"].with_name("train.beton.json").read_text())
    assert described["count"] == IMAGES + 1 and described["samples"] == IMAGES
    assert described["bytes"] == written["jpg"].stat().st_size and len(described["sha256"]) == 64
