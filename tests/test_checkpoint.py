"""A checkpoint is whole or is not there; what is read is what was checked; nothing in it can run code."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasttrain import checkpoint
from fasttrain.checkpoint import files, retention, saver
from fasttrain.checkpoint.state import Snapshot, check_fits
from fasttrain.errors import UsageError
from fasttrain.run import RunConfig

ROOT = Path(__file__).parent.parent
TENSORS = {"weight": torch.arange(50.0), "bias": torch.ones(3)}


def taken() -> Snapshot:
    return Snapshot(TENSORS, TENSORS, {"step": 1.0}, {"00000/random.cpu": torch.get_rng_state()}, None)


def write(folder: Path, step: int) -> Path:
    return files.write(folder, step, saver._contents(step, taken(), {}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two whole checkpoints."""
    for step in (5, 10):
        write(tmp_path, step)
    return tmp_path


def test_what_was_written_is_read(folder):
    found, complaints = checkpoint.find(folder)
    assert found.path.name == "step-00000010" and not complaints
    assert (folder / "latest").read_text() == "step-00000010"
    assert found.state["step"] == 10 and found.state["optimizer_scalars"] == {"step": 1.0}
    assert all(torch.equal(found.tensors(checkpoint.MODEL)[name], TENSORS[name]) for name in TENSORS)
    assert {path.name for path in folder.iterdir()} == {"step-00000005", "step-00000010", "latest"}


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [torn, emptied, Path.unlink, linked, piped, made_a_folder])
@pytest.mark.parametrize("file", [files.MANIFEST, *files.FILES])
def test_damage_to_any_file_is_noticed_before_use(folder, file, damage):
    damage(folder / "step-00000010" / file)
    found, complaints = checkpoint.find(folder)
    assert found.path.name == "step-00000005"
    assert len(complaints) == 1 and "step-00000010 is damaged and passed over" in complaints[0]


def test_single_flipped_bits_are_noticed(folder):
    draw, path = random.Random(0), folder / "step-00000010"
    for file in (files.MANIFEST, *files.FILES):
        original = (path / file).read_bytes()
        for _ in range(60):
            flipped = bytearray(original)
            flipped[draw.randrange(len(original))] ^= 1 << draw.randrange(8)
            (path / file).write_bytes(flipped)
            assert checkpoint.verify(path) is not None, file
        (path / file).write_bytes(original)
    assert checkpoint.verify(path) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda seals: seals.pop(files.RANKS),
        lambda seals: seals.update({"../../secret": seals[files.STATE]}),
        lambda seals: seals.update({files.STATE: None}),
    ],
)
def test_a_manifest_must_list_the_files_and_no_others(folder, change):
    path = folder / "step-00000010" / files.MANIFEST
    seals = json.loads(path.read_text())
    change(seals)
    path.write_text(json.dumps(seals))
    assert checkpoint.verify(path.parent) is not None


def sealed_anew(path: Path, file: str, data: bytes) -> None:
    """Other contents, with a manifest that fits them."""
    (path / file).write_bytes(data)
    seals = json.loads((path / files.MANIFEST).read_text())
    seals[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / files.MANIFEST).write_text(json.dumps(seals))


@pytest.mark.parametrize(
    ("file", "data"),
    [
        *((file, data) for file in files.FILES for data in (b"", b"{", b"\x08" + bytes(7) + b"[1, 2, 3", b"x" * 99)),
        (files.STATE, b"[]"),
        (files.STATE, b'{"format": 2}'),
        (files.STATE, b'{"format": "2", "step": 10, "world_size": 1, "optimizer_scalars": {}}'),
        (files.STATE, b'{"format": 2, "step": 10, "world_size": 1, "optimizer_scalars": []}'),
    ],
)
def test_what_was_sealed_and_is_no_checkpoint_is_passed_over(folder, file, data):
    sealed_anew(folder / "step-00000010", file, data)
    found, complaints = checkpoint.find(folder)
    assert found.path.name == "step-00000005"
    assert "step-00000010 is damaged and passed over" in complaints[0] and file in complaints[0]


def test_a_format_of_another_version_is_no_damage(folder):
    state = json.loads((folder / "step-00000010" / files.STATE).read_text()) | {"format": 3}
    sealed_anew(folder / "step-00000010", files.STATE, json.dumps(state).encode())
    with pytest.raises(UsageError, match="has format 3, this version reads 2: use the version that wrote it"):
        checkpoint.find(folder)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (files.MODEL, lambda t: t.pop("bias"), "bias as nothing"),
        (files.MODEL, lambda t: t.update(bias=torch.ones(4)), r"bias as \[4\], not \[3\]"),
        (files.OPTIMIZER, lambda t: t.pop("momentum/bias"), "momentum/bias as nothing"),
        (files.OPTIMIZER, lambda t: t.update(other=torch.ones(1)), "other as"),
        (files.RANKS, lambda t: t.clear(), "00000/random.cpu as nothing"),
        (files.RANKS, lambda t: t.update({"00000/bias": torch.ones(9)}), "00000/bias as"),
    ],
)
def test_a_checkpoint_of_other_tensors_than_the_run_has_does_not_fit(tmp_path, file, change, said):
    module = torch.nn.Module()
    module.weight, module.bias = torch.nn.Parameter(TENSORS["weight"]), torch.nn.Parameter(TENSORS["bias"])
    optimizer = {f"momentum/{name}": tensor for name, tensor in TENSORS.items()}
    whole = Snapshot(dict(TENSORS), optimizer, {}, dict(taken().ranks), None)
    engine = SimpleNamespace(module=module)
    check_fits(files.read(files.write(tmp_path, 5, saver._contents(5, whole, {}))), engine)
    change({files.MODEL: whole.model, files.OPTIMIZER: whole.optimizer, files.RANKS: whole.ranks}[file])
    with pytest.raises(files.Damaged, match=f"{file} has {said}"):
        check_fits(files.read(files.write(tmp_path, 10, saver._contents(10, whole, {}))), engine)


def test_a_folder_in_the_place_of_the_newest_name_is_said_before_the_first_save(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(UsageError, match="latest is a folder, where the newest checkpoint's name goes: move it away"):
        files.sweep(tmp_path)


def test_only_names_of_steps_count_and_by_their_number(folder):
    for name in ("step-00000012.bak", "step-best", "step-99"):
        (folder / name).mkdir()
    assert [path.name for path in files.steps(folder)] == ["step-99", "step-00000010", "step-00000005"]


def test_none_whole_is_an_error_and_none_at_all_is_not(folder, tmp_path):
    for path in files.steps(folder):
        torn(path / files.MODEL)
    with pytest.raises(UsageError, match=r"is whole .*start over with another run\.dir"):
        checkpoint.find(folder)
    assert checkpoint.find(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("operation", ["mkdir", "_write", "_sync", "replace"])
@pytest.mark.parametrize("when", range(6))
def test_a_failing_disk_leaves_the_others_whole_and_no_rubbish(folder, monkeypatch, operation, when):
    calls = []
    where, name = {"mkdir": (Path, "mkdir"), "replace": (os, "replace")}.get(operation, (files, operation))
    original = getattr(where, name)

    def failing(*arguments, **named):
        calls.append(arguments)
        if len(calls) == when + 1:
            raise OSError(28, "No space left on device")
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, failing)
    try:
        write(folder, 15)
    except OSError:
        assert len(calls) == when + 1
    assert all(checkpoint.verify(path) is None for path in files.steps(folder))
    assert len(files.steps(folder)) >= 2 and not list(folder.glob(".*"))


def test_what_a_kill_left_is_swept(folder):
    (folder / ".step-00000015.partial").mkdir()
    (folder / ".step-00000001.removed").mkdir()
    (folder / ".latest.partial").write_text("")
    files.sweep(folder)
    assert not list(folder.glob(".*")) and len(files.steps(folder)) == 2


def kept(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(files.steps(folder))]


def test_retention_keeps_the_last_every_nth_and_the_best(tmp_path):
    config = RunConfig(keep=2, save_every=10, keep_every=30, keep_best="max:top1")
    for step in range(10, 110, 10):
        retention.prune(tmp_path, write(tmp_path, step), config)
        if step % 20 == 10:  # the others were not evaluated
            retention.mark(tmp_path, step, {"top1": {50: 0.9, 70: float("nan")}.get(step, step / 1000)}, config)
    assert kept(tmp_path) == [30, 50, 60, 90, 100]
    assert retention.best_of(tmp_path, RunConfig(keep_best="min:top1"))[1].name == "step-00000030"
    assert not list(tmp_path.glob("*/.*")) and checkpoint.verify(tmp_path / "step-00000050") is None


def test_retention_counts_from_the_newest_whole_one_and_keeps_it(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    torn(tmp_path / "step-00000030" / files.MODEL)  # the run went on from 20, and now saves 25
    retention.prune(tmp_path, write(tmp_path, 25), RunConfig(keep=1))
    assert kept(tmp_path) == [25]


def test_keep_every_that_no_checkpoint_meets_is_refused():
    with pytest.raises(ValueError, match="no multiple of save_every"):
        RunConfig(save_every=100, keep_every=250)


@pytest.fixture
def watched(folder, monkeypatch):
    """A saver of a run that says what it has to say to a list."""
    lines: list[str] = []
    run = SimpleNamespace(checkpoints=folder, config=RunConfig(), say=lines.append, lines=lines)
    monkeypatch.setattr(saver, "snapshot", lambda engine: taken())
    return checkpoint.Saver(run, None, dict), run


def test_training_goes_on_while_a_checkpoint_is_written(watched, monkeypatch):
    saving, run = watched
    allowed, write_file = threading.Event(), files._write
    monkeypatch.setattr(files, "_write", lambda *given: allowed.wait(10) and write_file(*given))
    saving.save(15)
    assert not (run.checkpoints / "step-00000015").exists()
    second = threading.Thread(target=saving.save, args=(20,))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # one at a time
    allowed.set()
    second.join(10)
    saving.finish()
    assert kept(run.checkpoints) == [10, 15, 20] and not saving.failed
    assert saving.timings().keys() == {"save_stall_seconds", "save_seconds"}


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_save_that_fails_stops_the_run_or_not_as_told(watched, monkeypatch, policy):
    saving, run = watched
    run.config = RunConfig(on_save_error=policy)
    write = files._write

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    saving.save(15)
    saving._join()
    assert saving.failed == (policy == "stop")
    message = r"checkpoint of step 15 cannot be written .*No space left on device"
    assert len(run.lines) == 1 and re.match(f"WARNING: the {message}", run.lines[0])
    with pytest.raises(UsageError, match=message):  # it was the last, or the run is to stop
        saving.finish()
    assert kept(run.checkpoints) == [5, 10]
    monkeypatch.setattr(files, "_write", write)
    saving.save(20)
    saving.finish()
    assert not saving.failed and kept(run.checkpoints) == [5, 10, 20]


def test_what_evaluations_found_is_written_beside_the_checkpoint_that_is_still_on_its_way(watched, monkeypatch):
    saving, run = watched
    run.config = RunConfig(keep=1, keep_best="max:top1")
    saving.save(15)
    saving.mark(15, {"top1": 0.5})
    saving.save(20)
    saving.mark(20, {"top1": 0.4})
    saving.mark(25, {"top1": 0.9})  # could not be written, which was said
    assert kept(run.checkpoints) == [15, 20] and not run.lines
    (run.checkpoints / "step-00000020" / f".{retention.METRICS}.partial").mkdir()
    saving.mark(20, {"top1": 0.6})
    assert kept(run.checkpoints) == [15, 20] and "metrics of the checkpoint of step 20" in run.lines[0]


UNPICKLERS = {
    ("fasttrain/data/cifar.py", "pickle.Unpickler"),  # names what it may find: arrays and their parts
    ("fasttrain/weights/files.py", "torch.load"),  # weights_only: tensors alone, and inert stand-ins
}


def test_nothing_is_unpickled_but_by_an_allow_list():
    found = set()
    for path in [*(ROOT / "fasttrain").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "dist.all_gather_object"):
                found.add((str(path.relative_to(ROOT)), text))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
            allowed = (
                not isinstance(node, ast.keyword) or node.arg != "allow_pickle" or ast.unparse(node.value) == "False"
            )
            assert allowed and "broadcast_object_list" not in text, path
    assert found <= UNPICKLERS
