"""AutoAttack as an evaluation: settings, parts that are found again, ranks, a kill in the middle, and what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain import distributed
from fasttrain.accuracies import attack_text, interval_text
from fasttrain.attacks.autoattack import STANDARD, Budget
from fasttrain.config import load, resolve
from fasttrain.errors import UsageError
from fasttrain.evaluation import autoattack
from fasttrain.evaluation.robust import RobustConfig, RobustEvaluation
from fasttrain.export import export
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from tests.ranks import run_ranks
from tests.test_launch import script

ROOT = Path(__file__).parent.parent
SMALL = ["version=custom", "steps=4", "targets=2", "queries=6", "eps_255=6"]


class Network(NamedTuple):
    encoder: Path
    images: Path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four classes, each of a colour with noise of its strength."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 12)):
        for name in range(4):
            (root / split / f"c{name}").mkdir(parents=True)
            for number in range(count):
                colour = 100 + 30 * draw.standard_normal(3) + 60 * np.array([name & 1, name >> 1, name == 3])
                pixels = (colour + 20 * draw.standard_normal((8, 8, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"c{name}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory, images) -> Network:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    export(Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(layers=0))), folder)
    return Network(folder, images)


def arguments(network: Network, output: Path, *attack: str) -> list[str]:
    given = [
        "task=robust",
        f"source={network.encoder}",
        f"data.root={network.images}",
        f"output={output}",
        "device=cpu",
    ]
    given += ["augment.size=8", "augment.eval_crop=1", "loader.threads=1", "linear.l2=[1e-4]", "batch=16"]
    return [*given, "robust.attack.name=autoattack", *(f"robust.attack.{one}" for one in attack)]


def evaluated(network: Network, output: Path, *attack: str) -> dict:
    module = script("eval")
    module.evaluate(load(RobustEvaluation, arguments(network, output, *attack), module.of_run))
    return json.loads(output.read_text()) if distributed.rank() == 0 else {}


def kept(folder: Path) -> list[dict]:
    """The points of all that is kept, oldest first."""
    return [json.loads(line)["point"] for path in sorted(folder.glob("*.json")) for line in kept_of(path)]


def test_the_command_tells_attack_by_attack_with_counts_and_intervals(network, tmp_path, capsys):
    table = evaluated(network, tmp_path / "a.json", *SMALL)
    said = capsys.readouterr().out
    assert list(table["standing"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    shares = [table["clean_top1"], *table["standing"].values()]
    assert shares == sorted(shares, reverse=True) and table["robust_top1"] == shares[-1] < table["clean_top1"]
    low, high = table["robust_interval"]
    assert 0 <= low < table["robust_top1"] < high <= 1 and table["images"] == 48
    assert f"apgd-ce       {interval_text(shares[1], 48)}" in said and " of 48, 95 % interval " in said
    assert "AutoAttack, custom (all four; 4 steps, 2 targets, 6 queries), linf 6/255" in said
    assert "an upper bound of what the standard version leaves" in said
    found = kept(tmp_path)
    assert {(point["attack"], point["towards"]) for point in found if "towards" in point} >= {
        ("apgd-t", 1),
        ("fab-t", 0),
    }
    met = [index for point in found if point.get("attack") == "square" for index in point["images"]]
    assert len(met) == round(48 * table["standing"]["fab-t"])  # those that stood, in full batches


def test_the_claim_for_robustbench_lies_beside_the_result(network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(autoattack, "STANDARD", Budget(2, 1, 2))
    monkeypatch.setattr(autoattack.EvaluatedAttackConfig, "budget", Budget(2, 1, 2))
    output = tmp_path / "a.json"
    module, given = script("eval"), [*arguments(network, output, "eps_255=6"), "format=robustbench"]
    module.evaluate(load(RobustEvaluation, given, module.of_run))
    table, folder = json.loads(output.read_text()), output.with_suffix(".robustbench")
    claim = json.loads((folder / "claim.json").read_text())
    assert claim["autoattack_acc"] == f"{100 * table['robust_top1']:.2f}" and claim["eps"] == "6/255"
    assert {path.name for path in folder.iterdir()} == {"claim.json", "model.py", "model.pt"}
    assert f"written to {folder / 'model.py'}" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"claims what the standard AutoAttack leaves.* set robust.attack.name"):
        module.evaluate(load(RobustEvaluation, [*given, "robust.attack.version=first_two"], module.of_run))


def test_what_versions_have_alike_is_done_once_and_nothing_twice(network, tmp_path, monkeypatch):
    first = evaluated(network, tmp_path / "a.json", *SMALL, "attacks=[apgd-ce]")
    before = len(kept(tmp_path))
    both = evaluated(network, tmp_path / "a.json", *SMALL, "attacks=[apgd-ce,square]")
    fresh = kept(tmp_path)[before:]
    assert {point["attack"] for point in fresh} == {"square"}
    assert both["standing"]["apgd-ce"] == first["robust_top1"]
    monkeypatch.setattr(autoattack.Targets, "victim", lambda *_: pytest.fail("done again"))
    assert evaluated(network, tmp_path / "a.json", *SMALL, "attacks=[apgd-ce,square]")["standing"] == both["standing"]


def test_the_first_attack_goes_by_bf16_where_there_is_it_and_all_are_judged_in_full(network, tmp_path, monkeypatch):
    full = evaluated(network, tmp_path / "a.json", *SMALL, "attacks=[apgd-ce,apgd-t]")
    module = script("eval")
    monkeypatch.setattr(module, "decide", lambda *_: "bf16")
    monkeypatch.setitem(globals(), "script", lambda _: module)
    half = evaluated(network, tmp_path / "b.json", *SMALL, "attacks=[apgd-ce,apgd-t]")
    points = [json.loads(line)["point"] for line in kept_of(tmp_path / "b.json")]
    searches = {point["attack"]: point.get("search") for point in points if "towards" in point}
    assert searches == {"apgd-ce": "bfloat16", "apgd-t": None}
    assert {point["precision"] for point in points if "attack" in point} == {"float32"}
    assert abs(half["robust_top1"] - full["robust_top1"]) < 0.1


def _on_rank(network: Network, output: Path) -> int:
    evaluated(network, output, *SMALL)
    return 0


def test_one_rank_and_two_find_the_same(network, tmp_path):
    places = [tmp_path / str(ranks) / "x.json" for ranks in (1, 2)]
    _on_rank(network, places[0])
    run_ranks(2, _on_rank, network, places[1])
    one, two = (json.loads(place.read_text()) for place in places)
    changing = ("seconds", "date", "ranks", "settings", "machine")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert {k: v for k, v in one.items() if k not in changing} == {k: v for k, v in two.items() if k not in changing}
    points = [sorted(map(json.dumps, kept(place.parent))) for place in places]
    assert points[0] == points[1]


def test_kill_9_in_the_middle_loses_the_batches_under_way_alone(network, tmp_path):
    whole = evaluated(network, tmp_path / "whole.json", *SMALL)
    output = tmp_path / "killed.json"
    command = [sys.executable, "launch/eval.py", *arguments(network, output, *SMALL)]
    begun = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(kept_of(output)) < 5 and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    done = kept_of(output)
    assert len(done) >= 5 and not output.exists()
    table = evaluated(network, output, *SMALL)
    assert table["standing"] == whole["standing"]
    after = kept_of(output)
    assert after[: len(done)] == done and len(after) == len(kept_of(tmp_path / "whole.json"))


def kept_of(output: Path) -> list[str]:
    """Whole lines of what is kept, oldest first."""
    files = sorted(output.with_suffix(".parts").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [line for path in files for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"steps": 0}, "robust.attack.steps=0: should be greater than or equal to 1"),
        ({"queries": 0}, "robust.attack.queries=0: should be greater than or equal to 1"),
        ({"version": "custom", "attacks": []}, r"attacks=\[\]: give some of apgd-ce, apgd-t, fab-t, square"),
        ({"version": "custom", "attacks": ["cw"]}, "should be 'apgd-ce', "),
        ({"version": "custom", "attacks": ["square", "square"]}, "give each once"),
        ({"steps": 50}, "steps=50 is not AutoAttack's standard version: set version=custom"),
        ({"version": "first_two", "targets": 4}, "targets=4 is not AutoAttack's first_two version: set version=custom"),
        ({"attacks": ["square"]}, "is not AutoAttack's standard version: set version=custom"),
        ({"restarts": 2}, "restarts=2: autoattack does not use it"),
        ({"batchnorm": "train"}, "batchnorm=train attacks another network than is evaluated: set batchnorm=eval"),
        ({"name": "apgd", "queries": 7}, "queries=7: apgd does not use it; leave it out or set name=autoattack"),
        ({"name": "pgd", "version": "first_two"}, "version=first_two: pgd does not use it"),
        ({"name": "auto"}, "'fgsm', 'pgd', 'apgd' or 'autoattack'"),
    ],
)
def test_a_mistake_is_a_line(attack, said):
    values = {"task": "robust", "source": "x", "robust": {"attack": {"name": "autoattack"} | attack}}
    with pytest.raises(UsageError, match=said) as caught:
        resolve(RobustEvaluation, values)
    assert "\n" not in str(caught.value)


def test_steps_follow_the_attack_where_none_are_given():
    def attack(**given):
        return resolve(RobustEvaluation, {"task": "robust", "source": "x", "robust": {"attack": given}}).robust.attack

    assert attack(name="autoattack").budget == STANDARD and attack(name="autoattack").settled.steps == 100
    assert attack().settled.steps == 10 and attack(name="pgd", steps=7).settled.steps == 7
    assert attack(name="autoattack", version="custom", steps=5).budget.steps == 5


def test_when_all_have_fallen_there_is_nothing_left_to_do(network, tmp_path):
    table = evaluated(network, tmp_path / "a.json", *SMALL[:-1], "eps_255=200")
    assert table["standing"]["square"] == table["robust_top1"] == 0 < table["clean_top1"]
    assert "square" not in {point.get("attack") for point in kept(tmp_path)}


def test_few_classes_are_a_line(network, tmp_path, monkeypatch):
    planned = autoattack.EvaluatedAttackConfig.planned
    monkeypatch.setattr(autoattack.EvaluatedAttackConfig, "planned", lambda self, classes: planned(self, 3))
    with pytest.raises(UsageError, match="apgd-t needs 4 classes and there are 3: run apgd-ce, fab-t, square alone"):
        evaluated(network, tmp_path / "a.json")


def test_a_figure_of_one_attack_says_that_it_is_an_upper_bound(network, tmp_path, capsys):
    evaluated(network, tmp_path / "a.json", *SMALL, "attacks=[apgd-ce]")
    capsys.readouterr()
    module = script("eval")
    given = [one for one in arguments(network, tmp_path / "b.json") if "autoattack" not in one]
    module.evaluate(load(RobustEvaluation, [*given, "robust.attack.steps=2"], module.of_run))
    said = capsys.readouterr().out
    assert "attack          apgd on cross-entropy, linf 8/255, 2 steps" in said
    assert "an upper bound: robust.attack.name=autoattack gives the figure that tables report" in said


def test_attacks_in_words():
    attack = RobustConfig().attack.model_dump()
    assert attack_text(attack) == "apgd on cross-entropy, linf 8/255, 10 steps"
    assert attack_text(attack | {"name": "fgsm", "eps_255": 0.5}) == "fgsm on cross-entropy, linf 0.5/255"
    pgd = attack | {"name": "pgd", "restarts": 3, "random_start": False, "step_255": 2.0}
    assert attack_text(pgd).endswith("10 steps, steps of 2/255, 3 restarts, from the image itself")
    standard = autoattack.EvaluatedAttackConfig(name="autoattack", norm="l2", eps_255=127.5).settled.model_dump()
    assert attack_text(standard) == "AutoAttack, standard, l2 127.5/255"
    assert interval_text(0.625, 8) == "62.5 % (5 of 8, 95 % interval 30.6 to 86.3)"
