"""Robustness curves: smallest changes known in closed form, attacks called by hand, statistics, ranks, resume."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain import distributed
from fasttrain.accuracies import wilson
from fasttrain.attacks import L2, Linf, PLBConfig, fgsm, image_keys, make_attack, pgd, plb
from fasttrain.attacks.losses import cross_entropy
from fasttrain.config import load, resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.evaluation import attacked, curves
from fasttrain.evaluation.attacked import outcomes
from fasttrain.evaluation.curves import (
    CurvesEvaluation,
    bootstrap,
    curve_of_outcomes,
    curve_of_smallest,
    half_size,
    smallest_changes,
)
from fasttrain.export import export
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from tests.ranks import run_ranks
from tests.test_launch import script

COUNT, CLASSES, SHAPE = 12, 2, (3, 2, 2)


def samples() -> tuple[Batch, Tensor, Tensor]:
    """Images near mid-grey, every fourth labelled wrong, and a linear classifier's weight [C, d] and bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, 12, generator=generator, dtype=torch.double)
    bias = -weight.sum(1) / 2  # undecided about grey
    images = 0.5 + 0.04 * torch.randn(1, COUNT, *SHAPE, generator=generator, dtype=torch.double)
    labels = (images[0].flatten(1) @ weight.T + bias).argmax(1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    return Batch(images, labels, torch.arange(COUNT)), weight, bias


def linear(weight: Tensor, bias: Tensor):
    return lambda x: x.flatten(1) @ weight.T + bias


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_smallest_changes_of_a_linear_classifier_are_its_distances_to_the_other_classes(norm, dual):
    batch, weight, bias = samples()
    logits = linear(weight, bias)
    found = smallest_changes(logits, batch, plb(PLBConfig(norm=norm, shrink=0.05)), norm)
    assert found.dtype == torch.float64
    ratios = []
    for x, label, size in zip(batch.images[0], batch.labels.tolist(), found.tolist(), strict=True):
        z = logits(x[None])[0]
        gaps = [
            float((z[label] - z[c]) / torch.linalg.vector_norm(weight[c] - weight[label], dual))
            for c in range(CLASSES)
            if c != label
        ]
        nearest = max(0.0, min(gaps))  # no pixel leaves [0, 1] on the way: images are near grey
        assert nearest <= size <= 1.1 * nearest
        ratios += [size / nearest] if nearest else []
    assert len(ratios) == 9 and np.median(ratios) < 1.01
    curve = curve_of_smallest(found, [2.0, 8.0, 400.0], 50)
    assert curve.misclassified[0] == sum(1 for s in found if s == 0) / COUNT == 0.25
    for size, share in zip(curve.sizes_255, curve.misclassified, strict=True):
        assert share == sum(1 for s in found.tolist() if s * 255 <= size) / COUNT
    assert curve.never_fooled == 0 and curve.median_255 == pytest.approx(255 * float(np.median(found)))


@pytest.mark.parametrize(("norm", "threat"), [("linf", Linf), ("l2", L2)])
def test_outcomes_are_those_of_the_attack_called_by_hand(norm, threat):
    batch, weight, bias = samples()
    batch = batch._replace(index=torch.arange(COUNT) + 7)
    logits = linear(weight, bias)
    keys = image_keys(0, 0, batch.index)
    for eps in (0.0, 4.0, 20.0):
        for name, attack in (("fgsm", fgsm(threat(eps / 255))), ("pgd", pgd(threat(eps / 255), 3, restarts=2))):
            config = CurvesEvaluation(task="curves", source=("x",), norm=norm, steps=3, restarts=2)
            found = outcomes(logits, batch, make_attack(config.attack_at(name, eps)))
            moved = attack(lambda x: cross_entropy(logits(x), batch.labels), batch.images[0], keys)
            for i in range(COUNT):
                clean = int(logits(batch.images[0, i][None]).argmax()) == batch.labels[i]
                under = int(logits(moved[i][None]).argmax()) == batch.labels[i]
                assert (bool(found.clean[i]), bool(found.robust[i])) == (bool(clean), bool(clean and under))


class Flat(torch.autograd.Function):
    """Eight grey levels, whose gradient is 0."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (7 * x).round() / 7

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


@pytest.mark.parametrize(
    ("only", "norm"), [("dark", "linf"), ("bright", "linf"), ("red", "linf"), ("noisy", "linf"), ("red", "l2")]
)
def test_no_image_is_missed_where_the_loss_has_no_slope(only, norm):
    """All is one class but for one kind of images, far from most of these; a few tries suffice, and some way back."""

    def logits(x: Tensor) -> Tensor:
        x = Flat.apply(x)
        mean, rough = x.mean((1, 2, 3)), (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        red = x[:, 0].mean((1, 2)) - x[:, 1:].mean((1, 2, 3))
        score = {"dark": 0.2 - mean, "bright": mean - 0.8, "red": red - 0.6, "noisy": rough - 0.3}[only]
        return torch.stack([torch.zeros_like(score), score], 1)

    noise = torch.rand(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grey = torch.linspace(0.3, 0.7, 4).view(1, 4, 1, 1, 1) + 0.05 * noise
    batch = Batch(grey, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    found = smallest_changes(logits, batch, plb(PLBConfig(norm=norm)), norm)
    assert found.isfinite().all()
    if only in ("dark", "bright"):  # the straight way there is the shortest
        mean = grey[0].double().mean((1, 2, 3))
        way = mean - 0.2 if only == "dark" else 0.8 - mean
        assert ((found > way - 1 / 14 - 0.05) & (found < way + 1 / 14 + 0.1)).all()


def test_what_is_found_for_an_image_far_from_all_others_does_not_depend_on_its_batch():
    batch = Batch(torch.full((1, 3, 3, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64), torch.tensor([4, 9, 2]))

    def logits(x: Tensor) -> Tensor:
        score = (Flat.apply(x)[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) - 0.3
        return torch.stack([torch.zeros_like(score), score], 1)

    whole = smallest_changes(logits, batch, plb(PLBConfig(steps=80)))
    alone = Batch(batch.images[:, 1:2], batch.labels[1:2], batch.index[1:2])
    assert torch.equal(smallest_changes(logits, alone, plb(PLBConfig(steps=80))), whole[1:2])


def test_an_image_that_nothing_fools_is_infinitely_far_and_counted():
    batch, *_ = samples()
    right = batch._replace(labels=torch.tensor([0, 1] * (COUNT // 2)))
    found = smallest_changes(lambda x: x.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0]), right, plb(PLBConfig()))
    assert found.tolist() == [math.inf, 0.0] * (COUNT // 2)
    curve = curve_of_smallest(found, [1.0], 50)
    assert (curve.misclassified, curve.never_fooled, curve.median_255) == ([0.5, 0.5], 0.5, math.inf)


def test_scores_that_are_not_finite_are_no_smallest_change():
    batch, weight, bias = samples()
    assert smallest_changes(linear(weight * math.nan, bias), batch, plb(PLBConfig(steps=3))).isnan().all()


def test_intervals():
    stats = pytest.importorskip("scipy.stats")
    for count, total in ((0, 7), (3, 7), (7, 7), (450, 1000)):
        theirs = stats.binomtest(count, total).proportion_ci(0.95, "wilson")
        assert wilson(count, total) == pytest.approx((theirs.low, theirs.high), rel=1e-12, abs=1e-15)
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: float(np.median(values[rows])), 400, 2000)
    # of the median's order statistic: binomial counts of values below it
    ranks = stats.binom.ppf([0.025, 0.975], 400, 0.5).astype(int)
    near = np.sort(values)
    assert near[ranks[0] - 4] < low < near[ranks[0] + 4] and near[ranks[1] - 4] < high < near[ranks[1] + 4]
    assert bootstrap(lambda rows: math.inf, 3, 10) == (math.inf, math.inf)
    assert bootstrap(lambda rows: float(rows.sum()), 50, 20, 1) != bootstrap(lambda rows: float(rows.sum()), 50, 20, 2)


def test_half_are_misclassified_between_two_sizes_or_beyond():
    assert half_size([0, 2, 4], [0.1, 0.4, 0.8]) == pytest.approx(2.5)
    assert half_size([0, 2, 4], [0.6, 0.4, 0.8]) == 0
    assert half_size([0, 2, 4], [0.1, 0.2, 0.49]) == math.inf
    wrong = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
    curve = curve_of_outcomes("fgsm", wrong, [0.0, 2.0, 4.0], 100)
    assert curve.misclassified == [0.25, 0.5, 0.75] and curve.median_255 == 2 and curve.never_fooled == 0.25
    assert curve.median_low_255 <= 2 <= curve.median_high_255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attacks": ()}, r"attacks=\[\]: give one or several"),
        ({"attacks": ("fgsm", "pgd", "fgsm")}, "fgsm.*give each once"),
        ({"attacks": ("cw",)}, "'fgsm', 'pgd', 'apgd' or 'plb'"),
        ({"eps_255": ()}, r"eps_255=\[\]: give sizes from 0 on"),
        ({"eps_255": (-1, 2)}, r"eps_255=\[-1, 2\]: give sizes from 0 on, each once, in growing order"),
        ({"eps_255": (4, 2)}, "in growing order"),
        ({"eps_255": (2, 2)}, "each once"),
        ({"eps_255": (8, 300)}, "at most 255"),
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"plb": {"norm": "l2"}}, "unknown key 'plb.norm'"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_input_is_a_line(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve(CurvesEvaluation, {"task": "curves", "source": ("x",), **values})
    assert "\n" not in str(caught.value)
    resolve(CurvesEvaluation, {"task": "curves", "source": ("x",), "norm": "l2", "eps_255": (0, 300)})


def test_a_slip_of_units_is_said():
    def said(**values):
        return resolve(CurvesEvaluation, {"task": "curves", "source": ("x",), **values}).doubts()

    assert said() == said(norm="l2") == said(eps_255=(0.5, 4)) == []
    assert said(norm="l2", eps_255=(0.1, 0.5)) == ["eps_255=0.5 is 0.5/255: for 0.5 of the range [0, 1] give 127.5"]
    assert said(eps_255=(0.01, 0.03))[0].startswith("eps_255=0.03 is 0.03/255")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[Path]:
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(layers=0))
        folders.append(tmp_path_factory.mktemp("encoders") / f"simclr_{seed}")
        folders[-1].mkdir()
        export(Encoder(model), folders[-1])
    return folders


def curves_of(encoders: list[Path], images: Path, output: Path, *given: str, task: str = "curves") -> dict:
    module = script("eval")
    source = f"source=[{','.join(map(str, encoders))}]" if task == "curves" else f"source={encoders[0]}"
    arguments = [f"task={task}", source, f"data.root={images}", f"output={output}", "device=cpu", "loader.threads=1"]
    arguments += ["augment.size=16", "batch=16"]
    module.evaluate(load(module.schema_of(task), [*arguments, *given], module.of_run))
    return json.loads(output.read_text()) if distributed.rank() == 0 else {}


SMALL = ["eps_255=[4,8]", "steps=2", "plb.steps=8", "classifier.linear.l2=[0.1]", "bootstrap=20", "names=[a,a]"]


def test_the_command_draws_goes_on_and_does_the_new_sizes_alone(encoders, images, tmp_path, capsys, monkeypatch):
    output = tmp_path / "curves.json"
    first = curves_of(encoders, images, output, *SMALL)
    said = capsys.readouterr().out
    assert "percent misclassified of 12 images of 2 classes" in said and (tmp_path / "curves.png").stat().st_size > 9000
    assert [one["method"] for one in first["encoders"]] == ["a", "a"]
    for one in first["encoders"]:
        fgsm_, pgd_, plb_ = one["curves"]
        assert [curve["attack"] for curve in one["curves"]] == ["fgsm", "pgd", "plb"]
        assert fgsm_["sizes_255"] == plb_["sizes_255"] == [0, 4, 8]
        assert fgsm_["misclassified"][0] == pgd_["misclassified"][0] == plb_["misclassified"][0]
        assert all(
            0 <= low <= share <= high <= 1
            for low, share, high in zip(fgsm_["low"], fgsm_["misclassified"], fgsm_["high"], strict=True)
        )

    worked = []
    monkeypatch.setattr(attacked.Targets, "at", lambda self, point: pytest.fail(f"{point} again"))
    again = curves_of(encoders, images, output, *SMALL)
    assert again["encoders"] == first["encoders"]
    monkeypatch.undo()
    seen = attacked.Targets.at
    monkeypatch.setattr(attacked.Targets, "at", lambda self, point: worked.append(point) or seen(self, point))
    more = curves_of(encoders, images, output, "eps_255=[4,6,8]", *SMALL[1:], "seed=3")
    assert {point["attack"]["eps_255"] for point in worked} == {6} and len(worked) == 2 * 2
    assert more["encoders"][0]["curves"][0]["sizes_255"] == [0, 4, 6, 8]


def _on_rank(encoders: list[Path], images: Path, output: Path) -> int:
    for task, given in (
        ("curves", [*SMALL[:-1], "attacks=[fgsm,plb]"]),
        ("robust", ["robust.attack.steps=2", "linear.l2=[0.1]"]),
    ):
        curves_of(encoders, images, output.with_name(f"{task}.json"), *given, task=task)
    return 0


def test_one_rank_and_two_find_the_same(encoders, images, tmp_path):
    places = [tmp_path / str(ranks) / "x.json" for ranks in (1, 2)]
    _on_rank(encoders[:1], images, places[0])
    run_ranks(2, _on_rank, encoders[:1], images, places[1])
    for task in ("curves", "robust"):
        one, two = (json.loads(place.with_name(f"{task}.json").read_text()) for place in places)
        assert (one["ranks"], two["ranks"]) == (1, 2)
        changing = ("seconds", "date", "ranks", "settings", "machine")
        assert {k: v for k, v in one.items() if k not in changing} == {
            k: v for k, v in two.items() if k not in changing
        }
    points = sorted(json.loads(line)["key"] for p in places[0].parent.glob("*.parts/*.jsonl") for line in p.open())
    shared = sorted(json.loads(line)["key"] for p in places[1].parent.glob("*.parts/*.jsonl") for line in p.open())
    assert points == shared
    arrays = [place.with_name("curves.safetensors").read_bytes() for place in places]
    assert arrays[0] == arrays[1]


def test_what_no_classifier_was_trained_with_has_none_of_its_own(encoders, images, tmp_path):
    with pytest.raises(UsageError, match=r"no classifier of its own .* use classifier.kind=probe"):
        curves_of(encoders, images, tmp_path / "o.json", "classifier.kind=own")


def test_weights_that_give_no_finite_scores_end_with_a_line(encoders, images, tmp_path, monkeypatch):
    def spoilt(*given):
        found = classifier_of(*given)
        return found._replace(weight=found.weight * math.inf)

    classifier_of = curves.classifier_of
    monkeypatch.setattr(curves, "classifier_of", spoilt)
    with pytest.raises(UsageError, match="the scores of 12 of 12 validation images are not finite"):
        curves_of(encoders[:1], images, tmp_path / "o.json", *SMALL[:-1], "attacks=[fgsm]")
    assert not (tmp_path / "o.json").exists()


def test_the_classifier_is_kept_and_not_fitted_again(encoders, images, tmp_path, monkeypatch):
    """On a GPU another fit has other bits, and what was found with the first would not be found again."""
    first = curves_of(
        encoders[:1], images, tmp_path / "o.json", "attacks=[fgsm]", "eps_255=[4]", "classifier.linear.l2=[0.1]"
    )
    module = importlib.import_module("fasttrain.evaluation.classifier")
    monkeypatch.setattr(module, "fit_classifier", None)
    again = curves_of(
        encoders[:1], images, tmp_path / "o.json", "attacks=[fgsm]", "eps_255=[4,8]", "classifier.linear.l2=[0.1]"
    )
    assert again["encoders"][0]["curves"][0]["misclassified"][:2] == first["encoders"][0]["curves"][0]["misclassified"]
