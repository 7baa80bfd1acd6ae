"""What is listed, in torchvision's order; what is left out and why; CIFAR's archives; what a person is told."""

import io
import json
import os
import pickle
import tarfile
import urllib.error
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.config import load
from fasttrain.data import cifar, manifest
from fasttrain.data.catalog import DataConfig, Names, header_size, open_catalog
from fasttrain.errors import UsageError


def encode(height=6, width=9, kind="JPEG", mode="RGB", **settings):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **settings)
    return stream.getvalue()


def plant(root, files):
    """Write ``{relative path: bytes or None for a small JPEG}``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode() if content is None else content)
    return root


def config(root, **settings):
    return DataConfig(root=str(root), cache=str(root.parent / "cache"), **settings)


@pytest.fixture
def tree(tmp_path):
    names = ["train/b/2.jpg", "train/b/10.JPEG", "train/a/x.png", "train/a/deep/er/1.jpg", "train/a/deep/0.jpg"]
    names += [
        "train/a/z.webp",
        "train/B/1.jpg",
        "val/b/v.jpg",
        "val/a/v.jpg",
        "train/b/.hidden.jpg",
        "train/.git/1.jpg",
    ]
    return plant(tmp_path / "data", {**dict.fromkeys(names), "train/b/notes.txt": b"text", "train/readme.jpg": b""})


def as_torchvision(folder):
    """torchvision's ImageFolder, written down: (path, label) of every image."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for label, name in enumerate(classes):
        for path, _, files in sorted(os.walk(folder / name, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) and not file.startswith("."):
                    yield os.path.join(path, file), label


def test_lists_a_tree_in_torchvisions_order(tree):
    catalog = open_catalog(config(tree), "train")
    expected = list(as_torchvision(tree / "train"))
    assert [(catalog.path(index), label) for index, label in enumerate(catalog.labels)] == expected
    assert catalog.classes == ["B", "a", "b"] and len(catalog) == len(expected) == 7
    assert catalog.indices.tolist() == list(range(7)) and not catalog.excluded
    assert catalog.encoded and catalog.beton is None and not catalog.sizes.any()
    assert catalog.read(1).tobytes() == Path(expected[1][0]).read_bytes()


def test_follows_links_and_keeps_odd_names(tmp_path):
    root = plant(tmp_path / "data", {"train/a/é ü\n.jpg": None, "elsewhere/1.jpg": None})
    (root / "train" / "b").symlink_to(root / "elsewhere")
    odd = os.fsdecode(b"\xff.jpg")
    (root / "train" / "a" / odd).write_bytes(encode())
    catalog = open_catalog(config(root), "train")
    assert [os.path.basename(catalog.path(index)) for index in range(3)] == [*sorted(["é ü\n.jpg", odd]), "1.jpg"]
    assert all(len(catalog.read(index)) for index in range(3))


def test_splits_are_found_or_named(tree, tmp_path):
    assert open_catalog(config(tree), "val").root == tree / "val"
    (tree / "val").rename(tree / "test")
    assert open_catalog(config(tree), "val").root == tree / "test"
    assert open_catalog(config(tree, val="train"), "val").root == tree / "train"
    assert len(open_catalog(config(tree / "train"), "train")) == 7, "class folders directly under the root"
    assert len(open_catalog(config(tree / "train", val="."), "val")) == 7
    with pytest.raises(UsageError, match=r"no folder val or .* name the val split with data\.val=…"):
        open_catalog(config(tree / "train"), "val")
    with pytest.raises(UsageError, match=r"data\.val='dev' is no folder in '.*', which has: test, train"):
        open_catalog(config(tree, val="dev"), "val")


def test_validation_labels_mean_the_training_classes(tree):
    catalog = open_catalog(config(tree), "val")  # val has no class B
    assert catalog.classes == ["B", "a", "b"] and catalog.labels.tolist() == [1, 2]
    plant(tree, {"val/new/1.jpg": None})
    with pytest.raises(UsageError, match="classes that the training split lacks: new"):
        open_catalog(config(tree), "val")


def test_empty_files_and_dangling_links_are_left_out_and_renumber_nothing(tree):
    before = open_catalog(config(tree), "train")
    (tree / "train/a/x.png").write_bytes(b"")
    (tree / "train/b/2.jpg").unlink()
    (tree / "train/b/2.jpg").symlink_to("nowhere.jpg")
    catalog = open_catalog(config(tree), "train")
    assert [catalog.path(index) for index in range(7)] == [before.path(index) for index in range(7)]
    assert catalog.excluded == [(str(tree / "train" / name), "empty file") for name in ("a/x.png", "b/2.jpg")]
    assert sorted(set(range(7)) - set(catalog.indices.tolist())) == [1, 6] and len(catalog) == 5
    assert "left out: 2" in catalog.summary() and "x.png: empty file" in catalog.summary()
    assert "2.jpg" not in catalog.summary(most=1) and "and 1 more" in catalog.summary(most=1)


def test_fingerprint_follows_names_and_exclusions_not_the_place(tree, tmp_path):
    before = open_catalog(config(tree), "train").fingerprint
    moved = tree.rename(tmp_path / "moved")
    assert open_catalog(config(moved), "train").fingerprint == before
    content = (moved / "train/a/x.png").read_bytes()
    (moved / "train/a/x.png").write_bytes(b"")
    assert open_catalog(config(moved), "train").fingerprint != before
    (moved / "train/a/x.png").rename(moved / "train/a/y.png")
    (moved / "train/a/y.png").write_bytes(content)
    assert open_catalog(config(moved), "train").fingerprint != before


def test_names_are_packed_without_confusion():
    assert list(Names(["ab", "", "c"])) == ["ab", "", "c"]
    assert Names(["ab", "c"]).digest() != Names(["a", "bc"]).digest()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ({}, r"has no image: expected .*/<class>/<image>.jpg, or images without labels directly in it"),
        (
            {"train/1.txt": b"x"},
            r"/train' has no image \(left unread: 1 file: 1 .txt\): expected .*/<class>/<image>.jpg",
        ),
        ({"train/a/1.jpg": None, "train/b/readme.txt": b"x"}, r"class folder '.*/b' has no image"),
        (
            {"train/a/1.jpg": None, "train/b/1.jpg": b"", "train/b/2.jpg": b""},
            r"/b' has no readable .*1.jpg': empty file",
        ),
        ({"train/a/1.jpg": None, "train/b/1.jpg": b"<html>"}, r"/b' has no readable .*1.jpg': it is not"),
        ({"val/a/1.jpg": None}, r"no folder train, but val: name the train split with data\.train=…"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, files, message):
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
        plant(root, files)
    with pytest.raises(UsageError, match=message) as caught:
        open_catalog(config(root), "train")
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_a_root_that_is_nothing_or_some_other_file(tmp_path):
    with pytest.raises(UsageError, match=r"root: is empty \(an unset variable\?\)"):
        load(DataConfig, ["root="])
    plant(tmp_path, {"data.zip": b"PK"})
    with pytest.raises(UsageError, match=r"neither a folder, nor a .beton file, nor a CIFAR archive"):
        open_catalog(config(tmp_path / "data.zip"), "train")


def test_an_unreadable_folder_is_named(tree, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, to whom nothing is forbidden
    with pytest.raises(UsageError, match=r"cannot list the folder '.*/a/deep': Permission denied"):
        open_catalog(config(tree), "train")


def a_manifest(catalog, **changes):
    sizes = np.arange(1, 15).reshape(7, 2)
    content = dict(listing=catalog.names.digest(), classes=catalog.classes, excluded=[(3, catalog.names[3], "torn")])
    return manifest.Manifest(**{**content, "heights": sizes[:, 0].tolist(), "widths": sizes[:, 1].tolist(), **changes})


@pytest.mark.parametrize("readonly", [False, True])
def test_a_manifest_is_used_from_either_place(tree, tmp_path, monkeypatch, readonly):
    catalog = open_catalog(config(tree), "train")
    if readonly:
        write = manifest._write

        def refuse(found, path):
            if tree in path.parents:
                raise OSError(30, "Read-only file system", str(path))
            write(found, path)

        monkeypatch.setattr(manifest, "_write", refuse)
    path = manifest.save(a_manifest(catalog), catalog.root, tmp_path / "cache")
    assert (tree in path.parents) != readonly
    found = open_catalog(config(tree), "train")
    assert found.excluded == [(catalog.path(3), "torn")] and found.indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert np.array_equal(found.sizes, np.arange(1, 15).reshape(7, 2)) and not found.notes
    assert len(open_catalog(config(tree), "train", use_manifest=False)) == 7


def test_with_a_manifest_no_file_is_touched(tree, tmp_path, monkeypatch):
    catalog = open_catalog(config(tree), "train")
    manifest.save(a_manifest(catalog), catalog.root, tmp_path / "cache")
    monkeypatch.setattr("fasttrain.data.catalog._bytes_of", None)
    monkeypatch.setattr("fasttrain.data.catalog.begins_like_an_image", None)
    assert len(open_catalog(config(tree), "train")) == 6


@pytest.mark.parametrize("spoil", ["listing", "cut", "version", "keys"])
def test_a_manifest_that_does_not_fit_is_told_and_not_used(tree, tmp_path, spoil):
    catalog = open_catalog(config(tree), "train")
    path = manifest.save(a_manifest(catalog, **{"version": 99} if spoil == "version" else {}), catalog.root, tmp_path)
    if spoil == "listing":
        plant(tree, {"train/b/more.jpg": None})
    if spoil == "cut":
        path.write_text(path.read_text()[:-20])
    if spoil == "keys":
        path.write_text("{}")
    found = open_catalog(config(tree), "train")
    assert len(found) == len(found.labels) == 7 + (spoil == "listing") and len(found.notes) == 1
    assert "note: the manifest" in found.summary()


WRONG = {
    "heights": [[1] * 6, [1.0] * 7, ["1"] * 7, [1, 2, [3], 4, 5, 6, 7], "1234567", None, [-1] * 7, [2**40] * 7, {}],
    "widths": [[1] * 8, 7],
    "nbytes": [[1] * 6, ["x"] * 7, 5],
    "excluded": [5, [5], [[3, "x"]], [["3", "x", "y"]], [[7, "x", "y"]], [[-1, "x", "y"]], [[3, 4, "y"]], [[True] * 3]],
    "names": [["a/b.jpg"], [1] * 7, ["elsewhere/b.jpg"] * 7, "text"],
    "classes": ["ab", [1, 2], None],
    "listing": [None, 5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_manifest_with_anything_in_it_is_told_and_not_used(tree, tmp_path, key, value):
    catalog = open_catalog(config(tree), "train")
    path = manifest.save(a_manifest(catalog), catalog.root, tmp_path / "cache")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    found = open_catalog(config(tree), "train")
    assert len(found) == 7 and len(found.notes) == 1 and "prepare.py again" in found.notes[0]


def test_the_place_of_a_manifest_is_tried_and_left_as_it_was(tree, tmp_path, monkeypatch):
    folder, cache = tree / "train", tmp_path / "cache"
    before = sorted(tree.rglob("*"))
    manifest.try_save(folder, cache)
    assert sorted(tree.rglob("*")) == before and not cache.exists()
    (folder / manifest.NAME).mkdir()  # in the way: then it goes to the cache
    manifest.try_save(folder, cache)
    assert not list((cache / "manifests").iterdir())
    cache.rename(tmp_path / "moved")
    cache.write_text("")
    with pytest.raises(UsageError, match=r"cannot write a manifest to .* data\.cache="):
        manifest.try_save(folder, cache)


def test_a_class_that_was_quarantined_whole_is_named(tree, tmp_path):
    catalog = open_catalog(config(tree), "train")
    bad = [(index, catalog.names[index], "torn") for index in (5, 6)]
    manifest.save(a_manifest(catalog, excluded=bad), catalog.root, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"class folder '.*/b' has no readable image \('10.JPEG': torn\)"):
        open_catalog(config(tree), "train")


# Headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        encode(31, 17),
        encode(31, 17, progressive=True),
        encode(31, 17, mode="L"),
        encode(31, 17, mode="CMYK"),
        encode(31, 17, icc_profile=bytes(200_000), comment=b"\xff\xc0" * 50),
        encode(31, 17, exif=Image.Exif(), quality=5, restart_marker_blocks=1),
        encode(31, 17, "PNG"),
        encode(31, 17, "PNG", "P"),
        encode(31, 17, "WEBP"),
        encode(31, 17, "BMP"),
        encode(31, 17, "TIFF"),
        encode(31, 17, "PPM"),
    ],
)
def test_header_size(content):
    assert header_size(np.frombuffer(content, np.uint8)) == (31, 17)


def test_header_size_ignores_the_orientation_and_fill_bytes():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned = encode(31, 17, exif=exif)
    assert header_size(np.frombuffer(turned, np.uint8)) == (31, 17)
    filled = turned[:2] + b"\xff\xff\xff" + turned[2:]
    assert header_size(np.frombuffer(filled, np.uint8)) == (31, 17)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"<html>", encode()[:40], encode(kind="PNG")[:20], b"\xff\xd8" * 40]
)
def test_header_size_of_no_image(content):
    with pytest.raises(ValueError, match=r"no image header|wrong format: begins with"):
        header_size(np.frombuffer(content, np.uint8))


# CIFAR -------------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Byte strings as Python 2 wrote them, which is how the official archives are."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 as the class it extends has it

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    stream = io.BytesIO()
    Python2Pickler(stream, 2, fix_imports=True).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def make_edition(monkeypatch, number, spoil=None):
    """A tiny archive of the same inner form, and its edition in place of the official one."""
    rng, edition = np.random.default_rng(0), cifar.EDITIONS[number]
    content, truth = {}, {}
    for role, names in edition.splits.items():
        pixels, labels = [], []
        for name in names:
            rows, some = rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, 3, 4).tolist()
            pixels, labels = [*pixels, *rows], labels + some
            content[name] = python2_pickle({"data": rows, edition.labels_key: some, "batch_label": "one"})
        truth[role] = np.stack(pixels), labels
    content[edition.meta] = python2_pickle({edition.names_key: ["cat", "dog", "eel"]})
    content.update(spoil or {})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"{edition.folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    files = {name: md5(data).hexdigest() for name, data in content.items()}
    edition = replace(edition, md5=md5(stream.getvalue()).hexdigest(), files=files)
    monkeypatch.setattr(cifar, "EDITIONS", (edition,))
    return edition, stream.getvalue(), content, truth


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layout", ["archive", "folder", "root of archive", "root of folder"])
def test_cifar_is_read_from_archive_and_folder(tmp_path, monkeypatch, number, layout):
    edition, archive, content, truth = make_edition(monkeypatch, number)
    if "archive" in layout:
        path = plant(tmp_path, {edition.archive: archive}) / edition.archive
    else:
        path = plant(tmp_path / edition.folder, content)
    for role in ("train", "val"):
        catalog = open_catalog(config(tmp_path if "root" in layout else path), role)
        rows, labels = truth[role]
        assert catalog.labels.tolist() == labels and catalog.classes == ["cat", "dog", "eel"]
        assert not catalog.encoded and catalog.sizes.tolist() == [[32, 32]] * len(labels)
        for index in range(len(labels)):
            expected = np.dstack(np.split(rows[index], 3)).reshape(32, 32, 3)  # planes of 1,024, each row-major
            assert np.array_equal(catalog.read(index), expected)


def test_cifar_that_is_damaged_is_refused(tmp_path, monkeypatch):
    edition, archive, content, _ = make_edition(monkeypatch, 0)
    path = plant(tmp_path, {edition.archive: archive[:-1]}) / edition.archive
    with pytest.raises(UsageError, match=f"has MD5 .*, the official file {edition.md5}"):
        open_catalog(config(path), "train")
    folder = plant(tmp_path / edition.folder, {**content, "data_batch_3": b"x"})
    with pytest.raises(UsageError, match="data_batch_3' has MD5"):
        open_catalog(config(folder), "train")
    assert len(open_catalog(config(folder), "val")) == 4, "only what is read is checked"


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_cifar_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {"test_batch": pickle.dumps({"data": Malice()}, 2)}
    edition, archive, _, _ = make_edition(monkeypatch, 0, spoil=bad)
    path = plant(tmp_path, {edition.archive: archive}) / edition.archive
    with pytest.raises(UsageError, match=r"not a plain CIFAR batch .* it asks for posix.mkdir"):
        open_catalog(config(path), "val")
    assert not (tmp_path / "harm").exists()


def test_cifar_download_is_checked_then_renamed(tmp_path, monkeypatch):
    edition, archive, _, _ = make_edition(monkeypatch, 0)
    path = tmp_path / "new" / edition.archive
    with pytest.raises(UsageError, match=r"does not exist: set data\.download=true"):
        open_catalog(config(path), "train")

    sent = [archive[:-3]]
    monkeypatch.setattr(cifar.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(sent[0]))
    with pytest.raises(UsageError, match="gave a file with MD5"):
        open_catalog(config(path, download=True), "train")
    assert not list(path.parent.iterdir())

    sent[0] = archive
    assert len(open_catalog(config(path, download=True), "train")) == 20
    assert [found.name for found in path.parent.iterdir()] == [edition.archive]

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(cifar.urllib.request, "urlopen", offline)
    assert len(open_catalog(config(path, download=True), "val")) == 4, "what is there is not fetched again"
    path.unlink()
    with pytest.raises(UsageError, match=r"cannot download https.* \(no route to host\): put the file there"):
        open_catalog(config(path, download=True), "train")


def test_cifar_has_its_own_splits(tmp_path, monkeypatch):
    edition, archive, _, _ = make_edition(monkeypatch, 0)
    plant(tmp_path, {edition.archive: archive})
    with pytest.raises(UsageError, match="has its own splits: drop"):
        open_catalog(config(tmp_path, val="test"), "val")


def test_the_official_checksums_are_torchvisions():
    ten, hundred = cifar.EDITIONS
    assert (ten.md5, hundred.md5) == ("c58f30108f718f92721af3b95e74349a", "eb9058c3a382ffc7106e4002c42a8d85")
    assert ten.url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert len(ten.files) == 7 and len(hundred.files) == 3


# FFCV --------------------------------------------------------------------------------------------------------------


def test_an_ffcv_file_has_the_ids_and_the_fingerprint_of_its_source(tree):
    pytest.importorskip("ffcv")
    from fasttrain.data.beton import write_beton

    (tree / "train/a/x.png").write_bytes(b"")
    source = open_catalog(config(tree), "train")
    beton = write_beton(source, tree / "train.beton", progress=False)
    assert open_catalog(config(tree), "train").beton is None, "where both lie, the files are meant"
    alone = tree.parent / "alone"
    alone.mkdir()
    for file in (beton, beton.with_name("train.beton.json")):
        (alone / file.name).symlink_to(file)
    for settings in (config(beton), config(alone), config(tree, train="train.beton")):
        catalog = open_catalog(settings, "train")
        assert catalog.beton.samefile(beton) and not catalog.encoded
        assert catalog.indices.tolist() == source.indices.tolist() and catalog.classes == source.classes
        assert np.array_equal(catalog.labels[catalog.indices], source.labels[source.indices])
        assert catalog.fingerprint == source.fingerprint and catalog.excluded == source.excluded
        assert catalog.sizes[catalog.indices].tolist() == [[6, 9]] * 6
    with pytest.raises(UsageError, match=r"one FFCV file and no val.beton lies beside it: name one with data\.val=…"):
        open_catalog(config(beton), "val")
    val = write_beton(open_catalog(config(tree), "val"), tree / "val.beton", progress=False)
    assert open_catalog(config(beton), "val").beton == open_catalog(config(val), "val").beton == val
    assert open_catalog(config(val), "train").beton == beton


@pytest.mark.parametrize("name", ["absent.beton", "train.beton"])
def test_an_ffcv_file_that_is_none(tmp_path, name):
    pytest.importorskip("ffcv")
    plant(tmp_path, {"train.beton": b"not one at all"})
    with pytest.raises(UsageError, match=name):
        open_catalog(config(tmp_path / name), "train")


def test_a_share_takes_as_much_of_each_class_and_smaller_shares_lie_within_larger(tmp_path):
    for name, count in (("a", 10), ("b", 3)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / f"{i}.png")
    whole, half, tenth = (
        open_catalog(DataConfig(root=str(tmp_path), share=share), "train") for share in (1.0, 0.5, 0.1)
    )
    assert np.bincount(half.labels[half.indices]).tolist() == [5, 2]
    assert np.bincount(tenth.labels[tenth.indices]).tolist() == [1, 1]
    assert set(tenth.indices) <= set(half.indices) <= set(whole.indices)
    assert len({whole.fingerprint, half.fingerprint, tenth.fingerprint}) == 3
    assert "data.share=0.5: 7 of 13" in half.summary()
