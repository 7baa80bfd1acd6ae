"""The DALI loader: pixels against the plain reference, order and draws against every way of splitting the run."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig, CentreCrop, SimCLR, apply_reference
from fasttrain.data.header import header_size
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import UsageError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

SIZE = 48
CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class FakeCatalog:
    """Files (or pixels) in memory."""

    contents: list[np.ndarray]
    encoded: bool = True
    beton: None = None
    labels: np.ndarray = field(init=False)
    sizes: np.ndarray = field(init=False)

    def __post_init__(self):
        self.labels = np.arange(len(self.contents)) * 10
        self.sizes = np.zeros((len(self.contents), 2), np.int32)

    def read(self, index: int) -> np.ndarray:
        return self.contents[index]

    def path(self, index: int) -> str:
        return f"/images/{index}.jpg"


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth shading, a few edges and a little grain: uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((height, width, 3))
    for _ in range(6):
        wave = np.sin(random.uniform(-12, 12) * x + random.uniform(-12, 12) * y + random.uniform(0, 6))
        image += wave[..., None] * random.uniform(-30, 30, 3)
    disc = (x - random.uniform(0, 1)) ** 2 + (y - random.uniform(0, 1)) ** 2 < 0.06
    image[disc] += random.uniform(-80, 80, 3)
    return (image + 128 + random.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG") -> np.ndarray:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, quality=92)
    return np.frombuffer(file.getvalue(), np.uint8)


def decode(content: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def jpegs(n: int) -> FakeCatalog:
    random = np.random.default_rng(n)
    return FakeCatalog([encode(photograph(i, *random.integers(50, 150, 2))) for i in range(n)])


@pytest.fixture
def loaders():
    """A factory of loaders that are closed in the end."""
    opened = []

    def make(catalog, order, augment, *place, device=CPU, **settings):
        opened.append(
            make_loader(LoaderConfig(kind="dali", threads=2, **settings), catalog, order, augment, device, *place)
        )
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def batches(loader, start: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.iterate(start), count))


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def errors(batch: Batch, catalog: FakeCatalog, augment, epoch: int = 0) -> np.ndarray:
    """Mean absolute difference to the reference in grey levels, [V, B]."""
    ids = batch.index.cpu().numpy()
    pixels = [decode(catalog.contents[i]) if catalog.encoded else catalog.contents[i] for i in ids]
    draws = augment.draw(epoch, ids, np.array([image.shape[:2] for image in pixels]))
    found = batch.images.permute(0, 1, 3, 4, 2).cpu().numpy()
    return np.array(
        [
            [
                255 * abs(found[view, i] - apply_reference(pixels[i], draws.take((i, view)), augment.size)).mean()
                for i in range(len(ids))
            ]
            for view in range(augment.views)
        ]
    )


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_images_are_the_references(loaders, views, device):
    """The resize differs at the border alone, where DALI sees a little beyond the box: under one level without colour;
    strong contrast and saturation enlarge it. A GPU's JPEG decoder also interpolates chroma otherwise."""
    catalog, order = jpegs(16), Order(np.arange(16), 0, 8)
    plain = SimCLR(AugmentConfig(views=views, size=SIZE, jitter=0, grey=0, blur=0), 5)
    whole = SimCLR(AugmentConfig(views=views, size=SIZE, solarise=0.2), 5)
    looser = 1 if device == "cpu" else 4
    for augment, typical, worst in ((plain, looser, 2.5 * looser), (whole, looser, 6 * looser)):
        (batch,) = batches(loaders(catalog, order, augment, device=torch.device(device)), 0, 1)
        assert batch.images.shape == (views, 8, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
        assert batch.images.permute(0, 1, 3, 4, 2).is_contiguous()
        assert batch.labels.tolist() == [10 * i for i in batch.index.tolist()]
        found = errors(batch, catalog, augment)
        assert found.mean() < typical and found.max() < worst
    assert (catalog.sizes[batch.index.cpu()] > 0).all()  # read from the headers, kept for later


def test_pixels_without_a_file(loaders):
    random = np.random.default_rng(0)
    catalog = FakeCatalog([photograph(int(seed), 32, 32) for seed in random.integers(0, 1000, 12)], encoded=False)
    augment = SimCLR(AugmentConfig(size=32, jitter=0.5, blur=0), 0)
    (batch,) = batches(loaders(catalog, Order(np.arange(12), 0, 12), augment), 0, 1)
    assert errors(batch, catalog, augment).max() < 5
    centre = CentreCrop(AugmentConfig(size=32, eval_crop=1.0))
    order = Order(np.arange(12), 0, 12, shuffle=False, drop_last=False)
    (batch,) = loaders(catalog, order, centre).iterate()
    assert torch.equal(
        (batch.images[0] * 255).round().byte(), torch.tensor(np.stack(catalog.contents)).permute(0, 3, 1, 2)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_any_split_of_the_run_gives_the_same_images(loaders, device):
    """Bit for bit: one rank and two, from the beginning and from within, over the border of an epoch."""
    catalog, augment, order = jpegs(20), SimCLR(AugmentConfig(size=SIZE), 3), Order(np.arange(20), 9, 6)
    loaders = partial(loaders, device=torch.device(device))
    one = loaders(catalog, order, augment)
    assert len(one) == 3
    whole = batches(one, 0, 7)
    ids = [batch.index for batch in whole]
    assert len(torch.cat(ids[:3]).unique()) == 18 and not torch.equal(torch.cat(ids[:3]), torch.cat(ids[3:6]))
    assert_equal(batches(one, 4, 3), whole[4:])  # the same loader seeks
    assert_equal(batches(loaders(catalog, order, augment), 2, 5), whole[2:])  # a new process resumes
    halves = [batches(loaders(catalog, order, augment, rank, 2), 1, 4) for rank in (0, 1)]
    joined = [
        Batch(torch.cat([a[0], b[0]], 1), *map(torch.cat, zip(a[1:3], b[1:3], strict=True)))
        for a, b in zip(*halves, strict=True)
    ]
    assert_equal(joined, whole[1:5])


def test_batches_that_are_kept_do_not_change(loaders):
    loader = loaders(jpegs(12), Order(np.arange(12), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0))
    kept, copies = [], []
    for batch in itertools.islice(loader.iterate(), 6):
        kept.append(batch)
        copies.append(Batch(*(tensor.clone() for tensor in batch[:3])))
    assert_equal(kept, copies)


def test_evaluation_is_one_pass_with_the_last_batch_short(loaders):
    catalog, augment = jpegs(9), CentreCrop(AugmentConfig(size=SIZE))
    order = Order(np.arange(9), 0, 4, shuffle=False, drop_last=False)
    ranks = [loaders(catalog, order, augment, rank, 2) for rank in (0, 1)]
    found = [[batch.index.tolist() for batch in loader.iterate()] for loader in ranks]
    assert found == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], []]]
    *_, empty = ranks[1].iterate()
    assert empty.images.shape == (1, 0, 3, SIZE, SIZE) and empty.labels.shape == (0,)
    first = next(ranks[0].iterate())
    assert errors(first, catalog, augment).max() < 1
    assert [batch.index.tolist() for batch in ranks[0].iterate(2)] == [[8]]


@pytest.mark.parametrize("views", [1, 2])
def test_unusual_files_become_rgb(loaders, views):
    image = Image.fromarray(photograph(1, 90, 70))
    contents = [encode(image.convert("CMYK")), encode(image.convert("L")), encode(image, "PNG")]
    contents += [
        encode(image.convert("RGBA"), "PNG"),
        encode(image.convert("L"), "PNG"),
        encode(image.convert("P"), "PNG"),
    ]
    catalog, augment = FakeCatalog(contents), SimCLR(AugmentConfig(views=views, size=SIZE, jitter=0, grey=0, blur=0), 0)
    (batch,) = batches(loaders(catalog, Order(np.arange(6), 0, 6), augment), 0, 1)
    assert errors(batch, catalog, augment).max() < 2.5


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("said", [(300, 300), (70, 90), (45, 35)], ids=["larger", "turned", "smaller"])
def test_a_header_that_lies_about_the_size_is_a_bad_image_not_a_crash(loaders, monkeypatch, views, said):
    """Boxes are drawn for what the header says: none reaches pixels that are not there."""
    catalog = FakeCatalog([encode(photograph(i, 90, 70)) for i in range(8)])
    liar = catalog.contents[5]
    monkeypatch.setattr("fasttrain.data.dali.header_size", lambda c: said if c is liar else header_size(c))
    order, augment = Order(np.arange(8), 0, 8, shuffle=False), SimCLR(AugmentConfig(views=views, size=SIZE), 0)
    loader = loaders(catalog, order, augment, bad_share=0.2)
    (batch,) = batches(loader, 0, 1)
    assert set(loader.bad.found) == {5} and 5 not in batch.index.tolist()
    assert batch.index.tolist()[:5] == [0, 1, 2, 3, 4] and batch.images.isfinite().all()


@pytest.mark.parametrize("views", [1, 2])
def test_tiff_files_are_shown_as_stored_whatever_their_orientation(loaders, views):
    pictures, contents = [photograph(i, 40, 160) for i in range(8)], []
    for orientation, picture in enumerate(pictures, 1):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "TIFF", tiffinfo={274: orientation})
        contents.append(np.frombuffer(file.getvalue(), np.uint8))
    catalog = FakeCatalog(contents)
    augment = SimCLR(AugmentConfig(views=views, size=SIZE, jitter=0, grey=0, blur=0), 0)
    (batch,) = batches(loaders(catalog, Order(np.arange(8), 0, 8), augment), 0, 1)
    assert batch.index.sort().values.tolist() == list(range(8))
    as_stored = FakeCatalog(pictures, encoded=False)
    assert errors(batch, as_stored, augment).max() < 2.5


@pytest.mark.parametrize("views", [1, 2])
def test_a_file_that_takes_another_size_but_not_another_length_is_seen_as_it_is(loaders, views):
    large, small = encode(photograph(0, 120, 100)), encode(photograph(1, 40, 150))
    length = max(len(large), len(small)) + 9
    padded = [np.concatenate([content, np.zeros(length - len(content), np.uint8)]) for content in (large, small)]
    catalog = FakeCatalog([padded[0]] * 4)
    order = Order(np.arange(4), 0, 4)
    augment = SimCLR(AugmentConfig(views=views, size=SIZE, jitter=0, grey=0, blur=0), 0)
    loader = loaders(catalog, order, augment)
    (batch,) = batches(loader, 0, 1)
    assert errors(batch, catalog, augment).max() < 2.5
    catalog.contents[:] = [padded[1]] * 4
    (batch,) = batches(loader, 0, 1)
    assert errors(batch, catalog, augment).max() < 2.5 and not loader.bad.found


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_file_that_does_not_decode_is_named(loaders, damage):
    catalog = jpegs(8)
    good, content = catalog.contents[5], catalog.contents[5]
    catalog.sizes[5] = decode(content).shape[:2]
    catalog.contents[5] = {"cut": content[:700], "garbage": content[::-1].copy(), "empty": content[:0]}[damage]
    loader = loaders(catalog, Order(np.arange(8), 0, 4, shuffle=False), SimCLR(AugmentConfig(size=SIZE), 0))
    with pytest.raises(UsageError, match=r"'/images/5\.jpg'.*launch/prepare\.py") as caught:
        batches(loader, 0, 2)
    assert "\n" not in str(caught.value)
    catalog.contents[5] = good
    assert batches(loader, 1, 1)[0].index.tolist() == [4, 5, 6, 7]  # the loader is of use again


def test_an_unreadable_header_and_a_lost_file_are_named(loaders):
    catalog = jpegs(4)
    catalog.contents[2] = np.zeros(100, np.uint8)
    order, augment = Order(np.arange(4), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0)
    with pytest.raises(UsageError, match=r"'/images/2\.jpg'.*launch/prepare\.py"):
        batches(loaders(catalog, order, augment), 0, 1)

    def lost(index):
        raise FileNotFoundError(2, "No such file or directory")

    catalog.read = lost
    with pytest.raises(UsageError, match=r"'/images/\d\.jpg' \(No such file"):
        batches(loaders(catalog, order, augment), 0, 1)


def test_other_errors_arrive_as_they_are(loaders):
    catalog = jpegs(4)
    catalog.read = lambda index: {}[index]
    with pytest.raises(KeyError):
        batches(loaders(catalog, Order(np.arange(4), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0)), 0, 1)


def test_a_read_that_hangs_ends_in_a_line_that_names_it(loaders):
    catalog, release = jpegs(4), threading.Event()
    read = catalog.read
    catalog.read = lambda index: read(index) if index != 3 else release.wait(60)
    loader = loaders(catalog, Order(np.arange(4), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0), timeout=0.5)
    with pytest.raises(UsageError, match=r"no batch for 0\.5 s while reading .*'/images/3\.jpg'.*timeout"):
        batches(loader, 0, 1)
    catalog.read = read
    release.set()


def test_abandoned_iterators_leave_no_thread(loaders):
    before = threading.active_count()
    loader = loaders(jpegs(8), Order(np.arange(8), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0))
    first = loader.iterate()
    next(first)
    second = loader.iterate(1)
    with pytest.raises(RuntimeError, match="abandoned"):
        list(first)
    next(second)
    loader.close()
    del loader, first, second
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_the_interpreter_exits_midway(tmp_path: Path):
    """With a batch under way, an iterator alive, and a reader of another loader stuck for good."""
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(encode(photograph(i, 60, 60)).tobytes())
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_dali import *
        from fasttrain.data.prefetch import Workers
        order, augment = Order(np.arange(8), 0, 4), SimCLR(AugmentConfig(size=SIZE), 0)
        loader = make_loader(LoaderConfig(kind="dali", threads=2), jpegs(8), order, augment, CPU)
        iterator = loader.iterate()
        next(iterator)
        stuck = Workers(1).submit(time.sleep, 1000)
        print("left")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.split() == ["left"], done.stderr


def test_an_ffcv_file_is_refused():
    catalog = jpegs(1)
    catalog.beton = "train.beton"
    with pytest.raises(UsageError, match=r"train\.beton.*ffcv"):
        make_loader(LoaderConfig(kind="dali"), catalog, Order(np.arange(1), 0, 1), SimCLR(AugmentConfig(), 0), CPU)


def test_a_failure_long_before_its_turn_does_not_hide(loaders):
    """The bad file lies in a batch that DALI meets while earlier ones wait; seeking away from it is possible."""
    catalog = jpegs(24)
    catalog.sizes[9] = decode(catalog.contents[9]).shape[:2]
    catalog.contents[9] = catalog.contents[9][:300]
    loader = loaders(catalog, Order(np.arange(24), 0, 4, shuffle=False), SimCLR(AugmentConfig(size=SIZE), 0))
    iterator = loader.iterate(0)
    with pytest.raises(UsageError, match=r"'/images/9\.jpg'"):
        for _ in range(3):
            next(iterator)
            time.sleep(0.2)
    loader.iterate(1)
    time.sleep(0.3)
    assert [batch.index[0].item() for batch in batches(loader, 3, 3)] == [12, 16, 20]


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_ranks_of_a_machine_share_its_cores(monkeypatch, variable):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert LoaderConfig().thread_count() == 16 and LoaderConfig(threads=3).thread_count() == 3
    monkeypatch.setenv(variable, "4")
    assert LoaderConfig().thread_count() == 4
