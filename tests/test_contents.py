"""Contents that compiled code reads: the same bytes, sizes and images as those read one by one, and what it leaves."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data.augment import AugmentConfig, CentreCrop, SimCLR, apply_reference
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.contents import Arrays, Contents, Files, _look, contents_of
from fasttrain.data.damage import is_cut
from fasttrain.data.header import header_size
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.data.prefetch import slices
from fasttrain.errors import UsageError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fasttrain.data import pipelines
from fasttrain.data.pipelines import Images, OnCpu, OnGpu

SIZE, COUNT, BATCH = 24, 24, 8
CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def encode(seed: int, kind: str = "JPEG", mode: str = "RGB", **settings) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((40 + seed % 9, 32 + seed % 5), Image.BICUBIC).convert(mode).save(
        file, kind, **settings
    )
    return file.getvalue()


def array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).copy()


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, set to a marker, or left out; its end as it was."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        kind, at = random.integers(3), int(random.integers(2, len(data) - 12))
        if kind == 0:
            data[at] = random.integers(256)
        elif kind == 1:
            data[at : at + 2] = bytes([0xFF, random.choice([0xC0, 0xC4, 0xDA, 0xDB, 0xE1, 0xEE, 0xFE])])
        else:
            del data[at : at + int(random.integers(1, 30))]
    return bytes(data)


WHOLE = {
    "jpeg": encode(1, quality=90),
    "progressive": encode(2, progressive=True),
    "grey": encode(3, mode="L"),
    "png": encode(4, "PNG"),
    "png with alpha": encode(5, "PNG", "RGBA"),
    "palette": encode(6, "PNG", "P"),
}
LEFT = {
    "cmyk": encode(1, mode="CMYK"),
    "tail": encode(2) + b"tail",
    "bmp": encode(3, "BMP"),
    "tiff": encode(4, "TIFF"),
    "webp": encode(5, "WEBP"),
    "pnm": encode(6, "PPM"),
    "empty": b"",
    "start": b"\xff\xd8\xff\xd9",
    "cut": encode(1)[:-1],
    "cut png": encode(1, "PNG")[:-9],
    "no pixel": encode(1, "PNG")[:16] + bytes(8) + encode(1, "PNG")[24:],
    "bomb": encode(1, "PNG")[:16] + b"\xff" * 8 + encode(1, "PNG")[24:],
    "twelve bits": encode(1).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "html": b"<!DOCTYPE html>" * 9,
}


@pytest.mark.parametrize("name", WHOLE)
def test_sizes_of_whole_files_are_the_headers(name):
    assert _look(array(WHOLE[name])) == header_size(array(WHOLE[name]))


@pytest.mark.parametrize("name", LEFT)
def test_what_is_odd_is_left_to_others(name):
    assert _look(array(LEFT[name])) == (0, 0)


def test_of_damaged_bytes_it_never_says_what_the_header_does_not():
    random, agreed = np.random.default_rng(0), 0
    for content in itertools.islice(itertools.cycle(WHOLE.values()), 3000):
        content = array(damaged(content, random))
        height, width = _look(content)
        if height:
            assert header_size(content) == (height, width) and not is_cut(content)
            agreed += 1
    assert 1000 < agreed < 3000


def write(root: Path, contents: list[bytes]) -> Catalog:
    for number, content in enumerate(contents):
        path = root / "train" / f"{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return open_catalog(DataConfig(root=str(root), cache=str(root / "cache")), "train")


def known(catalog: Catalog) -> Files:
    files = contents_of(catalog)
    for index in range(len(catalog.labels)):
        files.learn(index, catalog.read(index))
    return files


@pytest.mark.parametrize("longest", [100, 100_000])
def test_rows_hold_the_files_bytes(tmp_path, longest):
    """Padded with zeros; where one is much longer than the others, each by itself."""
    comment = b"\xff\xfe" + (longest % 60_000).to_bytes(2, "big") + bytes(longest % 60_000 - 2)
    contents = [encode(n) for n in range(COUNT)]
    contents[5] = contents[5][:2] + comment * (1 + longest // 60_000) + contents[5][2:]
    catalog = write(tmp_path, contents)
    files, ids = known(catalog), np.random.default_rng(0).permutation(COUNT)
    rows = files.rows(ids)
    assert [list(files.read(ids, rows, part)) for part in (slice(0, 9), slice(9, COUNT))] == [[], []]
    assert rows.done.all() and rows.sizes.tolist() == [[*header_size(catalog.read(i))] for i in ids]
    assert all((part == catalog.read(i)).all() for part, i in zip(rows.apart(), ids, strict=True))
    together = rows.together()
    if longest == 100:
        assert together.shape[1] == max(map(len, contents)) + 1
        assert all(not row[length:].any() for row, length in zip(together, rows.lengths, strict=True))
    else:
        assert isinstance(together, list) and len(rows.memory) == sum(map(len, contents)) + COUNT


def test_files_that_changed_or_are_odd_are_left_until_they_were_read_again(tmp_path):
    catalog = write(tmp_path, [encode(n) for n in range(10)])
    files, ids = known(catalog), np.arange(10)

    def left() -> list[int]:
        return files.read(ids, files.rows(ids), slice(0, 10)).tolist()

    assert left() == []
    paths = [Path(catalog.path(i)) for i in range(10)]
    paths[1].unlink()
    paths[2].write_bytes(encode(2) + b"more")
    paths[3].write_bytes(encode(3)[:-5])
    paths[4].write_bytes(bytes(len(encode(4))))
    paths[5].unlink()
    paths[5].mkdir()
    files.forget(6)
    assert left() == [1, 2, 3, 4, 5, 6]
    for index in (1, 2, 3, 4, 6):
        paths[index].write_bytes(encode(index + 20))
    assert left() == [1, 2, 3, 4, 5, 6]
    for index in (1, 2, 3, 4, 6):
        files.learn(index, catalog.read(index))
    paths[7].write_bytes(LEFT["webp"])
    files.learn(7, catalog.read(7))
    assert left() == [5, 7]


def test_a_manifest_says_how_long_files_are(tmp_path):
    catalog = write(tmp_path, [encode(n) for n in range(6)])
    assert contents_of(catalog).rows(np.arange(6)).lengths.tolist() == [0] * 6
    object.__setattr__(catalog, "nbytes", np.array([os.path.getsize(catalog.path(n)) for n in range(6)]))
    ids = np.array(catalog.indices)
    files = contents_of(catalog)
    assert len(files.read(ids, files.rows(ids), slice(0, 6))) == 0


def test_arrays_are_gathered_and_what_is_no_catalogue_is_left():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    arrays, ids = Arrays(pixels), np.array([7, 0, 3])
    rows = arrays.rows(ids)
    assert len(arrays.read(ids, rows, slice(0, 2))) == 0 and rows.done.tolist() == [True, True, False]
    arrays.read(ids, rows, slice(2, 3))
    assert (rows.together() == pixels[ids]).all() and rows.sizes.tolist() == [[4, 6]] * 3
    assert type(contents_of(object())) is Contents
    assert Contents().read(ids, Contents().rows(ids), slice(1, 3)).tolist() == [1, 2]


@pytest.mark.parametrize(("length", "count"), [(0, 4), (3, 4), (4, 4), (10, 4), (512, 7)])
def test_slices_cover_all_once_and_none_is_empty(length, count):
    parts = [list(range(length))[part] for part in slices(length, count)]
    assert [*itertools.chain(*parts)] == list(range(length)) and len(parts) == min(length, count)
    assert all(parts) and max(map(len, parts), default=0) - min(map(len, parts), default=0) <= 1


@pytest.mark.parametrize("views", [1, 2])
def test_a_padded_batch_is_decoded_as_a_list_is_bit_for_bit(views):
    """JPEGs and PNGs together; what was decoded stays what it was while later batches are."""
    files = [*WHOLE.values(), *(encode(n, quality=80) for n in range(10, 20))]
    lengths = np.array([len(content) for content in files])
    padded = np.zeros((len(files), lengths.max() + 1), np.uint8)
    for row, content in zip(padded, files, strict=True):
        row[: len(content)] = array(content)
    listed = [array(content) for content in files]
    sizes = np.array([header_size(content) for content in listed], np.int32)
    ids = np.arange(len(files))
    draws = SimCLR(AugmentConfig(size=SIZE, views=views), 0).draw(0, ids, sizes)
    decoding, taken = OnCpu(len(files), 2, views == 1), []
    for contents in (padded, listed, padded, listed):
        images = Images(ids, contents, lengths, sizes, draws, [])
        decoding.start(images)
        taken.append(decoding.collect(images))
    for whole in taken[1:]:
        assert all((a == b).all() for a, b in zip(whole[:3], taken[0][:3], strict=True))


def test_damaged_files_are_decoded_or_refused_alike_whether_padded_or_not():
    random, decoding, refused = np.random.default_rng(1), None, 0

    def decode(content: np.ndarray, size: tuple[int, int]) -> bytes | None:
        nonlocal decoding
        decoding = decoding or OnCpu(1, 1, False)
        sizes = np.array([size], np.int32)
        draws = CentreCrop(AugmentConfig(size=SIZE)).draw(0, np.zeros(1, int), sizes)
        images = Images(np.zeros(1, int), [content], np.array([len(content)]), sizes, draws, [])
        try:
            decoding.start(images)
            return decoding.collect(images).pixels.tobytes()
        except RuntimeError:
            decoding = None

    for content in itertools.islice(itertools.cycle(WHOLE.values()), 150):
        content = array(damaged(content, random))
        size = _look(content)
        if size[0]:
            plain, padded = (decode(np.concatenate([content, np.zeros(n, np.uint8)]), size) for n in (0, 500))
            assert plain == padded
            refused += plain is None
    assert refused > 20


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_gpus_views_on_a_cpu_are_the_references(monkeypatch, views):
    monkeypatch.setattr(pipelines, "_MIXED", {"device": "cpu"})
    contents = [array(encode(n, quality=90)) for n in range(BATCH)]
    sizes, ids = np.array([header_size(content) for content in contents], np.int32), np.arange(BATCH)
    augment = SimCLR(AugmentConfig(size=SIZE, views=views, jitter=0, grey=0, blur=0), 2)
    images = Images(ids, contents, np.array([*map(len, contents)]), sizes, augment.draw(0, ids, sizes), [])

    def make() -> OnGpu:
        return OnGpu(BATCH, 1, None, True, views == 1, views, SIZE)

    (decoding := make()).start(images)
    for view, pixels in enumerate(decoding.collect(images)):
        assert pixels.shape == (BATCH, SIZE, SIZE, 3) and pixels.dtype == torch.uint8
        for n, content in enumerate(contents):
            whole = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            expected = 255 * apply_reference(whole, images.draws.take((n, view)), SIZE)
            assert abs(pixels[n].numpy() - expected).mean() < 2.5
    for lie in (sizes + 1, sizes[:, ::-1]):
        (decoding := make()).start(images._replace(sizes=lie))
        with pytest.raises(RuntimeError):
            decoding.collect(images._replace(sizes=lie))


@pytest.fixture
def loaders():
    """A factory of loaders that are closed in the end."""
    opened = []

    def make(catalog, views=2, device=CPU, kind="dali", **settings):
        order, augment = Order(catalog.indices, 1, BATCH), SimCLR(AugmentConfig(size=SIZE, views=views), 3)
        config = LoaderConfig(kind=kind, threads=2, **settings)
        opened.append(make_loader(config, catalog, order, augment, device))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def batches(loader, start: int, count: int):
    return list(itertools.islice(loader.iterate(start), count))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_batch_is_the_same_however_it_was_read(loaders, tmp_path, views, device):
    """Singly and as a list in the first epoch, at once and as one array in the second; odd files in between."""
    contents = [*LEFT.values()][:6] + [*WHOLE.values()] + [encode(n) for n in range(COUNT - 12)]
    catalog, device = write(tmp_path, contents), torch.device(device)
    used, fresh = loaders(catalog, views, device), loaders(catalog, views, device)
    batches(used, 0, 3)
    for a, b in zip(batches(used, 3, 3), batches(fresh, 3, 3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert not used.bad.found


@pytest.mark.parametrize("other", [lambda content: content[::-1], lambda content: encode(77), lambda content: b""])
def test_a_file_that_changes_is_seen_as_it_is_in_the_next_epoch(loaders, tmp_path, other):
    catalog = write(tmp_path, [encode(n) for n in range(COUNT)])
    loader = loaders(catalog, bad_share=0.5)
    batches(loader, 0, 6)
    path = Path(catalog.path(4))
    path.write_bytes(other(path.read_bytes()))
    found = batches(loader, 9, 3)
    expected = batches(loaders(catalog, bad_share=0.5), 9, 3)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert set(loader.bad.found) == (set() if path.read_bytes() == encode(77) else {4})


def test_a_read_that_hangs_in_compiled_code_is_named_first(loaders, tmp_path):
    catalog = write(tmp_path, [encode(n) for n in range(COUNT)])
    loader = loaders(catalog, timeout=0.5)
    batches(loader, 0, 6)
    path = catalog.path(11)
    os.unlink(path)
    os.mkfifo(path)  # opening it waits for somebody who writes
    with pytest.raises(UsageError, match=rf"no batch for 0\.5 s while reading '{path}'"):
        batches(loader, 9, 3)
    writer = os.open(path, os.O_RDWR)
    os.unlink(path)
    os.close(writer)  # it is found to be empty, and then to be gone


@pytest.mark.parametrize(("views", "feeds"), [(1, 3), (2, 1), (3, 1)])
def test_how_often_a_batch_is_fed(loaders, tmp_path, monkeypatch, views, feeds):
    from nvidia.dali import Pipeline

    fed, real = [], Pipeline.feed_input
    monkeypatch.setattr(Pipeline, "feed_input", lambda self, *given: fed.append(given) or real(self, *given))
    loader = loaders(write(tmp_path, [encode(n) for n in range(COUNT)]), views)
    batches(loader, 0, 8)
    loader.close()
    contents = [data for name, data in fed if name == "content"]
    assert len(fed) == feeds * len(contents) and isinstance(contents[0], list)
    assert contents[5].shape[0] == BATCH and contents[5].ndim == 2


@pytest.mark.parametrize("views", [2, 3])
def test_images_are_the_resident_loaders_bit_for_bit(loaders, tmp_path, views):
    """The same decoder and, on a CPU, the same kernel."""
    catalog = write(tmp_path, [*WHOLE.values(), *(encode(n) for n in range(COUNT - 6))])
    ours, resident = (loaders(catalog, views, kind=kind) for kind in ("dali", "resident"))
    for a, b in zip(batches(ours, 0, 5), batches(resident, 0, 5), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
