"""The benchmark of the interpreter's lock: who is in the table, and what it counts."""

from __future__ import annotations

import json
import time

import pytest

from fasttrain import distributed
from fasttrain.benchmarks import lock
from fasttrain.config import load
from tests.test_launch import script


@pytest.mark.parametrize("beton", [False, True])
def test_each_kind_of_loader_is_in_the_table(images, tmp_path, capsys, beton):
    root = images
    if beton:
        pytest.importorskip("ffcv.reader", reason="FFCV is not installed")
        from fasttrain.data.beton import write_beton
        from fasttrain.data.catalog import DataConfig, open_catalog

        catalog = open_catalog(DataConfig(root=str(images), cache=str(tmp_path / "cache")), "train")
        root = write_beton(catalog, tmp_path / "train.beton", progress=False)
    module = script("bench")
    given = [f"data.root={root}", f"output={tmp_path / 'bench.json'}", "augment.size=16", "loader.threads=1"]
    module.bench(load(module.LockBench, ["task=lock", "quick=true", "seconds=0.05", *given], module.base))
    rows = {row["name"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    printed = capsys.readouterr().out
    loaders = ["ffcv", "resident"] if beton else ["dali, without decoding", "dali", "resident"]
    assert list(rows) == [lock.ALONE, lock.COMPUTING, lock.PYTHON, *loaders]
    assert rows[lock.ALONE]["slower"] == [1.0] and rows[lock.ALONE]["images"] == [0.0]
    assert all(f"| {name} |" in printed for name in rows)
    assert all(rows[name]["images"][0] > 0 and rows[name]["operations"][0] > 0 for name in loaders)


def test_a_run_hands_the_lock_on_sooner_than_python_does(monkeypatch):
    intervals = []
    monkeypatch.setattr(distributed.sys, "setswitchinterval", intervals.append)
    distributed.initialize("cpu")
    assert intervals == [distributed.SWITCH_INTERVAL] and distributed.SWITCH_INTERVAL < 0.001


def test_work_beside_runs_in_a_thread_of_its_own_and_its_failure_is_raised():
    def work() -> int:
        time.sleep(0.001)
        return 5

    operations, images = lock.launch_beside(work, 0.05)
    assert operations > 0 and images > 0
    assert lock.launch_beside(None, 0.01)[1] == 0
    with pytest.raises(ZeroDivisionError):
        lock.launch_beside(lambda: 1 // 0, 0.01)


def test_time_without_a_core_is_not_the_locks(monkeypatch):
    """Half of the time spent so doubles the rate."""
    waits = iter([0.0, 0.05])
    monkeypatch.setattr(lock, "_without_core", lambda: next(waits))
    clock = iter([0.0, 0.01, 0.1, 0.1])
    monkeypatch.setattr(lock.time, "perf_counter", lambda: next(clock))
    operations, _ = lock.launch_beside(None, 0.1)
    assert operations == pytest.approx(100 / 0.05)
