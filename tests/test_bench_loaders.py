"""The benchmark of the loaders: others do the same work, are told apart by name, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from fasttrain.benchmarks import loader_peers
from fasttrain.benchmarks.loader import LoaderBenchConfig, compare_loaders
from fasttrain.benchmarks.loader_peers import PEERS, Peer, numba_as_it_is
from fasttrain.benchmarks.loader_work import Work, by_workers
from fasttrain.benchmarks.timing import cpu_seconds
from fasttrain.data.augment import AugmentConfig, blur_radius
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.errors import UsageError

CPU = torch.device("cpu")
ALL = AugmentConfig(size=16, scale=(0.2, 1.0), jitter=0.5, solarise=0.1)
FLIPPED = AugmentConfig(size=16, jitter_p=0.0, grey=0.0, blur=0.0)


@pytest.fixture(scope="module", autouse=True)
def numba():
    with numba_as_it_is():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """64 images of three classes, all of one size."""
    root, draw = tmp_path_factory.mktemp("even"), np.random.default_rng(0)
    for number in range(64):
        path = root / "train" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def beton(folder, tmp_path_factory) -> Path:
    pytest.importorskip("ffcv.loader", reason="FFCV is not installed")
    from fasttrain.data.beton import write_beton

    path = tmp_path_factory.mktemp("beton") / "train.beton"
    write_beton(open_catalog(DataConfig(root=str(folder)), "train"), path, progress=False)
    return path


@pytest.fixture
def work(folder, tmp_path) -> Work:
    return of(open_catalog(DataConfig(root=str(folder)), "train"), tmp_path)


def of(catalog: Catalog, scratch: Path, beton: Catalog | None = None, batch: int = 8) -> Work:
    return Work(replace(catalog, indices=catalog.indices[::2]), batch, 1, CPU, scratch, beton)


def config(root: Path, **given) -> LoaderBenchConfig:
    small = {"batch": 4, "batches": 3, "augment": {"size": 16}, "loader": {"kind": "dali", "threads": 1}}
    return LoaderBenchConfig(**small | {"data": {"root": str(root)}} | given)


class Recorder(ModuleType):
    """A module of which every name is a class whose objects are what they were made of."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given, **named: (name, *given, *sorted(named.items()))


@pytest.fixture
def recorded(monkeypatch):
    """Of a library that need not be there."""

    def record(name: str) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, path, Recorder(path))
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[path])

    return record


# The table -----------------------------------------------------------------------------------------------------------


def test_ours_and_bare_pipelines_are_in_the_table(folder, beton):
    whole = config(folder, beton=str(beton), loader={"threads": 1}, peers=("dali",))
    (report,) = compare_loaders(whole, 1)
    rows = {row["name"]: row for row in report.rows}
    assert list(rows) == [
        "fasttrain resident, all",
        "fasttrain dali, all",
        "fasttrain ffcv, all",
        "bare DALI, all",
        "fasttrain resident, crop and flip",
        "fasttrain dali, crop and flip",
        "fasttrain ffcv, crop and flip",
        "bare DALI, crop and flip",
    ]
    assert all(row["rates"][0] > 0 and row["cpu"][0] > 0 for row in rows.values())
    gives = {name: row["gives"] for name, row in rows.items()}
    assert gives["fasttrain ffcv, all"] == "float32" and gives["fasttrain ffcv, crop and flip"] == "uint8"
    assert all(f"| {name} |" in report.text for name in rows) and list(report.bars) == list(rows)
    assert "left out" not in report.text


def test_who_cannot_be_imported_or_fails_is_named_and_the_others_run(folder, monkeypatch):
    def small(work, augment):
        return lambda: iter([[torch.zeros(4, 3, 8, 8)] * 2])

    def fails(work, augment):
        return lambda: iter([][0])

    def done(work, augment):
        return lambda: iter([[torch.zeros(4, 3, 16, 16, dtype=torch.uint8)] * 2] * 3)

    for absent in ("lightly", "solo"):
        monkeypatch.setitem(sys.modules, absent, None)
    for name, build in (("torchvision", done), ("kornia", small), ("dali", fails)):
        monkeypatch.setitem(PEERS, name, Peer(build.__name__, build, ("json",), ""))
    peers = ("torchvision", "kornia", "lightly", "solo_learn", "solo_learn_dali", "dali", "ffcv")
    *_, report = compare_loaders(config(folder, loaders=("dali", "ffcv"), peers=peers), 2)
    assert [row["name"] for row in report.rows] == [
        f"{who}, {what}" for what in ("all", "crop and flip") for who in ("fasttrain dali", "done")
    ]
    assert len(report.rows[1]["rates"]) == 2 and report.rows[1]["gives"] == "uint8"
    missing = report.text.partition("\n\n")[2].splitlines()
    assert [line.partition(": left out, ")[0] for line in missing] == [
        "- lightly",
        "- solo-learn; solo-learn, DALI",
        "- fasttrain ffcv, all; bare FFCV, all; fasttrain ffcv, crop and flip; bare FFCV, crop and flip",
        "- small, all; small, crop and flip",
        "- fails, all; fails, crop and flip",
    ]
    reasons = ("(pip install lightly)", "(pip install git+", "beton=…", "(3, 8, 8)", "IndexError: ")
    assert all(reason in line for line, reason in zip(missing, reasons, strict=True))


def test_a_loader_that_was_asked_for_must_run(folder, beton):
    with pytest.raises(UsageError, match="beton=… names it"):
        next(compare_loaders(config(folder, loader={"kind": "ffcv"}, peers=()), 1))
    *_, report = compare_loaders(config(beton, loader={"kind": "ffcv", "threads": 1}, peers=("dali", "kornia")), 1)
    assert [row["name"] for row in report.rows] == ["fasttrain ffcv, all", "fasttrain ffcv, crop and flip"]
    assert "bare DALI, all; bare DALI, crop and flip: left out, it reads image files, and" in report.text


def test_a_beton_of_other_images_is_refused(images, beton):
    with pytest.raises(UsageError, match="is no FFCV file of"):
        next(compare_loaders(config(images, beton=str(beton)), 1))


def test_where_nobody_is_left_the_reasons_are_said(folder):
    with pytest.raises(UsageError, match="nobody can load this; fasttrain ffcv, all; fasttrain ffcv, crop and flip"):
        next(compare_loaders(config(folder, loaders=("ffcv",), peers=()), 1))


# What they do --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [ALL, FLIPPED], ids=["all", "crop and flip"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_gives_each_image_once_in_views_that_differ(name, augment, folder, beton, tmp_path):
    peer = PEERS[name]
    if reason := peer.lacking():
        pytest.skip(reason)
    settings = augment.model_copy(update={"solarise": 0.0} if name == "lightly" else {})
    catalog, written = (open_catalog(DataConfig(root=str(root)), "train") for root in (folder, beton))
    work = of(catalog, tmp_path, written)
    if name == "ffcv" and augment is ALL:
        with pytest.raises(UsageError, match=r"augment\.jitter_p"):
            peer.build(work, settings)
        return
    epoch = peer.build(work, settings)
    for _ in range(2):
        batches = [[view.clone() for view in views] for views in epoch()]
        assert sum(len(views[0]) for views in batches) == len(work.catalog.indices) == 32
        for first, second in batches:
            assert first.shape == second.shape == (8, 3, 16, 16) and not torch.equal(first, second)
            whole = first.dtype == torch.uint8
            assert first.min() >= 0 and (1 if not whole else 255) >= first.max() > (0.5 if not whole else 127)


def test_worker_processes_stay_for_the_next_epoch_are_counted_and_end(work):
    """Each sample begins with its views."""

    class Busy(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            began = time.process_time()
            while time.process_time() - began < 0.02:
                pass
            return [torch.full((3, 2, 2), float(os.getpid()))], index

    before = set(multiprocessing.active_children())
    epoch = by_workers(work, Busy())
    list(epoch())
    began, alone = cpu_seconds(), time.process_time()
    (views,) = epoch()
    beside = cpu_seconds() - began - (time.process_time() - alone)
    (worker,) = set(multiprocessing.active_children()) - before
    assert views[0].shape == (6, 3, 2, 2) and (views[0] == worker.pid).all()
    assert beside > 0.9 * 6 * 0.02
    del epoch
    worker.join(10)
    assert not worker.is_alive()


def test_arrays_are_loaded_as_files_are(tmp_path):
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (12, 20, 20, 3), dtype=np.uint8), np.arange(12) % 3
    sizes = np.full((12, 2), 20, np.int32)
    catalog = Catalog("train", ["a", "b", "c"], labels, np.arange(12), sizes, tmp_path / "archive", pixels=pixels)
    work = of(catalog, tmp_path)
    samples = [work.dataset(np.asarray)[place] for place in range(6)]
    assert [label for _, label in samples] == labels[::2].tolist()
    assert (np.stack([image for image, _ in samples]) == pixels[::2]).all()
    assert (work.pixels.permute(0, 2, 3, 1).numpy() == pixels[::2]).all()
    with pytest.raises(UsageError, match="reads image files"):
        work.require_files()


def test_files_are_linked_and_decoded(work, recorded):
    recorded("torchvision.datasets")
    assert work.dataset(max) == ("ImageFolder", str(work.folder), max)
    links = sorted(work.folder.glob("*/*"))
    assert {str(link.resolve()) for link in links} == {work.catalog.path(index) for index in work.catalog.indices}
    assert {link.parent.name for link in links} == {"000000", "000001", "000002"}
    first = np.asarray(Image.open(work.catalog.path(work.catalog.indices[0])).convert("RGB"))
    assert work.pixels.shape == (32, 3, 24, 20) and (work.pixels[0].permute(1, 2, 0).numpy() == first).all()


def test_images_of_several_sizes_are_no_tensor(tmp_path):
    for number, side in enumerate((20, 30)):
        Image.new("RGB", (side, 20)).save(tmp_path / f"{number}.png")
    catalog = open_catalog(DataConfig(root=str(tmp_path)), "train")
    work = Work(catalog, 2, 1, CPU, tmp_path / "scratch", None)
    with pytest.raises(UsageError, match="the images have 2 sizes"):
        _ = work.pixels


# What they are told ---------------------------------------------------------------------------------------------------


SPREADS = pytest.approx((0.4, 0.4, 0.4, 0.1))


def test_torchvision_is_told_our_augmentation(recorded):
    recorded("torchvision.transforms.v2")
    crop = ("RandomResizedCrop", 16, ("antialias", True), ("ratio", ALL.ratio), ("scale", ALL.scale))
    last = ("ToDtype", torch.float32, ("scale", True))
    name, steps = loader_peers.torchvision_view(ALL)
    jitter = steps.pop(3)
    assert jitter[0] == "RandomApply" and jitter[2] == 0.8
    assert jitter[1][0][0] == "ColorJitter" and jitter[1][0][1:] == SPREADS
    assert name == "Compose" and steps == [
        ("ToImage",),
        crop,
        ("RandomHorizontalFlip", 0.5),
        ("RandomGrayscale", 0.2),
        ("RandomApply", [("GaussianBlur", 2 * blur_radius(16) + 1, (0.1, 2.0))], 0.5),
        ("RandomSolarize", 128, 0.1),
        last,
    ]
    crop = ("RandomResizedCrop", 16, ("antialias", True), ("ratio", ALL.ratio), ("scale", (0.08, 1.0)))
    assert loader_peers.torchvision_view(FLIPPED)[1] == [("ToImage",), crop, ("RandomHorizontalFlip", 0.5), last]


def test_lightly_is_told_our_augmentation_or_refuses(recorded):
    recorded("lightly.transforms.simclr_transform")
    told = dict(loader_peers.lightly_view(ALL.model_copy(update={"solarise": 0.0}))[1:])
    colours = {"cj_prob": 0.8, "cj_strength": 0.5, "random_gray_scale": 0.2, "gaussian_blur": 0.5, "sigmas": (0.1, 2.0)}
    assert told == colours | {"input_size": 16, "min_scale": 0.2, "hf_prob": 0.5, "normalize": None}
    for change in ({"solarise": 0.1}, {"scale": (0.2, 0.9)}, {"ratio": (1.0, 1.0)}):
        with pytest.raises(UsageError, match=f"knows augment.{next(iter(change))}="):
            loader_peers.lightly_view(FLIPPED.model_copy(update=change))


def test_solo_learn_is_told_our_augmentation_or_refuses(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace(OmegaConf=SimpleNamespace(create=dict)))
    told = loader_peers.solo_learn_settings(ALL)
    jitter = told.pop("color_jitter")
    assert jitter.pop("prob") == 0.8 and list(jitter) == ["brightness", "contrast", "saturation", "hue"]
    assert tuple(jitter.values()) == SPREADS
    assert told == {
        "crop_size": 16,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0.5},
        "solarization": {"prob": 0.1},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": 0.5},
    }
    for change in ({"ratio": (1.0, 1.0)}, {"sigma": (0.1, 1.0)}):
        with pytest.raises(UsageError, match=f"knows augment.{next(iter(change))}="):
            loader_peers.solo_learn_settings(ALL.model_copy(update=change))
    assert loader_peers.solo_learn_settings(FLIPPED.model_copy(update={"sigma": (0.1, 1.0)}))


def test_kornia_is_told_our_augmentation_and_draws_for_each_image():
    pytest.importorskip("kornia", reason="the peer is not installed")
    steps = {type(step).__name__: step for step in loader_peers.kornia_view(ALL)}
    assert {name: (step.p, step.p_batch, step.same_on_batch) for name, step in steps.items()} == {
        "RandomResizedCrop": (1.0, 1.0, False),
        "RandomHorizontalFlip": (0.5, 1.0, False),
        "ColorJitter": (0.8, 1.0, False),
        "RandomGrayscale": (0.2, 1.0, False),
        "RandomGaussianBlur": (0.5, 1.0, False),
        "RandomSolarize": (0.1, 1.0, False),
    }
    crop, jitter = steps["RandomResizedCrop"]._param_generator, steps["ColorJitter"]._param_generator
    assert (crop.output_size, crop.scale, crop.ratio) == ((16, 16), ALL.scale, ALL.ratio)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == SPREADS
    blur = steps["RandomGaussianBlur"]
    assert blur.flags["kernel_size"] == (2 * blur_radius(16) + 1,) * 2
    assert blur._param_generator.sigma == ALL.sigma
    assert [type(step).__name__ for step in loader_peers.kornia_view(FLIPPED)] == list(steps)[:2]
    same = torch.rand(1, 3, 20, 24).expand(8, -1, -1, -1)
    found = loader_peers.kornia_view(FLIPPED)(same)
    assert len({tuple(image.flatten().tolist()) for image in found}) == 8


def test_bare_dali_draws_for_each_image_and_does_what_it_is_told(folder, tmp_path):
    """Whole images, unflipped, uncoloured or all grey, solarised."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    catalog = open_catalog(DataConfig(root=str(folder)), "train")
    still = FLIPPED.model_copy(update={"views": 1, "flip": 0.0, "scale": (1.0, 1.0), "ratio": (20 / 24, 20 / 24)})

    def seen(**change) -> torch.Tensor:
        ((view,),) = PEERS["dali"].build(of(catalog, tmp_path, batch=32), still.model_copy(update=change))()
        return view.clone().int()

    plain = seen()
    assert torch.equal(seen(solarise=1.0), torch.where(plain >= 128, 255 - plain, plain))
    assert torch.equal(seen(flip=1.0), plain.flip(3))
    grey = seen(grey=1.0)
    assert (grey.amax(1) - grey.amin(1)).max() <= 1 < (plain.amax(1) - plain.amin(1)).max()
    assert len({tuple(view.flatten().tolist()) for view in seen(jitter_p=1.0)}) == 32
