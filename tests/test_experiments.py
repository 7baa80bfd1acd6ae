"""Recipes become commands, commands are run once, and tables read what they left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fasttrain.config import load
from fasttrain.errors import UsageError
from fasttrain.experiments import commands, queue, results, tables
from fasttrain.experiments.commands import Plan
from fasttrain.experiments.recipe import Recipe
from tests.test_launch import environment, script

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs/experiments").glob("*.yaml"))

RECIPE = """
name: toy
title: A toy
data: {root: null, other: null}
constants: {lr: 1e-3}
runs:
  plain-{λ}:
    label: plain, λ = {λ}
    each: {λ: [0, 1]}
    set: {terms: {a: {penalty: {weight: "{λ}"}}}, optimizer: {lr: "{lr}"}}
  tuned: {script: finetune, source: plain-0, set: {fare: {alpha: 0.1}}}
  elsewhere: {needs: [other], set: {data: {root: "{other}"}}}
evaluations:
  labels: {task: labels, of: ["plain-*"], set: {shares: [1, 0.1], data: {root: "{other}"}}}
  course: {task: trajectory, of: [plain-0], needs: [labels], source: "{folder}/{run}"}
  knn: {task: knn, of: [tuned], apart: true}
  there: {task: views, of: [elsewhere]}
tables:
  table1:
    title: "Table 1: a table"
    rows: {zero: {λ: 0}, one: {λ: 1}}
    columns:
      accuracy: {result: labels, value: "accuracy/plain, λ = {λ}"}
      kNN: {result: knn-tuned, value: top1}
    paper: {zero: [50, null]}
findings:
  - {claim: zero is better, contrast: {table1/zero/accuracy: 1, table1/one/accuracy: -1}}
scales:
  paper: {needs: [root], seeds: [0, 1]}
  tiny:
    seeds: [3, 4]
    constants: {lr: 1e-2}
    launch: {eval: torchrun --nproc-per-node 2}
    set: {pretrain: {train: {steps: 2}}, plain-1: {train: {steps: 1}}, labels: {shares: [1]}}
"""
FAKE = """
import json, os, sys, time
from pathlib import Path
arguments = sys.argv[1:]
given = dict(a.split("=", 1) for a in arguments if "=" in a)
with open(os.environ["RAN"], "a") as ran:
    ran.write(" ".join(arguments) + "\\n")
fails = os.environ.get("FAILS", "nothing")
if fails in " ".join(arguments):
    sys.exit("error: it failed")
if os.environ.get("SLOW", "nothing") in " ".join(arguments):
    print("slow", flush=True)
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
if "run.dir" in given:
    folder = Path(given["run.dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.safetensors").touch()
    (folder / "environment.json").write_text(json.dumps({"arguments": arguments, "done": now}))
else:
    import shlex
    zero, one = {"mean": 60.0, "sd": 1.0, "n": 2}, {"mean": 42.0, "sd": 8**0.5, "n": 2}
    found = {"accuracy": {"plain, λ = 0": zero, "plain, λ = 1": one}, "top1": 0.5}
    found |= {"command": shlex.join(["eval.py", *arguments]), "date": now, "about": "a toy"}
    Path(given["output"]).write_text(json.dumps(found))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The recipe, where the scripts that it runs are stand-ins."""
    (tmp_path / "launch").mkdir()
    for name in ("pretrain", "finetune", "eval"):
        (tmp_path / "launch" / f"{name}.py").write_text(FAKE)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    monkeypatch.setattr(commands, "LAUNCH", tmp_path / "launch")
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.yaml"


def planned(recipe: Path, *arguments: str) -> Plan:
    return Plan(load(Recipe, [str(recipe), *arguments]))


def run(recipe: Path, *arguments: str) -> tuple[dict[str, str], list[str]]:
    said: list[str] = []
    found = queue.Queue(planned(recipe, "scale=tiny", "launch.eval=python", *arguments), said.append).run()
    return {name: outcome.state for name, outcome in found.items()}, said


def ran() -> list[str]:
    path = Path(os.environ["RAN"])
    return path.read_text().splitlines() if path.exists() else []


def test_a_recipe_is_the_commands_that_a_person_would_type(toy):
    plan = planned(toy, "scale=tiny", "data.root=/data/set")
    assert list(plan.jobs) == [
        *("plain-0_3", "plain-0_4", "plain-1_3", "plain-1_4", "tuned_3", "tuned_4"),
        *("labels", "course", "knn-tuned_3", "knn-tuned_4"),
    ]
    assert plan.jobs["plain-1_4"].line == (
        "python launch/pretrain.py data.root=/data/set terms.a.penalty.weight=1 optimizer.lr=1e-2 train.steps=1 "
        "run.seed=4 run.dir=runs/toy-tiny/plain-1_4"
    )
    tuned = plan.jobs["tuned_4"]
    assert tuned.arguments[:2] == ["source=runs/toy-tiny/plain-0_4", "data.root=/data/set"]
    assert tuned.needs == ("plain-0_4",)
    labels = plan.jobs["labels"]
    assert labels.line.startswith("torchrun --nproc-per-node 2 launch/eval.py labels runs/toy-tiny/plain-0_3 ")
    assert shlex.split(labels.line)[9:] == [  # a place that is not given leaves its setting out
        "shares=[1]",
        'names=["plain, λ = 0","plain, λ = 0","plain, λ = 1","plain, λ = 1"]',
        "output=runs/toy-tiny/eval-labels.json",
    ]
    course = plan.jobs["course"]
    assert course.arguments[1:3] == ["runs/toy-tiny/plain-0_3", "runs/toy-tiny/plain-0_4"] and "labels" in course.needs
    assert plan.jobs["knn-tuned_3"].arguments == [
        "knn",
        "runs/toy-tiny/tuned_3",
        "output=runs/toy-tiny/eval-knn-tuned_3.json",
    ]
    assert plan.results["knn-tuned"] == [plan.jobs["knn-tuned_3"], plan.jobs["knn-tuned_4"]]
    assert plan.absent == {"elsewhere": "data.other is not given"}


def test_what_a_person_gives_is_over_the_scale(toy):
    plan = planned(
        toy, "scale=tiny", "seeds=[7]", "launch.pretrain=torchrun --nproc-per-node 8", "only=[tuned]", "folder=x"
    )
    assert list(plan.jobs) == ["plain-0_7", "tuned_7"]  # and what it needs
    assert plan.jobs["plain-0_7"].line.startswith("torchrun --nproc-per-node 8 launch/pretrain.py")
    assert plan.jobs["tuned_7"].result == Path("x/tuned_7")
    toy.write_text(RECIPE.replace("tuned: {script: finetune, ", "tuned: {"))
    assert planned(toy, "scale=tiny").jobs["tuned_3"].arguments[0] == "model.weights=runs/toy-tiny/plain-0_3"
    plan = planned(toy, "scale=tiny", "data.other=/data/other")
    assert "data.root=/data/other" in plan.jobs["labels"].arguments
    assert [a for a in plan.jobs["elsewhere_3"].arguments if a.startswith("data.root")] == ["data.root=/data/other"]


@pytest.mark.parametrize(
    ("change", "arguments", "complaint"),
    [
        ({}, ["scale=huge"], "scale=huge: there is none of that name, give paper, tiny"),
        ({}, [], "scale=paper needs data.root: give data.root=/…"),
        ({}, ["scale=tiny", "only=[nobody]"], "only=[nobody]: nothing is called so; there are plain-0_3"),
        ({"plain-*": "plein-*"}, ["scale=tiny"], "evaluations.labels: no run is called 'plein-*'; they are plain-0"),
        ({"needs: [labels]": "needs: [lables]"}, ["scale=tiny"], "evaluations.course needs 'lables', and none before"),
        ({'"{λ}"}}}': '"{μ}"}}}'}, ["scale=tiny"], "'{μ}': {μ} stands for nothing here ({folder}"),
        ({"plain-1: {train": "plein-1: {train"}, ["scale=tiny"], "scales.tiny.set: nothing is called 'plein-1'"),
        ({}, ["scale=tiny", "data.others=x"], "data.others is given, and nothing reads it"),
        ({}, ["scale=tiny", "launch.train=x"], "launch.train is given, and nothing reads it"),
        ({"constants: {lr: 1e-2}": "constants: {rl: 1}"}, ["scale=tiny"], "scales.tiny.constants.rl is given"),
        ({"tuned: {": "'a/b': {"}, ["scale=tiny"], "runs: 'a/b' names a folder: give a name without /"),
        ({"of: [tuned]": "of: [tuned], each: {n: [1, 2]}"}, ["scale=tiny"], "two jobs are called 'knn-tuned_3'"),
        ({"elsewhere: {": "elsewhere: {config: no.yaml, "}, ["scale=tiny", "data.other=x"], "config: no.yaml: there"),
        ({"result: labels": "result: lebals"}, ["scale=tiny"], "tables.table1: 'lebals' is no evaluation; they are "),
        ({"[50, null]": "[50]"}, ["scale=tiny"], "tables.table1.paper: 'zero' has 1 values for 2 columns"),
        ({"paper: {zero": "paper: {two"}, ["scale=tiny"], "tables.table1.paper: there is no row 'two'; they are"),
        ({"table1/one/acc": "table1/1/acc"}, ["scale=tiny"], "findings: 'table1/1/accuracy' is no table/row/column"),
    ],
)  # fmt: skip
def test_mistakes_of_a_recipe_are_lines(toy, change, arguments, complaint):
    text = RECIPE
    for before, after in change.items():
        assert before in text
        text = text.replace(before, after, 1)
    toy.write_text(text)
    with pytest.raises(UsageError) as raised:
        plan = planned(toy, *arguments)
        tables.verdicts_of(plan, tables.tables_of(plan))
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_a_mistake_in_a_setting_is_found_before_anything_runs(toy, tmp_path):
    toy.write_text(RECIPE.replace("train: {steps: 2}", "train: {stepz: 2}"))
    words = [sys.executable, str(ROOT / "launch/experiment.py"), str(toy), "scale=tiny"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment() | {"PYTHONPATH": python_path()})
    assert done.returncode == 2
    assert "error: plain-0_3: unknown key 'train.stepz'" in done.stderr and not (tmp_path / "runs").exists()


def python_path() -> str:
    return f"{ROOT}:{ROOT / 'kernels'}"


def test_everything_is_run_once(toy):
    states, said = run(toy)
    assert set(states.values()) == {"done"} and len(ran()) == 10
    assert said[0] == "[1/10] plain-0_3"
    log = (toy.parent / "runs/toy-tiny/logs/plain-0_3.log").read_text()
    assert log.startswith("$ python launch/pretrain.py terms.a.penalty.weight=0 ")
    states, said = run(toy)
    assert set(states.values()) == {"done"} and len(ran()) == 10 and said == ["10 of 10 are done"]


def test_what_changed_is_run_again_with_what_follows_from_it(toy, monkeypatch):
    run(toy)
    toy.write_text(RECIPE.replace("plain-1: {train: {steps: 1}}", "plain-1: {train: {steps: 3}}"))
    time.sleep(1.1)  # dates are to the second
    run(toy)
    assert [line.split()[0] for line in ran()[10:]] == ["terms.a.penalty.weight=1"] * 2 + ["labels", "trajectory"]
    Path("runs/toy-tiny/eval-labels.json").write_text("{")  # half written by something else
    assert run(toy)[0]["labels"] == "done" and ran()[14].startswith("labels")


def test_one_that_fails_does_not_stop_the_others(toy, monkeypatch):
    monkeypatch.setenv("FAILS", "run.dir=runs/toy-tiny/plain-0_4")
    states, said = run(toy)
    assert [name for name, state in states.items() if state == "failed"] == ["plain-0_4"]
    assert [n for n, s in states.items() if s == "missing"] == ["tuned_4", "labels", "course", "knn-tuned_4"]
    assert any("failed: code 1, error: it failed; its log: runs/toy-tiny/logs/plain-0_4.log" in line for line in said)
    monkeypatch.delenv("FAILS")
    assert set(run(toy)[0].values()) == {"done"} and len(ran()) == 11


def test_what_a_queue_is_given_can_run_now(toy):
    plan = planned(toy, "scale=tiny")
    assert [job.name for job in queue.ready(plan)] == ["plain-0_3", "plain-0_4", "plain-1_3", "plain-1_4"]
    run(toy, "only=[plain-*]")
    assert [job.name for job in queue.ready(planned(toy, "scale=tiny"))] == ["tuned_3", "tuned_4", "labels"]


def test_tables_stand_beside_the_papers_and_claims_are_judged(toy):
    run(toy)
    plan = planned(toy, "scale=tiny", "launch.eval=python")
    (table,) = tables.tables_of(plan)
    zero, one = table.rows["zero"], table.rows["one"]
    assert zero[0].ours == results.Value(60.0, 1.0, 2) and zero[0].paper == 50
    assert one[0].ours.mean == 42 and one[0].ours.sd == pytest.approx(8**0.5) and one[0].ours.n == 2
    assert zero[1].ours == results.Value(0.5, 0.0, 2)  # of two files
    (verdict,) = tables.verdicts_of(plan, [table])
    assert verdict.shown is True and verdict.value == 18
    assert verdict.error == pytest.approx((1 / 2 + 8 / 2) ** 0.5)  # √(1²/2 + √8²/2)
    text = tables.markdown(plan, [table], [verdict])
    assert "| zero | 60.00 ± 1.00 (n = 2), paper 50 | 0.50 ± 0.00 (n = 2) |" in text
    assert "- shown: zero is better (+18.00 ± 2.12 %)" in text
    json.dumps(tables.summary(plan, [table], [verdict]), allow_nan=False)


@pytest.mark.parametrize(
    ("one", "other", "within", "shown"),
    [
        ((5, 1, 2), (3, 1, 2), None, None),  # 2 ± 1
        ((5, 0.1, 2), (3, 0.1, 2), None, True),
        ((3, 0.1, 2), (5, 0.1, 2), None, False),
        ((5, None, 1), (3, 0.1, 2), None, True),  # of one seed, by its sign
        ((5, 0.1, 2), (3, 0.1, 2), 3, True),
        ((5, 0.1, 2), (3, 0.1, 2), 1, False),
        ((5, 1, 2), (3, 1, 2), 3, None),
    ],
)
def test_a_claim_needs_two_standard_errors(toy, one, other, within, shown):
    run(toy)
    plan = planned(toy, "scale=tiny", "launch.eval=python")
    finding = plan.recipe.findings[0].model_copy(update={"within": within})
    (table,) = tables.tables_of(plan)
    rows = {"zero": results.Value(*one), "one": results.Value(*other)}
    table = table._replace(rows={name: [tables.Cell(value, None)] * 2 for name, value in rows.items()})
    assert tables.verdict(finding, plan, [table]).shown is shown


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("a/b", [1]),
        ("a/c/d", [2]),  # a key with a / in it
        ("a/#0", [1]),
        ("list/0/x", [3]),
        ("list/-1/x", [4]),
        ("list/*/x", [3, 4]),
        ("list/n=2/x", [4]),
        ("list/n=two/x", []),
        ("y@size=0.50", [20]),
        ("nowhere", []),
        ("list/7", []),
    ],
)
def test_the_way_to_a_value(way, found):
    value = {
        "a": {"b": 1, "c/d": 2},
        "list": [{"n": 1, "x": 3}, {"n": 2.0, "x": 4}],
        "size": [0.25, 0.5],
        "y": [10, 20],
    }
    assert list(results.at(value, way.split("/"))) == found


def test_values_that_are_none():
    assert results.value_of([{"x": None}], "x") is None
    assert results.value_of([{"x": float("inf")}], "x") is None
    assert results.value_of([{"x": 1}, {}], "x", 100) == results.Value(100, None, 1)
    with pytest.raises(UsageError, match="'x' leads to 'text', which is no number"):
        results.value_of([{"x": "text"}], "x")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_reaches_what_is_under_way(toy, kind):
    """Killed outright too: the kernel tells what was under way."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fasttrain.experiments import commands, queue\n"
        "from tests.test_experiments import planned\n"
        "commands.LAUNCH = Path('launch')\n"
        "jobs = queue.Queue(planned(Path('toy.yaml'), 'scale=tiny', 'launch.eval=python'), print)\n"
        "found = jobs.run()\n"
        "sys.exit(75 if jobs.stopped and found['plain-1_3'].state == 'missing' else 1)\n"
    )
    env = environment() | {"SLOW": "plain-1_3", "PYTHONPATH": python_path(), "RAN": os.environ["RAN"]}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.DEVNULL)
    log = toy.parent / "runs/toy-tiny/logs/plain-1_3.log"
    waited(lambda: log.exists() and "slow" in log.read_text())
    process.send_signal(kind)
    assert process.wait(30) == (75 if kind != signal.SIGKILL else -signal.SIGKILL)
    waited(lambda: not living(str(toy.parent)))
    assert len(ran()) == 3
    states, _ = run(toy)
    assert set(states.values()) == {"done"} and len(ran()) == 11


def waited(for_what) -> None:
    end = time.monotonic() + 30
    while not for_what():
        assert time.monotonic() < end
        time.sleep(0.05)


def living(folder: str) -> list[str]:
    """Processes that work in ``folder``, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.name != str(os.getpid()) and os.readlink(path / "cwd") == folder:
                found.append(path.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_papers_commands_can_be_meant(recipe, tmp_path):
    """At every scale each setting is one of its script's, each cell's way is filled, each claim is of cells."""
    module = script("experiment")
    given = yaml.safe_load(recipe.read_text())
    assert {"smoke", "small", "paper"} <= given["scales"].keys()
    for scale in given["scales"]:
        places = [f"data.{name}={tmp_path}" for name in given.get("data", {"root": None})]
        plan = planned(recipe, f"scale={scale}", f"folder={tmp_path}", *(places if scale != "smoke" else []))
        for job in plan.jobs.values():
            module.check(job)
        tables.verdicts_of(plan, tables.tables_of(plan))
        assert set(given["figures"].values()) <= set(plan.results) or scale == "smoke"
