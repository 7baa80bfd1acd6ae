"""The benchmark of AutoAttack: its victim is worth attacking, its judgement is strict, and what it counts is so."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from fasttrain.attacks import Linf
from fasttrain.attacks.autoattack import Budget, autoattack
from fasttrain.benchmarks import autoattack as bench
from fasttrain.benchmarks.autoattack import AttacksBenchConfig, SearchBenchConfig, compare_searches, no_more
from fasttrain.benchmarks.victim import attacked_classifier
from fasttrain.config import load
from fasttrain.models import ModelConfig
from tests.test_launch import script

SMALL = SearchBenchConfig(
    model=ModelConfig(arch="resnet18", stem="cifar", width=0.0625),
    size=16,
    images=16,
    iterations=4,
    targets=2,
    queries=4,
)


@pytest.fixture(scope="module")
def place():
    return attacked_classifier(SMALL.model, SMALL.size, SMALL.images, "fp32")


def test_the_victim_is_right_and_loses_some_of_its_images(place):
    with torch.no_grad():
        clean, fast = place.plain(place.images), place.fast(place.images)
    assert torch.allclose(clean, fast, atol=1e-3)
    right = clean.argmax(1) == place.labels
    assert right.float().mean() >= 0.75 and 0 < place.threat.eps < 8 / 255
    found = autoattack(place.plain, place.images, place.labels, place.threat, ["apgd-ce"], Budget(10))
    assert 0.2 <= found.standing["apgd-ce"].float().mean() <= 0.8
    again = attacked_classifier(SMALL.model, SMALL.size, SMALL.images, "fp32")
    assert again.threat == place.threat and torch.equal(again.images, place.images)


def test_only_mistakes_within_the_ball_count(place):
    wrong = place._replace(labels=(place.labels + 1) % 10)
    assert wrong.fell(wrong.images).any()
    assert not wrong.fell(wrong.images + 1.1 * place.threat.eps).any()
    out = place._replace(threat=Linf(1.0), labels=wrong.labels)
    assert not out.fell(out.images - 1).any()  # of negative values


def test_an_image_that_fell_costs_nothing(place):
    rows = []

    def counted(x):
        rows.append(len(x))
        return place.plain(x)

    steps, images = 10, place.images
    found = autoattack(counted, images, place.labels, place.threat, ["apgd-ce"], Budget(steps))
    beside = 6 * len(images)  # clean scores, and five passes that tell a random network
    stood = int(found.standing["apgd-ce"].sum())
    assert 0 < stood < len(images)
    assert (steps + 1) * stood <= sum(rows) - beside < (steps + 1) * int(found.standing["clean"].sum())
    twice = autoattack(counted, images, place.labels, Linf(1.0), ["apgd-ce", "apgd-t"], Budget(steps, 9))
    assert not twice.standing["apgd-t"].any() and sum(rows) < 3 * (steps + 1) * len(images)


def test_a_hasty_network_leads_the_first_attack_and_judges_nothing(place):
    def blind(x):
        seen.append(len(x))
        return torch.nn.functional.one_hot((one[1] + 1) % 10, 10).float().expand(len(x), 10) + 0 * x.sum()

    first = int((~place.fell(place.images)).nonzero()[0])
    one = place.images[first : first + 1], place.labels[first : first + 1]
    for attacks, asked in ((["apgd-ce", "apgd-t"], True), (["apgd-ce"], False), (["apgd-t"], False)):
        seen: list[int] = []
        found = autoattack(place.plain, *one, Linf(1e-9), attacks, Budget(3, 1), faster=blind)
        assert bool(seen) == asked and all(stands.all() for stands in found.standing.values())


def test_fewer_fallen_images_are_told_from_chance():
    def compared(alone: int, fewer: int, rounds: int = 1):
        mine, theirs = torch.zeros(2, rounds, 64, dtype=torch.bool)
        mine.view(-1)[:alone] = True
        theirs.view(-1)[alone : alone + fewer] = True
        return no_more("a", "b", {"a": mine, "b": theirs})

    assert compared(0, 0).agrees and compared(0, 9).agrees and compared(1, 0).agrees
    assert not compared(2, 0).agrees and not compared(4, 0).agrees
    assert compared(6, 3).agrees and not compared(8, 2).agrees
    assert compared(3, 0, rounds=3).agrees and not compared(4, 0, rounds=3).agrees
    assert compared(6, 3).evidence == (
        "robust accuracy 9.4% against 4.7%: 6 of 64 stand after ours alone, 3 after theirs alone; 3 more count as equal"
    )


def test_every_attack_has_a_row_with_its_robust_accuracy(tmp_path, capsys):
    module = script("bench")
    given = ["attack", "quick=true", "tables=[autoattack]", f"output={tmp_path / 'b.json'}"]
    assert module.bench(load(module.AttackBench, given, module.base, ("task",))) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {"APGD-CE, ours", "APGD-T, ours", "AutoAttack, ours"} <= rows.keys()
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["images_per_second"] > 0 and 0 <= row["robust_accuracy"] <= 1
        assert f"| {name} |" in printed and f"| {row['robust_accuracy']:.1%} |" in printed
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert "no network's robustness" in printed


def test_a_table_below_the_other(monkeypatch):
    def report(name: str, passed: bool):
        return bench.Report(name, [{"name": name}], {name: 1.0}, f"unit of {name}", passed)

    monkeypatch.setattr(bench, "compare_attacks", lambda *_: iter([report("a", True), report("b", True)]))
    monkeypatch.setattr(bench, "compare_searches", lambda *_: iter([report("c", False)]))
    found = list(bench.compare_all(AttacksBenchConfig(), 1))
    assert [x.text for x in found] == ["a", "b", "b\n\nc"] and found[-1].rows == [{"name": "b"}, {"name": "c"}]
    assert found[-1].bars == {"b": 1.0} and not found[-1].passed
    assert [x.text for x in bench.compare_all(AttacksBenchConfig(tables=("autoattack",)), 1)] == ["c"]
    assert [x.text for x in bench.compare_all(AttacksBenchConfig(tables=("distance",)), 1)] == ["a", "b"]


def test_an_attack_that_leaves_more_gets_no_speed_up(monkeypatch):
    def idle(place, attacks, budget):
        return lambda number: place.images

    def breaks(place, attacks, budget):
        return lambda number: [][number]

    monkeypatch.setattr(bench, "_published", bench._ours)
    monkeypatch.setattr(bench, "_ours", idle)
    monkeypatch.setattr(bench, "_torchattacks", breaks)
    monkeypatch.setattr(bench, "ATTACKS", {"APGD-CE": ("apgd-ce",)})
    *_, report = compare_searches(SMALL, "fp32", 1)
    assert "APGD-CE, ours DOES NOT MATCH APGD-CE, published code" in report.text and "times as fast" not in report.text
    assert "- APGD-CE, torchattacks does not run: IndexError: list index out of range" in report.text


def test_rivals_that_are_not_installed_are_named(monkeypatch):
    real = builtins.__import__

    def bare(name, *arguments, **keywords):
        if name.partition(".")[0] in ("autoattack", "torchattacks"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", bare)
    monkeypatch.setattr(bench, "ATTACKS", {"APGD-CE": ("apgd-ce",)})
    *_, report = compare_searches(SMALL, "fp32", 1)
    assert [row["name"] for row in report.rows] == ["APGD-CE, ours"]
    assert "- torchattacks is not installed" in report.text
    assert "- the published code (pip install git+https://github.com/fra31/auto-attack) is not installed" in report.text


@pytest.mark.parametrize("rival", ["_published", "_torchattacks"])
@pytest.mark.parametrize("attack", ["APGD-CE", "APGD-T"])
def test_rivals_run_the_same_attack(rival, attack, place):
    pytest.importorskip({"_published": "autoattack"}.get(rival, rival[1:]), reason="the peer is not installed")
    attacks, budget = bench.ATTACKS[attack], Budget(10, 2, 4)
    theirs = getattr(bench, rival)(place, attacks, budget)(0)
    ours = bench._ours(place, attacks, budget)(0)
    assert abs(int(place.fell(theirs).sum()) - int(place.fell(ours).sum())) <= 2
    assert (ours - place.images).abs().max() <= place.threat.eps + 1e-6


def test_a_key_of_a_table_that_is_left_out_is_said():
    from fasttrain.config import unread

    for given, name in (
        ({"tables": ["autoattack"], "iterations": 3}, "iterations"),
        ({"tables": ["distance"], "autoattack": {"images": 8}}, "images"),
    ):
        (line,) = unread(AttacksBenchConfig(**given), given)
        assert name in line and "is given and not used" in line
