"""Names that are not text, what lies among the images and is none, folders that hold themselves, no labels at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain import cli
from fasttrain.config import load
from fasttrain.data import manifest
from fasttrain.data.catalog import NoSplit, open_catalog
from fasttrain.data.damage import Bad, BadImages
from fasttrain.data.listing import SIGNATURES, begins_like_an_image
from fasttrain.data.verify import verify
from fasttrain.errors import UsageError
from fasttrain.evaluation.online import open_measured
from fasttrain.export import export
from fasttrain.models import Encoder, ModelConfig
from fasttrain.printable import printable
from tests.test_catalog import config, encode, plant
from tests.test_launch import SMALL, script

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
    assert found.nbytes is not None and found.fingerprint == catalog.fingerprint
    expected = ["18 images lie directly in it and 6 in folders, which are therefore taken for no classes"]
    assert found.notes == (expected if layout == "mixed" else [])
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


def call(name: str, *arguments: str) -> int | None:
    """A script's work in this process."""
    module = script(name)
    schema, body, base = {
        "pretrain": ("PretrainConfig", "pretrain", None),
        "finetune": ("FinetuneConfig", "finetune", "of_source"),
        "eval": ("EvalConfig", "evaluate", "of_run"),
        "prepare": ("PrepareConfig", "prepare", None),
    }[name]
    base = [getattr(module, base)] if base else []
    schema = module.schema_of("knn") if name == "eval" else getattr(module, schema)
    return getattr(module, body)(load(schema, list(arguments), *base))


def test_a_run_of_odd_names_from_end_to_end(tmp_path, capfd, in_process):
    """Data, run and weights under names that are no text: nothing raises, and what is said can be printed anywhere."""
    data, run = tmp_path / os.fsdecode(b"d\xe9\x1b[1m"), tmp_path / os.fsdecode(b"r\xff\x1b x")
    for split in ("train", "val"):
        for name in (b"a\xe9", b"b\n"):
            unlabelled(data / split / os.fsdecode(name), "root")
    (data / "train" / os.fsdecode(b"b\n") / os.fsdecode(b"caf\xe9\n.jpg")).write_bytes(encode()[:300])
    arguments = [*SMALL, f"data.root={data}", f"run.dir={run}", "loader.bad_share=0.1"]
    for _ in range(2):
        assert call("pretrain", *arguments) == 0
    assert "b\\n/caf\\xe9\\n.jpg" in (run / "bad_images.txt").read_text()
    assert list((run / "tensorboard").iterdir()) and (run / "curves.png").exists()
    call("eval", "task=knn", f"source={run}", "device=cpu")
    assert json.loads((run / "eval-knn.json").read_text())["train"]["where"] == str(data / "train")
    call("prepare", f"data.root={data}", f"data.cache={tmp_path}")
    said = "".join(capfd.readouterr())
    assert "going on from" in said and "r\\xff\\x1b x/encoder.safetensors" in said and "left out: 1" in said
    assert all(line.isprintable() for line in said.replace("\t", " ").split("\n") if "\\x1b" in line)


def test_printing_never_ends_a_script(monkeypatch, tmp_path):
    stream = open(tmp_path / "out", "w", encoding="ascii", errors="strict")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # to be put back
    monkeypatch.setattr(cli.distributed, "finalize", lambda: None)  # other tests of this process go on
    monkeypatch.setattr(sys, "argv", ["prepare.py", "data.root=/nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main(script("prepare").PrepareConfig, lambda config: print("caf\udce9 ü 😀"), "")
    assert ended.value.code == 0 and (tmp_path / "out").read_bytes() == b"caf\\udce9 \\xfc \\U0001f600\n"


def test_pretraining_needs_no_labels_and_says_what_falls_away(tmp_path, capfd):
    data = [f"data.root={unlabelled(tmp_path / 'data', 'mixed')}", f"run.dir={tmp_path / 'run'}"]
    assert call("pretrain", *SMALL, *data) == 0
    captured = capfd.readouterr()
    assert "note: evaluate.every_epochs falls to 0, since the images in" in captured.err
    assert "kNN" not in captured.out and "every_epochs: 0" in (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UsageError, match=r"the accuracy of knn needs labels, .* have no labels: give data\.root=…"):
        call("eval", "task=knn", f"source={tmp_path / 'run'}", "device=cpu")
    with pytest.raises(UsageError, match=r"run\.keep_best=max:knn_top1: no accuracy can be measured, .* no labels"):
        call("pretrain", *SMALL, data[0], f"run.dir={tmp_path / 'best'}", "run.keep_best=max:knn_top1")
    with pytest.raises(UsageError, match=r"sup_con tells classes apart and the images have no labels"):
        call("pretrain", *SMALL, data[0], f"run.dir={tmp_path / 'sup'}", "terms.simclr.objective=sup_con")


def test_finetuning_needs_no_labels_but_for_its_cross_entropy(tmp_path, capfd):
    source = export(Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.0625)), tmp_path)
    few = [f"data.root={unlabelled(tmp_path / 'data', 'split')}", f"source={source}", "train.steps=2"]
    few += ["augment.size=16", "train.batch=8", "optimizer.warmup_steps=0", "attack.steps=1", "train.precision=fp32"]
    assert call("finetune", *few, f"run.dir={tmp_path / 'run'}") == 0
    assert "robust.every_steps falls to 0, since the images in" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"fare\.against=cross_entropy needs labels, .* fare\.against=distance"):
        call("finetune", *few, f"run.dir={tmp_path / 'other'}", "fare.against=cross_entropy")


@pytest.mark.parametrize("layout", ["split", "one class"])
def test_a_training_split_alone_is_prepared_and_measured_by_nothing(tmp_path, layout, capsys, in_process):
    root = unlabelled(tmp_path / "data", layout)
    call("prepare", f"data.root={root}", f"data.cache={tmp_path}")
    out = capsys.readouterr().out
    assert "train: 24 images" in out and "val: none; data.root=" in out and "data.val=…" in out
    with pytest.raises(UsageError, match="no folder val"):
        call("prepare", f"data.root={root}", "splits=[val]")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "has no folder val"),
        ({"val/1.jpg": None}, "/val' have no labels"),
        ({"val/a/1.jpg": None, "val/b/1.jpg": None}, None),
    ],
)
def test_accuracy_is_measured_where_both_splits_have_labels(tmp_path, files, why):
    root = plant(tmp_path / "data", {"train/a/1.jpg": None, "train/b/1.jpg": None, **files})
    catalogs = open_measured(config(root), "evaluate.every_epochs", None)
    assert len(catalogs) == 1 + (why is None)
    if why:
        (note,) = catalogs[0].notes
        assert note.startswith("evaluate.every_epochs falls to 0, since") and why in note
    assert len(open_measured(config(root), None, None)) == 1
    with pytest.raises(UsageError, match=r"data\.val='dev' is no folder"):  # asked for by name
        open_measured(config(root, val="dev"), "evaluate.every_epochs", None)
