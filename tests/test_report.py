"""The page of runs, evaluations and papers: what is found, and what a real browser makes of it."""

from __future__ import annotations

import io
import json
import math
import sys
from html import unescape
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from fasttrain.errors import UsageError
from fasttrain.report import series
from fasttrain.report.collect import collect
from fasttrain.report.environments import facts, groups
from fasttrain.report.page import FEW_RUNS, html
from fasttrain.report.runs import SETTINGS, differing, duration, table
from tests.browser import Browser, chromium
from tests.test_launch import script

HOSTILE = "<script>alert(1)</script>".replace("/", "∕")  # a name has no slash
NAMES = ("simclr_1", "simclr_2", "simclr_10", "two words", 'it\'s "so"', "日本 & ü", HOSTILE)
ENVIRONMENT = {
    "command": "launch/pretrain.py train.steps=400",
    "started": "2026-01-01T00:00:00+00:00",
    "done": "2026-01-01T00:10:00+00:00",
    "ranks": 2,
    "hosts": {"one": 2},
    "machine": "2 cores of a CPU",
    "versions": {"Python": "3.11", "torch": "2.9"},
    "git": {"commit": "0123456789abcdef", "changed": True},
    "earlier": [],
}


def picture(colour: str = "red") -> bytes:
    drawn = io.BytesIO()
    Image.new("RGB", (300, 100), colour).save(drawn, "png")
    return drawn.getvalue()


def make_run(folder: Path, number: int, reports: int = 40, environment: dict | None = ENVIRONMENT) -> Path:
    """A folder as a training leaves it; its kNN accuracy is 5 % a number."""
    folder.mkdir(parents=True)
    settings = {
        "run": {"dir": str(folder), "seed": number},
        "terms": {"simclr": {"objective": "nt_xent", "penalty": {"weight": number / 10}}},
        "train": {"epochs": 10, "steps": None, "batch": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {
            "step": 10 * i,
            "epoch": i / 4,
            "loss": 9 / i + number,
            "loss/a": 9 / i,
            "lr": 0.1,
            "images_per_second": 640,
        }
        for i in range(1, reports + 1)
    ]
    lines[3]["loss"] = None
    lines.append({"step": 10 * reports, "knn_top1": number / 20})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "curves.png").write_bytes(picture())
    return folder


def make_result(path: Path, task: str = "knn", **values: object) -> Path:
    said = {
        "task": task,
        "about": "accuracy of the nearest neighbours",
        "source": ["runs/simclr_1"],
        "command": f"launch/eval.py {task} runs/simclr_1",
        "seconds": 12.5,
        "date": "2026-01-01T00:00:00+00:00",
        "machine": "2 cores of a CPU",
        "versions": {"Python": "3.11", "torch": "2.8"},
        "settings": {"task": task, "data": {"root": "/data/" + "long/" * 40}},
    }
    path.write_text(json.dumps(said | values))
    path.with_suffix(".png").write_bytes(picture("blue"))
    return path


def make_paper(folder: Path) -> None:
    cell = {"mean": 41.234, "sd": 1.5, "n": 3, "paper": 45.1}
    columns = [f"{share} %" for share in (100, 50, 20, 10, 5, 2, 1, 0.5)]
    values = {
        "experiment": "tikhonov",
        "title": "Robustness <of> contrastive learning",
        "source": "A. Author, a paper",
        "scale": "small",
        "command": "launch/experiment.py configs/experiments/tikhonov.yaml",
        "tables": [{"name": "table1", "title": "Table 1", "unit": "%", "columns": columns, "rows": [
            {"name": "contrastive", "cells": [cell] * 7 + [None]},
            {"name": "supervised", "cells": [{**cell, "mean": None, "sd": math.nan}] * 8},
        ]}],
        "findings": [
            {"claim": "it is ahead", "shown": True, "value": 3.2, "error": 0.4, "unit": "%"},
            {"claim": "it is behind", "shown": False, "value": 0.1, "error": 0.4, "unit": "%", "why": "few seeds"},
            {"claim": "they are one", "shown": None, "value": 0.1, "error": 0.4},
            {"claim": "it was run", "shown": None},
        ],
        "figures": [
            {"name": "figure2", "about": "curves", "result": "eval-curves.json", "picture": "eval-curves.png"},
            {"name": "figure3", "about": "more", "result": "eval-more.json", "picture": "eval-more.png"},
        ],
        "commands": [{"name": "run", "command": "launch/pretrain.py", "state": "failed", "seconds": None}],
    }  # fmt: skip
    (folder / "experiment.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """Runs of all kinds of names, two results, a paper; one run without an environment, one unfinished."""
    root = tmp_path_factory.mktemp("report")
    for number, name in enumerate(NAMES, 1):
        environment = {1: None, 2: ENVIRONMENT | {"done": None, "command": "launch/finetune.py"}}.get(
            number, ENVIRONMENT
        )
        make_run(root / "runs" / name, number, environment=environment)
    (root / "runs/two words/metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\nnonsense\n{"step": 20, "lo')
    wide = ["  ".join(f"column{i}" for i in range(30)), *(f"row {HOSTILE} {i}" for i in range(5))]
    make_result(root / "eval-curves.json", "curves", lines=wide)
    make_result(root / "runs/simclr_1/eval-knn.json", top1=0.4567, images=500)
    make_paper(root)
    return root


def page_of(*sources: Path) -> str:
    return html(
        collect([str(source) for source in sources]), "launch/report.py …", "2026-01-01T00:00:00+00:00"
    ).decode()


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


def test_a_given_file_that_is_neither_is_said(tmp_path):
    make_run(tmp_path / "run", 1)
    (tmp_path / "notes.json").write_text('{"a": 1}')
    assert "is no result" in collect([str(tmp_path / "run"), str(tmp_path / "notes.json")]).complaints[0]


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


def test_durations():
    assert [duration(s) for s in (3, 119, 600, 7260, 90_000)] == ["3 s", "119 s", "10 min", "2 h 01 min", "25 h 00 min"]


def test_thinning_keeps_every_extreme_and_the_ends():
    values = [math.sin(i) for i in range(10_000)]
    values[1234], values[7001], values[5000] = 50.0, -50.0, math.nan
    chosen = series.extremes(values, 300)
    assert len(chosen) <= 300 and {0, 1234, 5000, 7001, 9999} <= set(chosen)
    assert all(a < b for a, b in pairwise(chosen))
    assert series.extremes(values[:300], 300) == list(range(300))


def test_the_moving_mean_is_of_equally_many_before_and_after():
    assert series.moving_mean([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.0, 3.0, 11 / 3, 3.0])
    assert series.moving_mean([1.0, 2.0], 1) == [1.0, 2.0]
    assert [math.isnan(v) for v in series.moving_mean([1, math.nan, 1, 1, 1], 3)] == [False, True, True, False, False]


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
    assert ended.value.code == 0 and "7 runs, 2 results, 1 papers" in said and "2 of 3 lines" in said
    assert f"output={place}" in place.read_text()
    found = collect([str(everything)])
    monkeypatch.chdir(everything)
    assert report.place_of(found) == Path("report.html")
    with mock.patch.object(found, "base", Path("/")):
        assert report.place_of(found) == Path("report.html")


@pytest.fixture(scope="module")
def browser():
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium here (Debian's package is chromium)")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(everything))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_loads_without_an_error_or_a_request_and_fits(browser, page, width, scheme):
    browser.show(width, scheme)
    browser.open(page)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    assert browser.run("document.documentElement.lang") == "en"


def test_pictures_are_there_and_say_what_they_show(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    found = browser.run("[...document.images].map(one => [one.naturalWidth, one.alt])")
    assert len(found) == 2 + len(NAMES) and all(width == 300 and len(alt) > 10 for width, alt in found)
    assert any("nearest neighbours" in alt and "top1 45.67 %" in alt for _, alt in found)


def column(browser, label: str) -> list[str]:
    """The cells of a column of the runs, from above."""
    return browser.run(f"""(() => {{
        const table = document.getElementById('runs-table');
        const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === {json.dumps(label)});
        return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
    }})()""")


def header(label: str) -> str:
    return f"[...document.querySelectorAll('#runs-table button')].find(one => one.textContent === {json.dumps(label)})"


def test_a_click_sorts_and_a_key_too(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    browser.run(f"{header('kNN %')}.click()")
    upward = ["5.0", "10.0", "15.0", "25.0", "30.0", "35.0", "–"]  # 5 before 10: numbers; without one: last
    assert column(browser, "kNN %") == upward
    state = f"{header('kNN %')}.closest('th').getAttribute('aria-sort')"
    assert browser.run(state) == "ascending"
    browser.run(f"{header('kNN %')}.focus()")
    browser.press("Enter")
    assert column(browser, "kNN %") == [*upward[:-1][::-1], "–"] and browser.run(state) == "descending"
    browser.run(f"{header('run')}.click()")
    names = [name.removeprefix("runs/") for name in column(browser, "run")]
    assert names.index("simclr_2") < names.index("simclr_10") and browser.run(state) is None


def test_the_filter_keeps_rows_with_all_words(browser, page):
    browser.show(375, "light")
    browser.open(page)
    browser.run("filter.value = 'SIMCLR_1 done'; filter.dispatchEvent(new Event('input'))")
    shown = "[...document.querySelectorAll('#runs-table tbody tr')].filter(one => one.offsetHeight).length"
    assert browser.run(shown) == 1 and browser.run("document.getElementById('filtered').textContent") == "1 of 7"


def test_curves_are_drawn_and_follow_what_is_chosen(browser, page):
    browser.show(375, "dark")
    browser.open(page)
    strong = "[...document.querySelectorAll('#chart path.curve:not(.raw)')].map(one => one.getAttribute('d'))"
    losses = browser.run(strong)
    assert len(losses) == len(NAMES) and all(path.startswith("M") for path in losses)
    assert browser.run("document.querySelectorAll('#chart .raw').length") == len(NAMES)
    assert browser.run("document.querySelectorAll('#chart .lost').length") == len(NAMES) - 1  # a loss was not finite
    styles = browser.run(
        "[...document.querySelectorAll('#chart path.curve:not(.raw)')].map(one => "
        "getComputedStyle(one).stroke + one.getAttribute('stroke-dasharray'))"
    )
    assert len(set(styles)) == len(NAMES)
    browser.run("metric.value = 'lr'; metric.dispatchEvent(new Event('change'))")
    rates = browser.run(strong)
    assert rates != losses and len(rates) == len(NAMES) - 1  # one reports none
    label = browser.run("document.querySelector('#chart svg').getAttribute('aria-label')")
    assert label.startswith("learning rate against the step, of 6 runs") and "runs/simclr_2 0.1" in label
    browser.run("document.querySelector('#choices input').click()")
    assert len(browser.run(strong)) < len(rates) + 1
    browser.run("document.getElementById('no-runs').click()")
    assert browser.run(strong) == [] and browser.complaints() == []
    browser.run("document.getElementById('first-runs').click()")
    assert len(browser.run(strong)) == len(rates)


def test_values_at_a_step_are_read_by_a_slider(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    row = "[...document.querySelectorAll('#legend tbody tr')].find(one => one.textContent.includes('simclr_2')).cells"
    assert browser.run(f"{row}[1].textContent === {row}[2].textContent")
    browser.run("at.value = 0; at.dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('at-step').textContent") == "10"
    assert browser.run(f"{row}[1].textContent") == "11"


def test_many_settings_are_shown_by_a_click(browser, tmp_path):
    for number in range(2):
        run = make_run(tmp_path / f"run_{number}", number, reports=4)
        settings = {"model": {f"setting{i}": number + i for i in range(SETTINGS + 20)}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    path = tmp_path / "page.html"
    path.write_text(page_of(tmp_path))
    browser.show(375, "light")
    browser.open(path)
    shown = "[...document.querySelectorAll('#runs-table thead th')].filter(one => one.offsetWidth).length"
    before = browser.run(shown)
    browser.run("document.getElementById('all-settings').click()")
    assert browser.run(shown) == before + 20 and browser.run("document.scrollingElement.scrollWidth") <= 375


def test_a_command_can_be_copied(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("document.querySelector('header p.command button').click()")
    browser.run("new Promise(done => setTimeout(done, 200))")
    said = browser.run("document.querySelector('header p.command button').textContent")
    assert said in ("copied", "selected")


def test_two_hundred_runs_are_a_page_too(browser, tmp_path):
    for number in range(200):
        make_run(tmp_path / "runs" / f"run_{number}", number, reports=8)
    path = tmp_path / "page.html"
    path.write_text(page_of(tmp_path))
    browser.show(375, "dark")
    browser.open(path)
    assert browser.complaints() == [] and browser.run("document.scrollingElement.scrollWidth") <= 375
    assert browser.run("document.querySelectorAll('#runs-table tbody tr').length") == 200
    assert browser.run("document.querySelectorAll('#choices input:checked').length") == 8
