"""Names that are not text, what lies among the images and is none, folders that hold themselves, no labels at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data import manifest
from fasttrain.data.catalog import NoSplit, open_catalog
from fasttrain.data.damage import Bad, BadImages
from fasttrain.data.listing import SIGNATURES, begins_like_an_image
from fasttrain.data.verify import verify
from fasttrain.errors import UsageError
from fasttrain.printable import printable
from tests.test_catalog import config, encode, plant

ODD = [b"caf\xe9.jpg", b"two\nlines.jpg", b"\x1b[31mred.jpg", "😀 x.jpg".encode(), b"-rf.jpg", b"\x80\xff", b"x" * 255]


# Names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_what_is_printed_is_one_line_that_finds_the_file(name, tmp_path):
    text = os.fsdecode(name)
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown and shown.encode()
    found = subprocess.run(["bash", "-c", f"printf %s $'{shown}'"], capture_output=True).stdout
    assert found == name
    assert (shown == text) == text.isprintable()
    assert str(UsageError(f"'{text}' is bad")) == f"'{shown}' is bad"
    assert printable("\ud800") == "\\ud800"


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr("fasttrain.data.verify._map", lambda function, items, workers: map(function, items))


def test_odd_names_are_listed_verified_and_told(tmp_path, in_process):
    root = tmp_path / os.fsdecode(b"r\xf6\n\x1b t")
    folder = root / "train" / os.fsdecode(b"\xe9\n")
    folder.mkdir(parents=True)
    named = [name if name.endswith(b".jpg") else name[:200] + b".jpg" for name in ODD]
    for name in named:
        Path(folder, os.fsdecode(name)).write_bytes(encode())
    plant(root, {"train/b/1.jpg": None})
    bad = folder / os.fsdecode(b"bad\n\xe9.jpg")
    bad.write_bytes(encode()[:300])
    said = verify(open_catalog(config(root), "train", use_manifest=False), tmp_path / "cache")
    assert "\\xf6\\n\\x1b t/train: " not in said.split("\n")[0] and "8 images of 2 classes" in said
    assert all(line.isprintable() for line in said.split("\n")) and "bad\\n\\xe9.jpg: does not decode" in said
    catalog = open_catalog(config(root), "train")
    assert len(catalog) == 8 and not catalog.notes and catalog.nbytes is not None
    assert [path for path, _ in catalog.excluded] == [str(bad)]
    assert all(len(catalog.read(index)) for index in catalog.indices)


def test_a_split_with_the_longest_name_has_its_manifest_in_the_cache(tmp_path, in_process, monkeypatch):
    split = "x" * 255
    root, write = plant(tmp_path / "data", {f"{split}/a/1.jpg": None, f"{split}/b/1.jpg": None}), manifest._write

    def refuse(found, path):
        if root in path.parents:
            raise OSError(30, "Read-only file system", str(path))
        write(found, path)

    monkeypatch.setattr(manifest, "_write", refuse)
    settings = config(root, train=split)
    verify(open_catalog(settings, "train", use_manifest=False), settings.cache_folder)
    found = open_catalog(settings, "train")
    assert found.nbytes is not None and not found.notes


def test_a_bad_image_is_complained_of_in_one_line(caplog):
    bad = BadImages(1, 10, "mend it")
    bad.add([Bad(3, f"cannot decode '{os.fsdecode(bytes([0xE9, 10]))}'")])
    assert bad.found == {3: "cannot decode '\\xe9\\n'"} and "\\xe9\\n" in caplog.text


# What is not read --------------------------------------------------------------------------------------------------


def test_files_of_other_endings_are_counted_and_content_decides_where_asked(tmp_path):
    files = {f"train/{name}/{i}.jpg": None for name in "ab" for i in range(3)}
    files |= {f"train/a/{i}.jfif": None for i in range(3)} | {f"train/b/{i}": None for i in range(2)}
    files |= {"train/b/x.gif": encode(kind="GIF"), "train/b/deep/y.GIF": encode(kind="GIF"), "train/labels.csv": b"a,1"}
    files |= {"train/a/page.jpg": b"<html>", "train/lone.jpg": None}
    root = plant(tmp_path / "data", files)
    catalog = open_catalog(config(root), "train")
    said = "left unread: 9 files: 3 .jfif, 2 .gif, 2 without ending, 1 .csv, 1 .jpg beside the class folders"
    assert said in catalog.summary().split("\n")[0] and len(catalog) == 7
    assert "some left unread begin like images (.jfif, without ending): data.by_content=true" in catalog.summary()

    by_content = open_catalog(config(root, by_content=True), "train")
    assert len(by_content) == 11 and by_content.labels.tolist() == [0] * 6 + [1] * 5
    said = "left unread: 5 files: 2 .gif, 1 .csv, 1 .jpg, 1 .jpg beside the class folders"
    assert said in by_content.summary() and "note" not in by_content.summary()
    assert by_content.names[2] == "a/1.jfif" and by_content.fingerprint != catalog.fingerprint


def test_names_decide_the_ids_as_before(tmp_path):
    files = {f"train/{name}/{i}.jpg": None for name in "ab" for i in range(3)}
    before = open_catalog(config(plant(tmp_path / "data", files)), "train")
    root = plant(tmp_path / "data", {"train/a/0.jpe": None, "train/a/1": None, "train/@eaDir/1.jpg": None})
    assert open_catalog(config(root), "train").fingerprint == before.fingerprint


def test_a_manifest_says_whether_content_decided(tmp_path, in_process):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/1.jpg": None, "train/b/2.jfif": None})
    by_name, by_content = config(root), config(root, by_content=True)
    verify(open_catalog(by_content, "train", use_manifest=False), tmp_path / "cache")
    found = open_catalog(by_content, "train")
    assert len(found) == 3 and found.nbytes is not None and not found.notes
    other = open_catalog(by_name, "train")
    assert len(other) == 2 and other.nbytes is None
    assert (
        "made with data.by_content=true and is not used: run launch/prepare.py with data.by_content=false"
        in (other.notes[0])
    )
    (root / "train/b/2.jfif").unlink()  # the manifest keeps its place
    assert open_catalog(by_content, "train").notes[0].startswith("1 files of the manifest are missing")


def test_content_decides_in_folders_only(tmp_path, monkeypatch):
    from tests.test_catalog import make_edition

    edition, archive, _, _ = make_edition(monkeypatch, 0)
    plant(tmp_path, {edition.archive: archive})
    with pytest.raises(UsageError, match=r"data\.by_content=true is of folders of image files, .*tar.gz' is none"):
        open_catalog(config(tmp_path, by_content=True), "train")


@pytest.mark.parametrize("kind", SIGNATURES)
def test_every_format_is_known_by_its_beginning(kind, tmp_path):
    (tmp_path / "x").write_bytes(encode(kind=kind))
    assert begins_like_an_image(str(tmp_path / "x"))


@pytest.mark.parametrize("content", [b"", b"BMW M3\nAudi", b"P3 is a text", b"RIFF1234WAVE", encode(kind="GIF")])
def test_what_begins_like_no_image(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    assert not begins_like_an_image(str(tmp_path / "x"))


def test_a_class_of_files_that_are_not_read_names_the_way(tmp_path):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/1.jfif": None, "train/b/2.txt": b"x"})
    message = r"b' has no image \(left unread: 2 files: 1 .jfif, 1 .txt\): .* or set data\.by_content=true"
    with pytest.raises(UsageError, match=message):
        open_catalog(config(root), "train")
    assert len(open_catalog(config(root, by_content=True), "train")) == 2


def test_tools_folders_are_no_classes_and_their_files_no_images(tmp_path):
    files = {f"train/{name}/{i}.jpg": None for name in "ab" for i in range(3)}
    expected = open_catalog(config(plant(tmp_path / "data", files)), "train").fingerprint
    tools = ["train/@eaDir/a.jpg/SYNO.jpg", "train/a/@eaDir/0.jpg/SYNO.jpg", "train/__MACOSX/a/._0.jpg"]
    tools += ["train/$RECYCLE.BIN/1.jpg", "train/lost+found/1.jpg", "@eaDir/train/1.jpg", "train/a/Thumbs.db"]
    tools += ["train/a/._0.jpg", "train/b/.ipynb_checkpoints/0.jpg", "train/b/#recycle/0.jpg"]
    root = plant(tmp_path / "data", dict.fromkeys(tools))
    catalog = open_catalog(config(root), "train")
    assert catalog.fingerprint == expected
    for what in ("2 @eaDir", "1 #recycle", "1 $RECYCLE.BIN", "1 ._*", "1 Thumbs.db", "1 __MACOSX", "1 lost+found"):
        assert what in catalog.summary().split("\n")[0]


def test_links_in_a_circle_are_left_out(tmp_path):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/deep/1.jpg": None, "elsewhere/2.jpg": None})
    (root / "train/a/up").symlink_to("..")
    (root / "train/b/deep/top").symlink_to(root)
    (root / "train/b/out").symlink_to(root / "elsewhere")
    (root / "elsewhere/back").symlink_to(root / "train/b")
    (root / "train/self").symlink_to("self")
    (root / "train/a/round.jpg").symlink_to("round.jpg")
    (root / "train/all").symlink_to(".")
    catalog = open_catalog(config(root), "train")
    assert list(catalog.names) == ["a/1.jpg", "a/round.jpg", "b/deep/1.jpg", "b/out/2.jpg"]
    assert catalog.excluded == [(str(root / "train/a/round.jpg"), "empty file")]
    assert "4 links to a folder that they lie in" in catalog.summary()


def test_pipes_are_not_waited_for(tmp_path, in_process):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/1.jpg": None})
    os.mkfifo(root / "train/a/2.jpg")
    (root / "train/b/3.jpg").symlink_to("/dev/null")
    for by_content in (False, True):
        catalog = open_catalog(config(root, by_content=by_content), "train", use_manifest=False)
        assert len(catalog) == 2 and "2 pipes, sockets or devices" in catalog.summary()
        verify(catalog, tmp_path / "cache")


def test_counting_asks_nothing_of_single_files(tmp_path, monkeypatch):
    files = {f"train/{name}/{i}.{ending}": None for name in "ab" for i in range(9) for ending in ("jpg", "txt")}
    root, asked = plant(tmp_path / "data", files), []
    stat = os.stat
    monkeypatch.setattr("os.stat", lambda path, **how: asked.append(str(path)) or stat(path, **how))
    from fasttrain.data.listing import list_images

    assert list_images(root / "train", by_content=False).rest.unread == {".txt": 18}
    assert not [path for path in asked if path.endswith((".jpg", ".txt"))]


# No labels ---------------------------------------------------------------------------------------------------------


def unlabelled(root: Path, layout: str) -> Path:
    names = {
        "root": ["{}.jpg"],
        "split": ["train/{}.jpg"],
        "mixed": ["{}.jpg", "x/{}.jpg", "x/y/{}.jpg", "z/{}.jpg"],
        "one class": ["train/all/{}.jpg"],
    }[layout]
    draw = np.random.default_rng(0)
    for i in range(24):
        path = root / names[i % len(names) if i >= 16 else 0].format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return root


LAYOUTS = ["root", "split", "mixed", "one class"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_without_labels_are_listed_and_verified(layout, tmp_path, in_process):
    root = unlabelled(tmp_path / "data", layout)
    catalog = open_catalog(config(root), "train", use_manifest=False)
    assert len(catalog) == 24 and not catalog.labels.any() and catalog.unlabelled
    assert ("24 images without labels" in catalog.summary()) == (layout != "one class")
    verify(catalog, tmp_path / "cache")
    found = open_catalog(config(root), "train")
    assert found.nbytes is not None and found.fingerprint == catalog.fingerprint and not found.notes
    first = catalog.path(0)
    os.unlink(first)
    assert len(open_catalog(config(root), "train")) == 24  # in its place another is shown
    with pytest.raises(NoSplit, match=r"no folder val or .*data\.val=…"):
        open_catalog(config(root), "val")
    assert len(open_catalog(config(root, share=0.5), "train")) == 12


def test_strays_beside_class_folders_take_no_class_away(tmp_path):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/1.jpg": None, "train/1.jpg": None, "2.jpg": None})
    catalog = open_catalog(config(root), "train")
    assert catalog.classes == ["a", "b"] and "1 .jpg beside the class folders" in catalog.summary()
    assert "1 images beside the folders of the splits" in catalog.summary()


def test_an_ffcv_file_of_images_without_labels_has_none(tmp_path):
    pytest.importorskip("ffcv")
    from fasttrain.data.beton import write_beton

    source = open_catalog(config(unlabelled(tmp_path / "data", "mixed")), "train")
    beton = write_beton(source, tmp_path / os.fsdecode(b"\xe9\n") / "train.beton", progress=False)
    catalog = open_catalog(config(beton), "train")
    assert catalog.classes == [] and catalog.unlabelled and catalog.fingerprint == source.fingerprint
    with pytest.raises(NoSplit, match=r"one FFCV file and no val.beton"):
        open_catalog(config(beton), "val")
    with pytest.raises(UsageError, match="by_content=true is of folders"):
        open_catalog(config(beton, by_content=True), "train")


# The scripts -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def launch(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    from tests.test_launch import environment as ours

    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
    return subprocess.run(command, env=ours() | environment, capture_output=True, timeout=240)


def test_a_run_of_odd_names_from_end_to_end(tmp_path):
    """Data, run and results, all under names that no locale can write; resumed and evaluated."""
    from tests.test_launch import SMALL

    data = unlabelled(tmp_path / os.fsdecode(b"d\xe9\x1b[1m"), "root")
    (data / os.fsdecode(b"caf\xe9\n.jpg")).write_bytes(encode()[:300])
    folder = tmp_path / os.fsdecode(b"r\xff x")
    arguments = [*SMALL, f"data.root={data}", f"run.dir={folder}", "loader.bad_share=0.1"]
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    first = launch("pretrain", *arguments, **ascii_only)
    assert first.returncode == 0, first.stderr
    assert b"evaluate.every_epochs falls to 0" in first.stderr and b"\x1b" not in first.stdout + first.stderr
    assert "caf\\xe9\\n.jpg" in (folder / "bad_images.txt").read_text()
    assert list((folder / "tensorboard").iterdir()) and (folder / "curves.png").exists()
    again = launch("pretrain", *arguments, **ascii_only)
    assert again.returncode == 0 and b"going on from" in again.stderr, again.stderr
    assert json.loads((folder / "checkpoints/step-00000006/state.json").read_text())["config"]["data"]["root"]

    prepared = launch("prepare", f"data.root={data}", PYTHONIOENCODING="utf-8:strict")
    assert prepared.returncode == 0 and b"caf\\xe9\\n.jpg: does not decode" in prepared.stdout, prepared.stderr
    assert b"val: none" in prepared.stdout
    refused = launch("eval", "knn", str(folder))
    assert refused.returncode == 2 and b"needs labels" in refused.stderr, refused.stderr
