"""The benchmark runs, and its table says what it timed."""

from __future__ import annotations

import json

from fasttrain.benchmarks.timing import alternate, table
from fasttrain.config import load
from tests.test_launch import script


def test_contestants_take_turns_after_a_warm_up():
    turns = []

    def contestant(name):
        def run():
            turns.append(name)
            return 10

        return run

    timings = alternate({"a": contestant("a"), "b": contestant("b")}, rounds=2)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert [len(timing.rates) for timing in timings] == [2, 2]
    assert "| a |" in table(timings, "images")


def test_loaders_are_compared_with_bare_pipelines(images, tmp_path, capsys):
    module = script("bench")
    small = ["batch=4", "batches=3", "rounds=1", "augment.size=16", "loader.threads=1"]
    given = [f"data.root={images}", f"output={tmp_path / 'bench.json'}", *small]
    module.bench(load(module.BenchConfig, ["task=loader", *given]))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names == ["fasttrain, all", "fasttrain, crop and flip", "bare DALI, all", "bare DALI, crop and flip"]
    assert all(row["rates"][0] > 0 for row in rows)
    assert "bare DALI, all" in capsys.readouterr().out
