"""The picture of a run shows what was reported, over what there was before, and hides nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from matplotlib.axes import Axes

from fasttrain import plots
from fasttrain.errors import UsageError
from fasttrain.evaluation.logged import smoothed
from fasttrain.figures import png
from tests.test_launch import metrics, pretrain_here

TERMS = {"terms": {"simclr": {"objective": "nt_xent", "weight": 1.0}, "sup": {"objective": "sup_con", "weight": 0.5}}}
ONE = {"terms": {"simclr": {"objective": "nt_xent", "weight": 1.0}}, "model": {"weights": None}}
FARE = {"fare": {"alpha": 0.1}}


def report(step: int, loss: float | None = 1.0, **more: float) -> dict:
    """Of training, of an epoch of 10 steps; a loss of None: the step was rejected."""
    losses = {} if loss is None else {"loss": loss} | more
    return {"step": step, "epoch": step / 10} | losses | {"lr": 0.1}


def axes(lines: list[dict], settings: dict | None = None, classes: int | None = None) -> dict[str, Axes]:
    """The panels by what their y axis is; those of losses by the first line of their title too."""
    picture = plots.figure(lines, settings or {}, classes)
    assert png(picture).startswith(b"\x89PNG")
    found = {}
    for axis in picture.axes:
        if axis.axison:
            assert axis.get_ylabel() and axis.get_xlabel().startswith("step"), "an axis without a label"
            title = axis.get_title().split("\n")[0]
            found[f"{title}: {axis.get_ylabel()}" if title else axis.get_ylabel()] = axis
    return found


def drawn(axis: Axes, number: int = 0) -> list[tuple[float, float]]:
    line = axis.lines[number]
    return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))


def legend(axis: Axes) -> list[str]:
    return [] if axis.get_legend() is None else [text.get_text() for text in axis.get_legend().get_texts()]


def test_accuracies_are_in_percent_from_0_over_the_untrained_encoder_and_a_guess():
    lines = [{"step": 0, "knn_top1": 0.25}, report(5), report(20), {"step": 20, "knn_top1": 0.5, "knn_neighbours": 7}]
    axis = axes(lines, ONE, classes=8)["kNN accuracy (%)"]
    assert drawn(axis) == [(0, 25), (20, 50)] and axis.lines[0].get_marker() == "o"
    assert legend(axis) == ["kNN", "kNN, untrained: 25.0 %", "a guess among 8 classes: 12.5 %"]
    assert list(axis.lines[1].get_ydata()) == [25, 25] and list(axis.lines[2].get_ydata()) == [12.5, 12.5]
    assert axis.get_ylim()[0] == 0 and axis.get_xlabel() == "step (20 are 2 epochs)"


def test_what_came_before_has_its_name():
    lines = [{"step": 0, "knn_top1": 0.25}]
    for settings, name in [
        (ONE | {"model": {"weights": "r50.pth"}}, "the weights it began from"),
        (ONE, "untrained"),
        ({}, "before training"),
    ]:
        assert legend(axes(lines, settings)["kNN accuracy (%)"]) == ["kNN", f"kNN, {name}: 25.0 %"]
    axis = axes([{"step": 0, "clean_top1": 0.5, "robust_top1": 0.0}, report(1)], FARE, 4)["accuracy (%)"]
    assert legend(axis) == [
        "clean",
        "clean, the source encoder: 50.0 %",
        "robust",
        "robust, the source encoder: 0.0 %",
        "a guess among 4 classes: 25.0 %",
    ]
    assert axis.lines[0].get_color() == axis.lines[1].get_color() != axis.lines[2].get_color()
    assert axis.lines[1].get_linestyle() == "--"


def test_the_panel_says_which_attack_a_robust_accuracy_is_of():
    attack = {"name": "fgsm", "norm": "l2", "eps_255": 127.5, "steps": 10, "restarts": 1, "random_start": True}
    lines = [{"step": 0, "clean_top1": 0.5, "robust_top1": 0.25, "robust_images": 2000}, report(1)]
    picture = plots.figure(lines, FARE | {"robust": {"attack": attack}})
    (title,) = [axis.get_title() for axis in picture.axes if axis.get_ylabel() == "accuracy (%)"]
    assert " ".join(title.split()) == "robust: under fgsm on cross-entropy, l2 127.5/255, 2,000 images"


@pytest.mark.parametrize("first", [{"step": 4, "knn_top1": 0.25}, {"step": 0, "knn_top1": math.nan}])
def test_there_is_no_baseline_where_none_was_measured(first):
    said = legend(axes([first, {"step": 8, "knn_top1": 0.5}], ONE)["kNN accuracy (%)"])
    assert not any("untrained" in text for text in said)


def test_losses_are_drawn_raw_and_smoothed_over_a_window_that_is_stated():
    lines = [report(step, 2 + math.sin(step)) for step in range(1, 101)]
    name, points = "loss, simclr (weight 1.0): nt_xent (nats)", [(line["step"], line["loss"]) for line in lines]
    axis = axes(lines, ONE)[name]
    raw, strong = axis.lines[:2]
    assert drawn(axis) == points and raw.get_alpha() < 0.5
    expected = smoothed(torch.tensor([value for _, value in points]).double(), 5)
    torch.testing.assert_close(torch.as_tensor(strong.get_ydata()), expected)
    assert strong.get_alpha() is None and "mean of 5 reports" in axis.get_title() and axis.get_ylim()[0] == 0
    few = axes(lines[:10], ONE)[name]
    assert few.get_title().endswith("each report, of one step") and drawn(few) == drawn(few, 1) == points[:10]


def test_each_term_and_each_penalty_has_a_panel_that_says_its_weight():
    more = {"loss/simclr": 3.0, "loss/sup": 4.0, "penalty/sup": 1.5}
    found = axes([report(step, 5.0, **more) for step in (1, 2)], TERMS)
    expected = {
        "loss, the weighted sum: loss": 5.0,
        "simclr (weight 1.0): nt_xent (nats)": 3.0,
        "sup, its penalty apart (weight 0.5): sup_con (nats)": 2.5,
        "penalty of sup (weight 0.5): loss² per pixel²": 1.5,
    }
    assert {name: drawn(axis)[0][1] for name, axis in found.items()} == expected | {"learning rate": 0.1}
    fare = axes([report(1, 5.0, **{"loss/adversarial": 4.9, "loss/clean": 1.0})], FARE)
    assert [name for name in fare if "weight " in name] == [
        "adversarial (weight 1.0): fare (squared distance)",
        "clean (weight 0.1): fare (squared distance)",
    ]
    assert "x: loss" in axes([report(1, 5.0, **{"loss/x": 5.0})])  # of a configuration that cannot be read


def test_what_is_not_finite_is_a_gap_that_is_marked_and_counted():
    lines = [report(step, None if step == 4 else math.nan if step in (2, 7) else 1.0) for step in range(1, 60)]
    axis = axes(lines)["loss: loss"]
    assert [step for step, value in drawn(axis) if not math.isfinite(value)] == [2, 4, 7]
    assert [step for step, value in drawn(axis, 1) if not math.isfinite(value)] == [2, 4, 7]  # nor is it smoothed over
    assert [step for step, _ in drawn(axis, 2)] == [1, 3]  # no line shows them
    assert legend(axis) == ["not finite: 3 of 59 reports"] and [step for step, _ in drawn(axis, 3)] == [2, 4, 7]
    shares = [{"step": step, "knn_top1": math.nan if step == 1 else 0.5} for step in range(3)]
    assert "not finite: 1 of 3 evaluations" in legend(axes(shares)["kNN accuracy (%)"])
    (nothing,) = [axis for name, axis in axes([report(1, None), report(2, None)]).items() if name != "learning rate"]
    assert legend(nothing) == ["not finite: 2 of 2 reports"]


def test_a_value_that_would_hide_the_others_makes_the_axis_logarithmic_and_it_says_so():
    lines = [report(step, 1e5 if step == 1 else 1.0) for step in range(1, 9)]
    assert axes(lines)["loss: loss, logarithmic"].get_yscale() == "log"
    lines[3]["loss"] = -1.0  # which has no logarithm, and is below 0
    axis = axes(lines)["loss: loss"]
    assert axis.get_yscale() == "linear" and axis.get_ylim()[0] < -1


def test_a_step_that_was_reported_twice_is_drawn_once():
    lines = [report(1, 9.0), report(2, 8.0), report(2, 7.0), report(3, 6.0)]
    assert drawn(axes(lines)["loss: loss"]) == [(1, 9), (2, 7), (3, 6)]


def test_a_name_of_a_term_may_be_anything():
    name = "$^_ " + "long " * 30 + "\udcff"
    found = axes([report(1, 1.0, **{f"loss/{name}": 1.0, "loss/b": 1.0})], {"terms": {name: "no section"}})
    assert any("$^_ long" in key for key in found)


def test_a_run_that_reported_nothing_has_a_picture_that_says_so(tmp_path):
    (axis,) = plots.figure([], {}).axes
    assert [text.get_text() for text in axis.texts] == ["nothing was reported that can be read"]
    assert plots.curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_enough(tmp_path, monkeypatch):
    """Whatever the configuration looks like."""
    seen = []
    monkeypatch.setattr(plots, "png", lambda picture: seen.append(picture) or b"")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(report(1)) + "\n")
    (tmp_path / "config.yaml").write_text(json.dumps(ONE))
    assert plots.curves(tmp_path, 10) == tmp_path / "curves.png"
    (tmp_path / "config.yaml").write_text("- [")
    plots.curves(tmp_path, 10)
    titles = [picture.axes[0].get_title().split("\n")[0] for picture in seen]
    assert titles == ["loss, simclr (weight 1.0)", "loss"]
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UsageError, match=r"curves\.png.*free space"):
        plots.curves(tmp_path)


def test_a_run_reports_a_penalty_apart_and_shows_it_over_the_guess_of_its_data(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "png", lambda picture: seen.append(picture) or b"")
    given = ["train.steps=2", "terms.simclr.penalty.weight=1e-3", "optimizer.lr=1e-3", "evaluate.knn.neighbours=2"]
    assert pretrain_here(f"data.root={images}", f"run.dir={tmp_path}", *given) == 0
    first, *reports, last = metrics(tmp_path)
    assert all(line["loss"] == line["loss/simclr"] > line["penalty/simclr"] > 0 for line in reports)
    panels = {axis.get_title().split("\n")[0] or axis.get_ylabel(): axis for axis in seen[0].axes}
    expected = [line["loss"] - line["penalty/simclr"] for line in reports]
    assert [value for _, value in drawn(panels["simclr, its penalty apart (weight 1.0)"])] == expected
    shares = panels["kNN accuracy (%)"]
    assert [value for _, value in drawn(shares)] == [100 * line["knn_top1"] for line in (first, last)]
    assert legend(shares)[-1] == "a guess among 2 classes: 50.0 %"
