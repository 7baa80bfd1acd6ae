"""What a report finds, and what it says of it."""

from __future__ import annotations

import json
import math
import sys
from html import unescape
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import yaml

from fasttrain.errors import UsageError
from fasttrain.report import series
from fasttrain.report.collect import collect
from fasttrain.report.environments import facts, groups
from fasttrain.report.page import FEW_RUNS, html
from fasttrain.report.runs import differing, duration, table
from tests.reported import ENVIRONMENT, NAMES, make_everything, make_result, make_run, page_of, picture
from tests.test_launch import script


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return make_everything(tmp_path_factory.mktemp("report"))


def cells(found, label: str) -> list[str]:
    return [cell.text for column in table(found) if column.label == label for cell in column.cells]


def test_runs_results_and_papers_are_found_below_and_each_once(everything):
    found = collect([str(everything), str(everything / "runs"), str(everything / "eval-curves.json")])
    assert len(found.runs) == len(NAMES)
    assert [result.values["task"] for result in found.results] == ["curves", "knn"]
    assert len(found.papers) == 1 and found.base == everything
    assert [line for line in found.complaints if "metrics" not in line] == []
    names = [found.name(run.path) for run in found.runs]
    assert names.index("runs/simclr_2") < names.index("runs/simclr_10")


def test_nothing_at_all_is_one_line(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(UsageError, match=r"nothing to report on in .*holds no run.*give runs' folders"):
        collect([str(tmp_path)])
    with pytest.raises(UsageError, match="gone' is not there"):
        collect([str(tmp_path / "gone")])


def test_what_cannot_be_read_is_said_and_left_out(tmp_path):
    run = make_run(tmp_path / "run", 1)
    (run / "environment.json").write_text('{"command": "lau')
    (run / "config.yaml").write_text("run: {dir: [")
    (run / "metrics.jsonl").write_bytes(b'{"step": 10, "loss": 3.0}\n\xff\xfe\n{"step": 20, "lo')
    (run / "curves.png").write_bytes(picture()[:-9])
    (tmp_path / "eval-knn.json").write_text('{"task": "knn", ')
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[1]")
    make_result(tmp_path / "eval-ok.json")
    found = collect([str(tmp_path), str(tmp_path / "notes.json"), str(tmp_path / "absent")])
    text = html(found, "", "").decode()
    said = "\n".join(found.complaints)
    for name in ("environment.json", "config.yaml", "eval-knn.json"):
        assert f"{name}' is not whole" in said
    assert "metrics.jsonl' has 2 of 3 lines that cannot be read" in said and "curves.png' is no whole PNG" in said
    assert "absent' is not there" in said and "list.json" not in said
    assert len(found.runs) == len(found.results) == 1 and cells(found, "loss") == ["3"]
    assert all(line in unescape(text) for line in found.complaints)


def test_a_given_file_that_is_neither_is_said_but_for_what_lies_beside_results(tmp_path):
    make_run(tmp_path / "run", 1)
    make_result(tmp_path / "eval-knn.json")
    (tmp_path / "eval-knn.parts").mkdir()
    (tmp_path / "notes.json").write_text('{"a": 1}')
    for name in ("report.html", "simclr.log", "other.png"):
        (tmp_path / name).write_text("")
    found = collect(sorted(map(str, tmp_path.iterdir())))  # runs/*
    assert found.complaints == [
        f"'{tmp_path}/notes.json' is no result (it names no task) and no experiment.json: left out",
        f"no folder and no JSON, and so left out: '{tmp_path}/other.png'; '{tmp_path}/simclr.log'",
    ]
    assert len(found.runs) == len(found.results) == 1


@pytest.mark.parametrize("junk", [3, "text", [1, None], {"a": {"b": []}}, None, math.inf, "\ud800"])
def test_fields_of_any_kind_make_a_page(tmp_path, junk):
    make_run(tmp_path / "run", 1, environment=dict.fromkeys(ENVIRONMENT, junk))
    (tmp_path / "run/config.yaml").write_text(json.dumps({"terms": junk, "train": junk}).replace("Infinity", ".inf"))
    make_result(
        tmp_path / "eval-a.json", **dict.fromkeys(("about", "source", "lines", "settings", "train", "seconds"), junk)
    )
    paper = {"experiment": "a"} | dict.fromkeys(("tables", "findings", "figures", "commands", "title"), junk)
    (tmp_path / "experiment.json").write_text(json.dumps(paper))
    tables = [{"columns": junk, "rows": [{"name": junk, "cells": [junk, {"mean": junk, "n": junk}]}]}]
    (tmp_path / "other").mkdir()
    paper |= {"tables": tables, "findings": [{"shown": junk, "value": junk}], "figures": [{"picture": junk}]}
    (tmp_path / "other/experiment.json").write_text(json.dumps(paper))
    assert "<main>" in page_of(tmp_path)


def test_settings_that_differ_and_keys_that_some_lack(tmp_path):
    for number, name in enumerate("abc"):
        make_run(tmp_path / name, number)
    one = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    one["terms"] = {"supervised": one["terms"]["simclr"] | {"objective": "cross_entropy"}}
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(one | {"fare": {"alpha": 1}}))
    assert differing(collect([str(tmp_path)]).runs) == {
        "terms": ["supervised", "simclr", "simclr"],
        "terms.*.objective": ["cross_entropy", "nt_xent", "nt_xent"],
        "terms.*.penalty.weight": [0.0, 0.1, 0.2],
        "run.seed": [0, 1, 2],
    }
    one["terms"]["other"] = {"objective": "sup_con"}
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(one))
    assert differing(collect([str(tmp_path)]).runs) == {
        "terms": ["other + supervised", "simclr", "simclr"],
        "terms.simclr.penalty.weight": [None, 0.1, 0.2],
        "run.seed": [0, 1, 2],
    }


def test_one_run_alone_shows_no_setting(tmp_path):
    make_run(tmp_path / "only", 3)
    assert [column.kind for column in table(collect([str(tmp_path)]))] == ["result"] * 9


def test_the_row_of_a_run(tmp_path):
    make_run(tmp_path / "done", 3)
    make_run(tmp_path / "going", 4, environment=ENVIRONMENT | {"done": None})
    make_run(tmp_path / "old", 5, environment=None)
    (tmp_path / "old/encoder.json").write_text('{"step": 400}')
    make_run(tmp_path / "silent", 6, environment=None)
    (tmp_path / "silent/metrics.jsonl").write_text("")
    found = collect([str(tmp_path)])
    assert cells(found, "kNN %") == ["15.0", "20.0", "25.0", ""]
    assert cells(found, "loss") == ["3.225", "4.225", "5.225", ""]
    assert cells(found, "steps") == ["400", "400", "400", "0"]  # going: 10 epochs of 40 steps, all done
    assert cells(found, "time in steps") == ["40 s", "40 s", "40 s", ""]
    assert cells(found, "images/s") == ["640", "640", "640", ""]
    assert cells(found, "state") == ["done", "unfinished", "done (weights are there)", "not said"]
    assert cells(found, "machine") == ["2 cores of a CPU", "2 cores of a CPU", "", ""]


def test_steps_to_come_and_the_best_of_a_metric(tmp_path):
    run = make_run(tmp_path / "run", 2, reports=20, environment=ENVIRONMENT | {"done": None})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "knn_top1": 0.05}\n')
    found = collect([str(run)])
    assert cells(found, "steps") == ["200 / ≈400"]
    assert cells(found, "kNN %") == ["5.0"] and cells(found, "best kNN %") == ["10.0"]


def test_a_robust_accuracy_has_its_interval_and_its_attack(tmp_path):
    attack = {"name": "apgd", "norm": "linf", "eps_255": 8.0, "steps": 10, "restarts": 1, "random_start": True}
    for name, images in (("new", {"robust_images": 1000}), ("old", {})):
        run = make_run(tmp_path / name, 2)
        (run / "config.yaml").write_text(yaml.safe_dump({"robust": {"attack": attack}}))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 400, "robust_top1": 0.033, **images}) + "\n")
    make_run(tmp_path / "plain", 3)
    found = collect([str(tmp_path)])
    assert cells(found, "robust %") == ["3.3 (2.4 to 4.6)", "3.3", ""]
    told = "apgd on cross-entropy, linf 8/255, 10 steps"
    assert cells(found, "robust under") == [f"{told}, 1,000 images", told, ""]
    assert "robust_images" not in [metric["key"] for metric in series.curves(found)["metrics"]]


def test_durations():
    assert [duration(s) for s in (3, 119, 600, 7260, 90_000)] == ["3 s", "119 s", "10 min", "2 h 01 min", "25 h 00 min"]


def test_thinning_keeps_every_extreme_and_the_ends():
    values = [math.sin(i) for i in range(10_000)]
    values[1234], values[7001], values[5000] = 50.0, -50.0, math.nan
    chosen = series.extremes(values, 300)
    assert len(chosen) <= 300 and {0, 1234, 5000, 7001, 9999} <= set(chosen)
    assert all(a < b for a, b in pairwise(chosen))
    assert series.extremes(values[:300], 300) == list(range(300))


def test_the_moving_mean_is_of_those_around():
    assert series.moving_mean([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert series.moving_mean([1.0, 2.0], 1) == [1.0, 2.0]
    assert [math.isnan(v) for v in series.moving_mean([1, math.nan, 1, 1, 1], 3)] == [True, True, True, False, False]


def test_curves_are_in_percent_where_they_are_shares(everything):
    curves = series.curves(collect([str(everything / "runs")]))
    assert [metric["key"] for metric in curves["metrics"]][:2] == ["loss", "knn_top1"]
    labels = {metric["key"]: metric["label"] for metric in curves["metrics"]}
    assert labels["knn_top1"] == "kNN accuracy (%)" and labels["loss/a"] == "loss: a"
    last = next(run for run in curves["runs"] if run["name"] == "simclr_10")
    assert last["series"]["knn_top1"] == {"x": [400], "y": [15.0]}
    assert last["series"]["loss"]["y"][3] is None and len(last["series"]["loss"]["s"]) == 40


def test_environments_are_grouped_and_differences_marked(everything):
    found = collect([str(everything)])
    together, silent = groups(found)
    assert [len(group.members) for group in together] == [6, 2] and silent == ["run runs/simclr_1"]
    assert [(fact.name, fact.differs) for fact in facts(together)] == [
        ("machine", False), ("Python", False), ("torch", True)
    ]  # fmt: skip


def test_names_are_text_and_no_code(everything):
    text = page_of(everything)
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    assert "Robustness &lt;of&gt; contrastive learning" in text


def test_a_paper_says_what_was_found_and_what_failed(everything):
    text = unescape(page_of(everything))
    for said in ("41.23 ± 1.50", "paper 45.10", "+3.2 ± 0.40 %", "paper +5.5", "few seeds", "a share of the images"):
        assert said in text, said
    for verdict in ("shown", "not shown", "not told apart", "no result yet"):
        assert f">{verdict}</span>" in text
    assert "1 failed" in text and "failed: the disk is full" in text


def test_a_picture_of_a_paper_is_in_the_page_once(everything):
    text = page_of(everything)
    assert "above, in the paper’s" in text and "the picture is not there yet" in text
    assert text.count("data:image/png") == 2 + len(NAMES)  # the paper's, the other result's, the runs' own


def test_many_runs_come_without_their_pictures(tmp_path):
    for number in range(FEW_RUNS + 1):
        make_run(tmp_path / f"run_{number}", number, reports=4)
    text = page_of(tmp_path)
    assert "data:image/png" not in text and f"{FEW_RUNS} runs or fewer" in text


def test_the_script_writes_the_page_and_says_what_it_left_out(everything, tmp_path, monkeypatch, capsys):
    report = script("report")
    place = tmp_path / "new/page.html"
    argv = ["launch/report.py", str(everything), f"output={place}"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        report.cli.main(report.ReportConfig, report.report, "", positional=("sources",))
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "7 runs, 2 evaluations, 1 paper\n" in said and "2 of 3 lines" in said
    assert f"output={place}" in place.read_text()
    found = collect([str(everything)])
    monkeypatch.chdir(everything)
    assert report.place_of(found) == Path("report.html")
    with mock.patch.object(found, "base", Path("/")):
        assert report.place_of(found) == Path("report.html")
