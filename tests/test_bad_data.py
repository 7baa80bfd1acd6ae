"""Images that turn out bad while a run goes on: what is shown instead is the same however the run is split."""

from __future__ import annotations

import io
import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data import Batch
from fasttrain.data import beton as beton_files
from fasttrain.data.augment import AugmentConfig, CentreCrop, SimCLR
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.damage import BadImages, is_cut
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import TRIES, Order
from fasttrain.data.verify import verify
from fasttrain.errors import UsageError
from tests.ranks import run_ranks

IMAGES, BATCH, SIZE, SEED = 600, 40, 16, 3


def encode(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    draw = np.random.default_rng(number)
    small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((40 + number % 7, 32), Image.BICUBIC).convert(mode).save(file, kind, quality=95)
    return file.getvalue()


def garbage(length: int) -> bytes:
    return np.random.default_rng(9).integers(0, 256, length, dtype=np.uint8).tobytes()


SIX_KINDS = {  # file's bytes -> what is there instead
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "last bytes missing": lambda content: content[:-3],
    "garbage": lambda content: garbage(len(content)),
    "html": lambda content: b"<!DOCTYPE html><html><body>404</body></html>" * 9,
}
MORE_KINDS = {
    "gif": lambda content: encode(1, "GIF", "P"),
    "only the decoder sees it": lambda content: content[:200] + bytes(len(content) - 202) + b"\xff\xd9",
    "progressive without its end": lambda content: content[:2] + content[2:-2].replace(b"\xff\xd9", b"") + b"\xff\xdb",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    for number in range(IMAGES):
        path = root / "train" / ("cat" if number % 2 else "dog") / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    return root


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def open_folder(folder: Path) -> Catalog:
    return open_catalog(DataConfig(root=str(folder), cache=str(folder.parent / "cache")), "train")


@pytest.fixture
def write_manifest(monkeypatch):
    monkeypatch.setattr("fasttrain.data.verify._map", lambda function, items, workers: map(function, items))
    return lambda folder: verify(open_folder(folder), folder.parent / "cache")


def spoil(catalog: Catalog, kinds: dict, first: int = 17, apart: int = 90) -> set[int]:
    """One image of each kind; returns their ids."""
    ids = [first + apart * n for n in range(len(kinds))]
    for index, damage in zip(ids, kinds.values(), strict=True):
        path = Path(catalog.path(index))
        content = damage(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return set(ids)


@pytest.fixture
def loaders():
    """A factory of loaders that are closed in the end."""
    opened = []

    def make(catalog, order, *place, views=2, augment=None, **settings):
        kind = "ffcv" if catalog.beton is not None else "dali"
        if kind == "dali":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        augment = augment or SimCLR(AugmentConfig(size=SIZE, views=views), SEED)
        config = LoaderConfig(kind=kind, threads=2, **settings)
        opened.append(make_loader(config, catalog, order, augment, torch.device("cpu"), *place))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def order_of(catalog: Catalog, batch: int = BATCH, **settings) -> Order:
    return Order(catalog.indices, SEED, batch, **settings)


def batches(loader, start: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.iterate(start), count))


def shown(order: Order, position: int, bad: set[int]) -> list[int]:
    """What micro-batch ``position`` must show, from the definition."""
    epoch, ids = order.at(position)
    return [next(i for i in order.candidates(epoch, int(index)) if i not in bad) for index in ids]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def check_every_split(loaders, reopen, untouched: list[Batch], bad: set[int]) -> None:
    """Whole, rerun, resumed within an epoch, and on two ranks: the same images, those of the definition."""
    order, count = order_of(reopen()), len(untouched)
    loader = loaders(reopen(), order)
    whole = batches(loader, 0, count)
    for position, (batch, before) in enumerate(zip(whole, untouched, strict=True)):
        assert batch.index.tolist() == shown(order, position, bad)
        assert batch.labels.tolist() == reopen().labels[batch.index].tolist()
        same = batch.index == before.index
        assert (~same).sum() == sum(i in bad for i in before.index.tolist())
        assert torch.equal(batch.images[:, same], before.images[:, same])
    assert set(loader.bad.found) == bad
    rerun = loaders(reopen(), order)
    assert_equal(batches(rerun, 0, count), whole)
    assert rerun.bad.found == loader.bad.found  # the reasons too
    assert_equal(batches(loaders(reopen(), order), count // 3, count - count // 3), whole[count // 3 :])
    ranks = [loaders(reopen(), order, rank, 2) for rank in (0, 1)]
    halves = [batches(rank, 0, count) for rank in ranks]
    assert ranks[0].bad.found | ranks[1].bad.found == loader.bad.found
    joined = [
        Batch(torch.cat([a[0], b[0]], 1), *map(torch.cat, zip(a[1:3], b[1:3], strict=True)))
        for a, b in zip(*halves, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("with_manifest", [False, True])
def test_six_kinds_in_a_hundredth_of_the_files(loaders, folder, write_manifest, with_manifest):
    """The manifest is older than the damage; without one, the damage is done after the folder was listed."""
    if with_manifest:
        write_manifest(folder)
    listed = open_folder(folder)
    untouched = batches(loaders(listed, order_of(listed)), 0, 20)  # an epoch is 15
    bad = spoil(listed, SIX_KINDS)
    assert len(bad) / IMAGES == 0.01

    def reopen() -> Catalog:
        return open_folder(folder) if with_manifest else replace(listed, sizes=np.zeros_like(listed.sizes))

    assert reopen().fingerprint == listed.fingerprint
    check_every_split(loaders, reopen, untouched, bad)


@pytest.mark.parametrize("views", [1, 2])
def test_what_only_the_decoder_notices(loaders, folder, views):
    """DALI is ended by these, and takes up the work again; one view is decoded in part, two from the whole."""
    catalog = open_folder(folder)
    bad = spoil(catalog, SIX_KINDS | MORE_KINDS, first=5, apart=61)
    order = order_of(catalog)
    loader = loaders(catalog, order, views=views, bad_share=0.1)
    whole = batches(loader, 0, 18)
    assert [batch.index.tolist() for batch in whole] == [shown(order, position, bad) for position in range(18)]
    assert set(loader.bad.found) == bad
    assert_equal(batches(loaders(catalog, order, views=views, bad_share=0.1), 11, 7), whole[11:])


def test_without_a_manifest_what_is_bad_before_the_start_is_no_crash_either(loaders, folder):
    bad = spoil(open_folder(folder), SIX_KINDS)
    catalog = open_folder(folder)
    left_out = {path for path, _ in catalog.excluded}
    assert len(left_out) == 1 and len(catalog) == IMAGES - 2  # the missing one is not listed, the empty one left out
    loader = loaders(catalog, order_of(catalog))
    seen = torch.cat([batch.index for batch in batches(loader, 0, 30)])
    assert len(loader.bad.found) == len(bad) - 2 and not set(seen.tolist()) & set(loader.bad.found)


@pytest.fixture(scope="module")
def beton(pristine, tmp_path_factory) -> Path:
    pytest.importorskip("ffcv.reader", reason="FFCV is not installed")
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    return beton_files.write_beton(open_folder(pristine), path, progress=False)


def test_six_kinds_of_damage_within_an_ffcv_file(loaders, beton, tmp_path):
    path = Path(shutil.copy(beton, tmp_path / "train.beton"))
    shutil.copy(f"{beton}.json", f"{path}.json")

    def reopen() -> Catalog:
        return open_catalog(DataConfig(root=str(path)), "train")

    untouched = batches(loaders(reopen(), order_of(reopen())), 0, 20)
    samples = beton_files.open_beton(path).samples
    kinds = {**SIX_KINDS, "missing": lambda content: bytes(len(content))}
    bad = {17 + 90 * n for n in range(6)}
    with open(path, "r+b") as file:
        for index, damage in zip(sorted(bad), kinds.values(), strict=True):
            start, length = int(samples[index]["start"]), int(samples[index]["nbytes"])
            file.seek(start)
            content = damage(file.read(length))
            file.seek(start)
            file.write(content[:length] + bytes(max(0, length - len(content))))
    check_every_split(loaders, reopen, untouched, bad)


def test_an_ffcv_file_that_is_cut_while_it_is_read_is_an_error_not_a_crash(loaders, beton, tmp_path):
    path = Path(shutil.copy(beton, tmp_path / "train.beton"))
    catalog = open_catalog(DataConfig(root=str(path)), "train")
    iterator = loaders(catalog, order_of(catalog)).iterate()
    next(iterator)
    time.sleep(1)  # the queue is full, nothing is being read
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UsageError, match=r"train\.beton' was cut to 1,000 bytes, from .* write the file again"):
        for _ in range(20):
            next(iterator)


def test_files_that_vanish_and_come_back_while_batches_flow(loaders, folder, caplog):
    catalog = open_folder(folder)
    order = order_of(catalog)
    loader = loaders(catalog, order)
    iterator = loader.iterate()
    next(iterator)
    late = order.at(14)[1][:3].tolist()
    for index in late:
        Path(catalog.path(index)).rename(f"{catalog.path(index)}.away")
    seen = [next(iterator).index.tolist() for _ in range(14)]
    assert seen == [shown(order, position, set(late)) for position in range(1, 15)]
    assert set(loader.bad.found) == set(late)
    assert all(catalog.path(index) in caplog.text for index in late) and "No such file" in caplog.text
    for index in late:
        Path(f"{catalog.path(index)}.away").rename(catalog.path(index))
    again = torch.cat([next(iterator).index for _ in range(15)][5:])  # the first may have been read before
    assert set(again.tolist()) == {int(i) for position in range(20, 30) for i in order.at(position)[1]}


def test_a_file_changed_after_its_manifest_is_replaced_and_one_without_is_shown(loaders, folder, write_manifest):
    order = order_of(open_folder(folder))
    other = encode(10_001)
    for expected in (False, True):
        catalog = open_folder(folder)
        loader = loaders(catalog, order)
        batches(loader, 0, 15)
        Path(catalog.path(100)).write_bytes(other)
        seen = [batch.index.tolist() for batch in batches(loader, 0, 15)]
        assert seen == [shown(order, position, {100} if expected else set()) for position in range(15)]
        if not expected:
            write_manifest(folder)
            other = encode(10_002)
    assert "changed since the manifest was made" in loader.bad.found[100]


def test_odd_but_sound_files_are_shown(loaders, folder):
    odd = {mode: lambda content, mode=mode: encode(3, mode=mode) for mode in ("CMYK", "L")}
    odd |= {kind: lambda content, kind=kind: encode(3, kind) for kind in ("PNG", "BMP", "TIFF", "WEBP", "PPM")}
    odd |= {"tail": lambda content: content + b"junk" * 9}
    catalog = open_folder(folder)
    spoil(catalog, odd, apart=70)
    order, loader = order_of(catalog), None
    loader = loaders(catalog, order)
    assert [batch.index.tolist() for batch in batches(loader, 0, 15)] == [order.at(i)[1].tolist() for i in range(15)]
    assert not loader.bad.found


@pytest.mark.parametrize("share", [0.0, 0.004, 0.005])
def test_beyond_the_budget_the_run_stops_and_names_the_files(loaders, folder, share):
    catalog = open_folder(folder)
    bad = spoil(catalog, dict(itertools.islice(SIX_KINDS.items(), 3)))
    order = order_of(catalog)
    loader = loaders(catalog, order, bad_share=share)
    if share == 0.005:
        assert len(batches(loader, 0, 15)) == 15 and set(loader.bad.found) == bad
        return
    with pytest.raises(UsageError, match=rf"loader\.bad_share={share:g} of 600 .*prepare\.py") as caught:
        batches(loader, 0, 15)
    assert "\n" not in str(caught.value)
    assert any(catalog.path(index) in str(caught.value) for index in bad)
    assert len(loader.bad.found) == int(share * IMAGES) + 1 or share


def test_a_lost_disk_ends_the_run_though_the_budget_is_all(loaders, folder):
    catalog = open_folder(folder)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=rf"No such file.*, nor any of {TRIES} others: restore"):
        batches(loaders(catalog, order_of(catalog), bad_share=1), 0, 1)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read(loaders, folder, monkeypatch, error):
    catalog = open_folder(folder)
    read = Catalog.read

    def refuse(self, index):
        if index == 100:
            raise error
        return read(self, index)

    monkeypatch.setattr(Catalog, "read", refuse)
    order = order_of(catalog)
    loader = loaders(catalog, order)
    assert [b.index.tolist() for b in batches(loader, 0, 15)] == [shown(order, i, {100}) for i in range(15)]
    assert error.strerror in loader.bad.found[100]


def test_evaluation_keeps_the_size_of_its_last_batch(loaders, folder):
    catalog = open_folder(folder)
    bad = spoil(catalog, SIX_KINDS, first=590, apart=1)
    order = order_of(catalog, batch=64, shuffle=False, drop_last=False)
    centre = CentreCrop(AugmentConfig(size=SIZE))
    found = [batch.index.tolist() for batch in loaders(catalog, order, augment=centre).iterate()]
    assert found == [shown(order, position, bad) for position in range(10)] and len(found[-1]) == IMAGES - 9 * 64


def test_a_manifest_keeps_ids_and_fingerprint_when_files_vanish(folder, write_manifest):
    write_manifest(folder)
    before = open_folder(folder)
    Path(before.path(7)).unlink()
    after = open_folder(folder)
    assert after.fingerprint == before.fingerprint and np.array_equal(after.labels, before.labels)
    assert after.path(8) == before.path(8) and "1 files of the manifest are missing" in after.summary()
    Path(after.path(7)).with_name("new.jpg").write_bytes(encode(1))
    assert open_folder(folder).fingerprint != before.fingerprint  # another listing: the manifest is not its


def test_candidates_are_a_function_of_seed_epoch_and_sample():
    order = Order(np.arange(0, 3000, 3), 5, 10)
    first = list(order.candidates(2, 30))
    assert first[0] == 30 and len(first) == 1 + TRIES and set(first) <= set(range(0, 3000, 3))
    assert first == list(Order(np.arange(0, 3000, 3), 5, 99, shuffle=False).candidates(2, 30))
    others = [list(Order(order.indices, seed, 10).candidates(e, i))[1:] for seed, e, i in [(6, 2, 30), (5, 3, 30)]]
    others += [list(order.candidates(2, 33))[1:]]
    assert first[1:] not in others
    drawn = np.concatenate([list(order.candidates(0, i))[1:] for i in order.indices])
    assert abs(drawn.mean() / 3 - 499.5) < 5 * 289 / np.sqrt(len(drawn))  # uniform on 0..999, sd 289


@pytest.mark.parametrize(
    ("content", "cut"),
    [
        (encode(1), False),
        (encode(1) + b"tail", False),
        (encode(1)[:-1], True),
        (encode(1)[:-2], True),
        (encode(1)[:-40], True),
        (encode(1)[:30], True),
        (encode(1, "PNG"), False),
        (encode(1, "PNG") + b"tail", False),
        (encode(1, "PNG")[:-1], True),
        (encode(1, "BMP"), False),
        (b"", False),  # found empty elsewhere
        (b"\xff\xd8" + encode(2)[:-2] + encode(1)[2:-9], True),  # a thumbnail's end is not the image's
    ],
)
def test_a_missing_end(content, cut):
    assert is_cut(np.frombuffer(content, np.uint8)) == cut


def _meet(mine: list[list[tuple[int, str]]], share: float) -> tuple[list[int], str, bool]:
    import torch.distributed as dist

    bad = BadImages(share, 100, "mend them")
    bad.add(mine[dist.get_rank()])
    try:
        assert bad.agree() == bad.agree() == len(bad.found)
    except UsageError as error:
        return list(bad.found), str(error), error.everywhere
    return list(bad.found), "", False


def test_ranks_agree_on_what_is_bad_and_stop_together():
    mine = [[(7, "'/7' is bad"), (3, "'/3' is bad")], [(3, "'/3' is bad"), (5, "'/5' is bad")]]
    for found, message, _ in run_ranks(2, _meet, mine, 0.03):
        assert found == [3, 5, 7] and not message
    for found, message, everywhere in run_ranks(2, _meet, mine, 0.02):
        assert found == [3, 5, 7] and everywhere
        assert message == (
            "'/3' is bad; '/5' is bad; '/7' is bad: 3 bad images, and loader.bad_share=0.02 of 100 images allows 2: "
            "mend them, or raise loader.bad_share"
        )
