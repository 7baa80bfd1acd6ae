"""Evaluations in parts: kept, shared among ranks, gone on with."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from fasttrain import distributed
from fasttrain.errors import UsageError
from fasttrain.evaluation.parts import Parts, Queue, key_of
from fasttrain.stop import Stopped, StopRequest
from tests.ranks import run_ranks

POINTS = [{"weights": "a", "eps": eps} for eps in (0.0, 0.1, 1 / 3, 4.0, 5.0)]


def found_at(point: dict) -> dict:
    return {"loss": point["eps"] / 7, "none": math.inf, "curve": torch.arange(3) * point["eps"]}


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        (a["loss"], a["none"]) == (b["loss"], b["none"]) and a["curve"].equal(b["curve"])
        for a, b in zip(one, other, strict=True)
    )


def test_what_is_kept_comes_back_to_the_bit_and_is_not_worked_on_again(tmp_path):
    expected = Parts(None).run("curve", POINTS, found_at)
    assert same(expected, [found_at(point) for point in POINTS])
    assert same(Parts(tmp_path / "parts").run("curve", POINTS[:3], found_at), expected[:3])
    asked = []
    again = Parts(tmp_path / "parts").run("curve", POINTS, lambda point: asked.append(point) or found_at(point))
    assert same(again, expected) and asked == POINTS[3:]


def test_a_point_asked_for_twice_is_one_part():
    asked = []
    found = Parts(None).run("curve", POINTS[:1] * 2, lambda point: asked.append(point) or {"x": 1})
    assert found == [{"x": 1}] * 2 and len(asked) == 1


def test_a_line_cut_short_and_arrays_that_are_gone_are_done_again(tmp_path):
    Parts(tmp_path).run("curve", POINTS, found_at)
    (lines,) = tmp_path.glob("*.jsonl")
    lines.write_bytes(lines.read_bytes()[:-10])
    (tmp_path / f"{key_of(POINTS[0])}.safetensors").write_bytes(b"cut")
    asked = []
    again = Parts(tmp_path).run("curve", POINTS, lambda point: asked.append(point) or found_at(point))
    assert asked == [POINTS[0], POINTS[-1]] and same(again, [found_at(point) for point in POINTS])


def test_other_weights_are_another_point(tmp_path):
    Parts(tmp_path).run("curve", [{"weights": "a"}], lambda point: {"x": 1})
    assert Parts(tmp_path).run("curve", [{"weights": "b"}], lambda point: {"x": 2}) == [{"x": 2}]


def test_a_signal_ends_between_two_parts_and_keeps_what_is_done(tmp_path):
    def work(point: dict) -> dict:
        if point == POINTS[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return found_at(point)

    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(), pytest.raises(Stopped):
        Parts(tmp_path).run("curve", POINTS, work)
    signal.signal(signal.SIGTERM, before)
    asked = []
    Parts(tmp_path).run("curve", POINTS, lambda point: asked.append(point) or found_at(point))
    assert asked == POINTS[2:]


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be kept in '.*' .*free space .*another place with output=…"):
        Parts(tmp_path / "file/parts").run("curve", POINTS, found_at)


def _on_two_ranks(folder: str) -> tuple[list[dict], int]:
    asked = []
    found = Parts(Path(folder)).run("curve", POINTS, lambda point: asked.append(point) or found_at(point))
    return found, len(asked)


def test_ranks_share_the_parts_and_all_have_all(tmp_path):
    (first, mine), (second, theirs) = run_ranks(2, _on_two_ranks, str(tmp_path))
    assert same(first, second) and same(first, [found_at(point) for point in POINTS])
    assert mine + theirs == len(POINTS)
    kept = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["key"] for line in kept) == sorted(map(key_of, POINTS))
    assert run_ranks(2, _on_two_ranks, str(tmp_path))[1][1] == 0


def _a_mistake_on_one(folder: str) -> str:
    def work(point: dict) -> dict:
        if distributed.rank() == 1:
            raise UsageError("this is wrong")
        while not Queue("parts-0").halted():
            pass
        return found_at(point)

    with pytest.raises(UsageError) as caught:
        Parts(Path(folder)).run("curve", POINTS, work)
    return str(caught.value)


def test_a_mistake_that_one_rank_meets_ends_all(tmp_path):
    assert run_ranks(2, _a_mistake_on_one, str(tmp_path)) == ["rank 1: this is wrong"] * 2


def _a_signal_to_one(folder: str) -> int:
    done = 0

    def work(point: dict) -> dict:
        nonlocal done
        done += 1
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        while not Queue("parts-0").halted():
            pass
        return found_at(point)

    with StopRequest(), pytest.raises(Stopped):
        Parts(Path(folder)).run("curve", POINTS, work)
    return done


def test_a_signal_to_one_rank_ends_all_and_keeps_what_is_done(tmp_path):
    done = run_ranks(2, _a_signal_to_one, str(tmp_path))
    assert done[1] == 1 and done[0] <= 1  # 0 where the signal came before it took one
    asked = [asked for _, asked in run_ranks(2, _on_two_ranks, str(tmp_path))]
    assert sum(asked) == len(POINTS) - sum(done)
