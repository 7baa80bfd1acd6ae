"""The embedded data set: deterministic, whole under races, and not to be told apart by colour."""

import threading

import numpy as np
import pytest
from PIL import Image

from fasttrain.data import shapes
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.errors import UsageError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 2})


def images(split, count):
    pixels = [shapes.draw(name, split, number) for name in shapes.CLASSES for number in range(count)]
    return np.stack(pixels), np.repeat(np.arange(len(shapes.CLASSES)), count)


def test_drawing_is_a_pure_function_of_class_split_and_number():
    star = shapes.draw("star", "train", 5)
    assert star.shape == (48, 48, 3) and star.dtype == np.uint8
    np.random.seed(1)  # noqa: NPY002 the global state must not matter
    assert np.array_equal(star, shapes.draw("star", "train", 5))
    others = [("star", "train", 6), ("star", "val", 5), ("ring", "train", 5)]
    assert not any(np.array_equal(star, shapes.draw(*other)) for other in others)


def test_is_an_image_folder_of_jpegs_that_opens_by_the_ordinary_path(tmp_path, few):
    for role, count in (("train", 3), ("val", 2)):
        catalog = open_catalog(DataConfig(cache=str(tmp_path)), role)
        assert catalog.classes == shapes.CLASSES and len(catalog.classes) >= 10
        assert np.bincount(catalog.labels).tolist() == [count] * len(shapes.CLASSES)
        with Image.open(catalog.path(4)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")
            drawn = shapes.draw(catalog.classes[4 // count], role, 4 % count)
            assert np.abs(np.asarray(image, float) - drawn).mean() < 6


def test_racing_processes_all_get_one_whole_set(tmp_path, few):
    begin, folders = threading.Barrier(4), []

    def ensure():
        begin.wait()
        folders.append(shapes.ensure(tmp_path / "cache"))

    threads = [threading.Thread(target=ensure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4
    assert len(list(folders[0].rglob("*.jpg"))) == 5 * len(shapes.CLASSES)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folders[0].name], "a loser left its copy behind"


def test_an_interrupted_drawing_leaves_nothing(tmp_path, few, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        shapes.ensure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the default data set .*data\.cache"):
        shapes.ensure(tmp_path / "file" / "cache")


def test_colour_and_raw_pixels_do_not_give_the_class_away():
    (bank, labels), (queries, truth) = images("train", 40), images("val", 25)

    def histogram(pixels):
        bins = (pixels // 64).reshape(len(pixels), -1, 3) @ [16, 4, 1]
        return np.stack([np.sqrt(np.bincount(row, minlength=64)) for row in bins])

    features = {
        "mean colour": lambda pixels: pixels.mean((1, 2)),
        "colour spread": lambda pixels: np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], 1),
        "colour histogram": histogram,
        "pixels": lambda pixels: pixels[:, ::3, ::3].reshape(len(pixels), -1).astype(float),
    }
    chance = 1 / len(shapes.CLASSES)
    for name, feature in features.items():
        a, b = feature(queries), feature(bank)
        distances = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
        accuracy = (labels[distances.argmin(1)] == truth).mean()
        assert accuracy < 2 * chance, f"{name} alone is right in {accuracy:.0%}"


def test_form_does_give_the_class_away():
    """Where each copy of a form lies and how large it is does not change what share of its hull it fills."""
    shares = {name: _fill(shapes.FORMS[name]) for name in ("ring", "disc", "frame", "star", "triangle")}
    assert shares["disc"] > 0.95 and shares["ring"] == pytest.approx(1 - 0.36, abs=0.04)
    assert shares["frame"] == pytest.approx((1 - 0.36) * 2 / np.pi, abs=0.04)
    assert shares["triangle"] == pytest.approx(3 * np.sqrt(3) / 4 / np.pi, abs=0.04)
    assert shares["star"] < shares["triangle"]


def _fill(form):
    radius = 20
    cover = shapes._cover(form, radius * np.eye(2), np.array([24.0, 24.0]))
    return cover.sum() / (np.pi * radius**2)
