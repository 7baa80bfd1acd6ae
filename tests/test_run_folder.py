"""What a run reports is there once, and what lies in its folder and cannot be read is set aside with a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fasttrain import engine, plots
from fasttrain.checkpoint import retention
from fasttrain.config import Config
from fasttrain.errors import NotFinite, UsageError
from fasttrain.inherited import settings_of
from fasttrain.run import Run, RunConfig, read_metrics


class Settings(Config):
    run: RunConfig


@pytest.fixture(autouse=True)
def first_of_its_process(monkeypatch):
    """TensorBoard sorts the lives of one second by process, and of one process by a number that it compares as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def life(folder: Path, start: int, *steps: int, **values: float) -> None:
    """A part of a run: it goes on at ``start`` and reports ``steps``."""
    with Run(RunConfig(dir=str(folder))) as run:
        run.open(Settings(run=run.config), start, 9)
        for step in steps:
            run.report(step, {"loss": 1.0 * step, **values})


def shown(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the loss."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.parametrize(
    "lives", [[(0, 0, 1, 2), (0, 0, 1, 2, 3)], [(0, 0, 1, 2, 3), (1, 2, 3)], [(0, 0, 1), (0, 0, 1, 2), (2, 3), (2, 3)]]
)
def test_what_lives_before_reported_beyond_the_checkpoint_is_shown_once(tmp_path, lives):
    for start, *steps in lives:
        life(tmp_path, start, *steps)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert shown(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_what_is_not_finite_is_null_in_the_file_and_nan_to_readers(tmp_path):
    life(tmp_path, 0, 1, knn_top1=math.nan, other=math.inf)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["knn_top1"] is None
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["knn_top1"]) and math.isnan(read["other"]) and read["loss"] == 1
    life(tmp_path, 1, 2)  # which writes the first line anew
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert plots.curves(tmp_path).is_file()


FOREIGN = [
    b"5",
    b"null",
    b"[1]",
    b'"text"',
    b'{"loss": 1.0}',
    b'{"step": "3", "loss": 1.0}',
    b'{"step": NaN}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 2, "loss": "low"}',
    b'{"step": 2, "loss": {"deep": [[[]]]}}',
    b"[" * 100_000,
    b'{"step": 1, "na\xffme": 2}',
    b"\x00" * 64,
    b'{"step": 1, "lo',
    b"9" * 5000,
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_line_is_set_aside_and_the_others_stay(tmp_path, capfd, foreign):
    life(tmp_path, 0, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(spoilt := first + foreign + b"\n" + b"".join(rest))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert plots.curves(tmp_path).is_file()
    life(tmp_path, 3, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert path.with_name("metrics.jsonl.unreadable").read_bytes() == spoilt
    assert "metrics.jsonl has 1 lines that cannot be read (line 2 " in (said := capfd.readouterr().err), said
    life(tmp_path, 4)
    assert "WARNING" not in capfd.readouterr().err


def test_only_a_line_that_was_cut_at_the_end_is_dropped_without_a_word(tmp_path, capfd):
    life(tmp_path, 0, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    life(tmp_path, 1, 2)
    assert not list(tmp_path.glob("*.unreadable*")) and "WARNING" not in capfd.readouterr().err
    path.write_bytes(path.read_bytes() + b"5")
    life(tmp_path, 2)
    path.write_bytes(path.read_bytes() + b"\xff\n")
    life(tmp_path, 2)
    aside = sorted(path.name for path in tmp_path.glob("*.unreadable*"))
    assert aside == ["metrics.jsonl.unreadable", "metrics.jsonl.unreadable-2"]


def folder(path: Path) -> None:
    (path / "within").mkdir(parents=True)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "bad_images.txt", "curves.png", "encoder.json"])
@pytest.mark.parametrize("make", [folder, dangling, os.mkfifo])
def test_what_is_no_file_is_set_aside(tmp_path, capfd, name, make):
    make(tmp_path / name)
    for start in (0, 1):
        life(tmp_path, start, 1)
    assert os.path.lexists(tmp_path / f"{name}.unreadable") and f"{name} is no file" in capfd.readouterr().err
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2 - (not start)


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), dangling])
def test_a_file_in_the_place_of_tensorboard_is_set_aside(tmp_path, make):
    make(tmp_path / "tensorboard")
    life(tmp_path, 0, 1)
    assert shown(tmp_path) == [(1, 1)] and os.path.lexists(tmp_path / "tensorboard.unreadable")


def test_bad_images_of_earlier_lives_stay_and_are_listed_once(tmp_path):
    def listed(start: int, *complaints: str) -> bytes:
        with Run(RunConfig(dir=str(tmp_path))) as run:
            run.open(Settings(run=run.config), start, 9)
            run.list_bad_images(SimpleNamespace(found=dict(enumerate(complaints))))
        return (tmp_path / "bad_images.txt").read_bytes()

    assert listed(0, "a is torn", "b\udcff is torn") == b"a is torn\nb\\udcff is torn\n"
    assert listed(3, "c is torn", "a is torn") == b"a is torn\nb\\udcff is torn\nc is torn\n"
    assert listed(0, "c is torn") == b"c is torn\n"


def test_a_lock_with_any_bytes_in_it_is_said(tmp_path):
    with Run(RunConfig(dir=str(tmp_path))):
        (tmp_path / "lock").write_bytes(b"\xff\xfe\n" + b"x" * 9999)
        with pytest.raises(UsageError, match="held by a live run") as caught:
            Run(RunConfig(dir=str(tmp_path)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# Evaluations ---------------------------------------------------------------------------------------------------------


def test_a_metric_that_cannot_be_measured_is_nan_with_a_line(tmp_path, capfd):
    def function(step: int) -> dict[str, float]:
        raise NotFinite("the features of 3 of 9 val images are not finite")

    with Run(RunConfig(dir=str(tmp_path), keep_best="max:top1")) as run:
        run.open(Settings(run=run.config), 0, 9)
        evaluations = [engine.Callback(1, function, ("top1",)), engine.Callback(1, lambda step: {"b": 1.0})]
        found = engine.evaluate(run, evaluations, 4)
        engine.evaluate_untrained(run, evaluations)  # it is there, and keep_best may name it
    assert math.isnan(found["top1"]) and found["b"] == 1
    assert "WARNING: top1 of step 4 cannot be measured: the features of 3 of 9 val images" in capfd.readouterr().err


VALUES = ['"0.99"', "true", "null", "NaN", "1e999", "-1e999", "[1]", "1" + "0" * 400, "1\udcff"]
JUNK = ["", "{", "5", "[]", "null", "[" * 100_000, *(f'{{"top1": {value}}}' for value in VALUES)]


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_no_checkpoint_is_the_best_by_a_value_that_is_none(tmp_path, junk, direction):
    (tmp_path / "step-00000001").mkdir()
    config = RunConfig(keep_best=f"{direction}:top1")
    assert retention.lacks_best(tmp_path, config)
    (tmp_path / "step-00000001" / retention.METRICS).write_bytes(junk.encode(errors="surrogateescape"))
    assert retention.lacks_best(tmp_path, config)
    retention.mark(tmp_path, 1, {"top1": math.nan}, config)
    assert retention.lacks_best(tmp_path, config)
    (tmp_path / "step-00000002").mkdir()
    retention.mark(tmp_path, 2, {"top1": 0.25}, config)
    assert retention.best_of(tmp_path, config) == (0.25, tmp_path / "step-00000002")
    assert not retention.lacks_best(tmp_path, RunConfig())


# What others read of it ----------------------------------------------------------------------------------------------


UNREADABLE = [os.urandom(64) + b"\xff", b"- 1", b"5", b"data: 5", b"{", b"data: [", b"[" * 100_000]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path, content):
    assert settings_of(str(tmp_path)) == settings_of(str(tmp_path / "nothing")) == settings_of("") == {}
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.yaml' cannot be read .*give data\.root") as caught:
        settings_of(str(tmp_path))
    assert "\n" not in str(caught.value)
