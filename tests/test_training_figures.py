"""Figures of trainings: what runs logged, read back exactly; images as the run's own adversary changes them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fasttrain import checkpoint, distributed
from fasttrain.config import load, resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.evaluation import fare, views
from fasttrain.evaluation.evaluation import EvaluationData, split_arrays, subjects_of
from fasttrain.evaluation.logged import Series, epochs_of, labels, mean_of, reached, series, smoothed
from fasttrain.evaluation.parts import Parts
from fasttrain.models import Encoder, ModelConfig
from fasttrain.views import Structured, ViewedTermConfig, build_view
from tests.ranks import run_ranks
from tests.test_launch import pretrain_here, script

NAN = math.nan
LINES = [
    {"step": 0, "knn_top1": 0.1},
    {"step": 10, "epoch": 0.333, "loss": 3.0, "loss/clean": 0.5, "lr": 0.1},
    {"step": 20, "epoch": 0.667, "lr": 0.1},  # a rejected step
    {"step": 30, "epoch": 1.0, "loss": 2.0, "loss/clean": 0.25, "lr": 0.1},
    {"step": 30, "knn_top1": NAN},
    {"step": 60, "epoch": 2.0, "loss": 1.0, "loss/clean": 1 / 3, "lr": 0.0},
    {"step": 60, "knn_top1": 0.7},
    {"step": 60, "knn_top1": 0.3},  # told twice
]


def equal(one: torch.Tensor, values: list[float]) -> bool:
    return one.dtype == torch.float64 and torch.equal(one.nan_to_num(-1), torch.tensor(values).double().nan_to_num(-1))


def test_series_are_what_was_logged_to_the_bit_with_gaps_where_it_was_not_finite_or_rejected():
    knn, clean = series(LINES, "knn_top1"), series(LINES, "loss/clean")
    assert knn.steps.tolist() == [0, 30, 60] and knn.values.tolist()[::2] == [0.1, 0.3] and knn.values[1].isnan()
    assert clean.steps.tolist() == [10, 20, 30, 60] and clean.values[1].isnan()
    assert clean.values[[0, 2, 3]].tolist() == [0.5, 0.25, 1 / 3]
    assert series(LINES, "robust_top1") is None
    assert reached(knn) == (0.1, 0.3, 0.3, 60)
    assert reached(Series(torch.tensor([0, 5]), torch.tensor([NAN, NAN]).double())).best_step == 0


def test_epochs_are_the_steps_over_those_of_an_epoch():
    assert epochs_of(torch.tensor([0, 30, 45]), LINES).tolist() == [0, 1, 1.5]
    long = [{"step": 7 * 123, "epoch": 7.0}, {"step": 1000, "epoch": round(1000 / 123, 3)}]
    assert epochs_of(torch.tensor([123, 369]), long).tolist() == [1, 3]
    assert epochs_of(torch.tensor([0]), LINES[:1]).tolist() == [0]


def test_the_mean_of_seeds_is_taken_where_all_of_them_have_a_value():
    one = Series(torch.tensor([0, 10, 20, 30]), torch.tensor([1.0, 2, NAN, 4]).double())
    two = Series(torch.tensor([0, 10, 20]), torch.tensor([3.0, 5, 6]).double())
    curve = mean_of([one, two])
    assert curve.steps.tolist() == [0, 10, 20] and curve.seeds == 2
    assert curve.mean[:2].tolist() == [2, 3.5] and curve.mean[2].isnan()
    assert curve.sd[0] == pytest.approx(math.sqrt(2)) and curve.sd[1] == pytest.approx(math.sqrt(4.5))
    assert mean_of([one, None]) is None and mean_of([one, Series(one.steps + 1, one.values)]) is None
    assert mean_of([one]).sd.isnan().all()


@pytest.mark.parametrize("window", [1, 3, 7, 101])
def test_smoothing_is_the_mean_of_what_is_finite_around(window):
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[[0, 17, 18]] = NAN
    expected = []
    for i, own in enumerate(values.tolist()):
        around = [x for x in values[max(0, i - window // 2) : i + window // 2 + 1].tolist() if not math.isnan(x)]
        expected.append(NAN if math.isnan(own) else sum(around) / len(around))
    np.testing.assert_allclose(smoothed(values, window).numpy(), expected, rtol=1e-12)


def written(folder: Path, settings: dict, lines: list[dict]) -> Path:
    """A run's folder, as far as what it logged is asked for."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    plain = [{k: None if v != v else v for k, v in line.items()} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    return folder


APGD = {"name": "apgd", "norm": "linf", "eps_255": 8.0, "steps": 10, "step_255": None, "restarts": 1}
APGD |= {"random_start": True, "batchnorm": "eval"}


def fine_tuned(folder: Path, alpha: float = 0.1, lr: float = 1e-4, seed: int = 0, **robust) -> Path:
    settings = {
        "source": "x",
        "run": {"seed": seed, "dir": str(folder)},
        "data": {"root": "/data/a"},
        "fare": {"alpha": alpha},
        "optimizer": {"lr": lr},
        "robust": {"every_steps": 2, "images": 100, "attack": APGD} | robust,
    }
    measured = bool(settings["robust"]["every_steps"])
    lines = [{"step": 0, "clean_top1": 0.9, "robust_top1": 0.0}] * measured
    for step in (1, 2, 3, 4):
        losses = {"loss/adversarial": 8.0 / step, "loss/clean": alpha * step + seed}
        lines.append({"step": step, "epoch": 0.1, "loss": 1.0, **losses, "lr": lr})
        if step % 2 == 0 and measured:
            robust = {"robust_top1": 0.1 * step, "robust_images": 100}
            lines.append({"step": step, "clean_top1": 0.8 + seed / 10, **robust})
    return written(folder, settings, lines)


def evaluated(task: str, *given: str) -> tuple[dict, object]:
    """What the command writes, and its picture."""
    module = script("eval")
    config = load(module.schema_of(task), [f"task={task}", *given], module.of_run)
    drawn = []
    evaluation = module.EVALUATIONS[task]
    module.EVALUATIONS[task] = evaluation._replace(
        figure=lambda found: drawn.append(evaluation.figure(found)) or drawn[0]
    )
    assert module.evaluate(config) == 0
    place = config.output or Path(config.sources[0]) / f"eval-{task}.json"
    return json.loads(Path(place).read_text()), drawn[0]


def sources(*folders: Path) -> str:
    return f"source=[{', '.join(map(str, folders))}]"


def test_fine_tunings_are_compared_by_what_differs_between_them(tmp_path, capsys):
    runs = [
        fine_tuned(tmp_path / "a0", 0.0),
        fine_tuned(tmp_path / "a1", 1.0),
        fine_tuned(tmp_path / "b1", 1.0, seed=1),
        fine_tuned(tmp_path / "lr", 1.0, 1e-3, every_steps=0),
    ]
    table, picture = evaluated("fare", sources(*runs), f"output={tmp_path / 'out/fare.json'}")
    names = ["alpha 0, lr 1e-4", "alpha 1, lr 1e-4", "alpha 1, lr 1e-4", "alpha 1, lr 1e-3"]
    assert [run["method"] for run in table["runs"]] == names
    arrays = load_file(str(tmp_path / "out/fare.safetensors"))
    assert arrays["runs.1.losses.adversarial.steps"].tolist() == [1, 2, 3, 4]
    assert arrays["runs.1.losses.adversarial.values"].tolist() == [8, 4, 8 / 3, 2]
    assert arrays["runs.2.losses.clean.values"].tolist() == [2, 3, 4, 5]
    assert arrays["runs.0.accuracies.robust_top1.steps"].tolist() == [0, 2, 4]
    assert table["runs"][1]["reached"]["clean_top1"] == {"first": 0.9, "last": 0.8, "best": 0.9, "best_step": 0}
    assert table["runs"][3]["accuracies"] == {} and table["attack"]["attack"]["eps_255"] == 8
    said = capsys.readouterr().out
    assert "a1: robust accuracy 40.0 % (40 of 100, 95 % interval 30.9 to 49.8)" in said
    assert (
        "apgd on cross-entropy, linf 8/255, 10 steps, 100 images, " in said
        and "an upper bound" in said
        and "-10.0" in said
    )
    assert "alpha 1, lr 1e-4: clean_top1 85.0 ± 7.1 % over 2 runs" in said
    assert "lr measured no accuracy (robust.every_steps=0)" in said and "eval.py robust" in said

    losses, accuracies = picture.axes[:2], picture.axes[2:]
    assert [axis.get_ylabel() for axis in accuracies] == ["clean accuracy (%)", "robust accuracy (%)"]
    assert all(axis.get_xlabel() == "step" and axis.get_ylim()[0] == 0 for axis in picture.axes)
    assert "adversarial loss" in losses[0].get_ylabel() and "8/255" in accuracies[1].get_title()
    robust = [line.get_ydata().tolist() for line in accuracies[1].get_lines()]
    assert robust == [[0, 20, 40]] * 2  # the seeds' mean is one line
    texts = [text.get_text() for text in picture.legends[0].get_texts()]
    assert texts == ["alpha 0, lr 1e-4", "alpha 1, lr 1e-4 (mean ± sd of 2)", "alpha 1, lr 1e-3"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in losses[0].get_lines()}
    assert len(looks) == 3


def test_names_stand_where_settings_do_not_tell_methods_apart(tmp_path):
    runs = [fine_tuned(tmp_path / "a", 0.1), fine_tuned(tmp_path / "b", 0.2)]
    module = script("eval")

    def read(*given: str):
        return load(module.schema_of("fare"), ["task=fare", sources(*runs), *given], module.of_run)

    found = fare.evaluate(subjects_of(read("names=[mine, yours]")), None, read("names=[mine, yours]"), Parts(None))
    assert [run.method for run in found.runs] == ["mine", "yours"]
    assert labels(subjects_of(read())) == {"a": "alpha 0.1", "b": "alpha 0.2"}
    assert labels(subjects_of(read())[:1]) == {"a": "a"}
    assert read("smoothing=2").smoothing == 2
    with pytest.raises(UsageError, match=r"unknown key 'data'"):
        read("data.root=/x")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("fare", lambda run: shutil.rmtree(run), "is no run's folder .* give folders of runs"),
        ("fare", lambda run: (run / "metrics.jsonl").unlink(), "no line that can be read: let the run take some steps"),
        ("fare", lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n'), "has reported no loss/adversarial"),
        ("views", lambda run: None, "without the section 'terms': python launch/eval.py fare .* shows what"),
    ],
)
def test_what_cannot_be_shown_is_a_line(tmp_path, task, change, message):
    runs = [fine_tuned(tmp_path / "a"), fine_tuned(tmp_path / "b")]
    change(runs[1])
    with pytest.raises(UsageError, match=message) as caught:
        evaluated(task, sources(runs[1]), f"output={tmp_path / 'x.json'}")
    assert "\n" not in str(caught.value)


def test_runs_whose_accuracies_cannot_be_compared_are_refused(tmp_path):
    first, other = fine_tuned(tmp_path / "a"), fine_tuned(tmp_path / "b", attack=APGD | {"eps_255": 4.0})
    with pytest.raises(
        UsageError,
        match=r"by apgd on cross-entropy, linf 4/255, .*by apgd on cross-entropy, linf 8/255, .*one robust.attack",
    ):
        evaluated("fare", sources(first, other), f"output={tmp_path / 'x.json'}")
    settings = yaml.safe_load((other / "config.yaml").read_text()) | {"data": {"root": "/data/b"}}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UsageError, match=r"trained on data.root=/data/a and .* on data.root=/data/b"):
        evaluated("fare", sources(first, other), f"output={tmp_path / 'x.json'}")


CHANGED = "terms.simclr.view.structured.transformations=[colour_space,rotation]"


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory) -> dict[str, Path]:
    """Short runs, whose adversaries are far from where they began."""
    root = tmp_path_factory.mktemp("views")
    of = {
        "learned": ["terms.simclr.view.kind=structured", CHANGED, "terms.simclr.view.structured.lr_factor=1000"],
        "pgd": ["terms.simclr.view.kind=attack", "terms.simclr.view.attack.name=pgd", "terms.simclr.view.index=1"],
    }
    given = [f"data.root={images}", "train.steps=4", "evaluate.every_epochs=0.67"]
    for name, view in of.items():
        assert pretrain_here(*given, *view, f"run.dir={root / name}") == 0
    return {name: root / name for name in of}


def test_views_are_shown_with_knn_constants_and_images(images, pretrained, tmp_path, capsys):
    runs = pretrained.values()
    given = [sources(*runs), f"output={tmp_path / 'views.json'}", "images=3", "device=cpu"]
    table, picture = evaluated("views", *given)
    arrays = load_file(str(tmp_path / "views.safetensors"))
    reports = [json.loads(line) for line in (pretrained["learned"] / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in reports if "knn_top1" in line]
    assert arrays["runs.0.knn.steps"].tolist() == [line["step"] for line in measured] == [0, 2, 4]
    assert arrays["runs.0.knn.values"].tolist() == [line["knn_top1"] for line in measured]
    assert arrays["runs.0.epochs"].tolist() == [0, 2 / 3, 4 / 3]
    degrees = [line["view/simclr/rotation/degrees"] for line in reports if "lr" in line]
    assert arrays["runs.0.constants.simclr/rotation/degrees.values"].tolist() == degrees and len(degrees) == 4
    assert len(table["runs"][0]["constants"]) == 10 and table["runs"][1]["constants"] == {}
    assert table["val"]["images"] == 3 and [one["kind"] for one in table["shown"]] == ["structured", "attack"]
    assert "learned, simclr/rotation: degrees" in capsys.readouterr().out

    knn, colours, degrees, learned, attacked = picture.axes
    assert knn.get_ylabel() == "kNN accuracy (%)" and knn.get_xlabel() == "epoch" and knn.get_ylim()[0] == 0
    assert [text.get_text() for text in knn.get_legend().get_texts()] == ["learned", "pgd"]
    assert len(colours.get_lines()) == 9 and "degrees" in degrees.get_ylabel()
    assert [tick.get_text() for tick in learned.get_yticklabels()] == ["before", "after"]
    assert [tick.get_text() for tick in attacked.get_yticklabels()][:2] == ["before", "after"]
    assert picture.axes[4].get_images()[0].get_array().shape == (3 * 16, 3 * 16, 3)

    before, after = arrays["shown.1.before"].int(), arrays["shown.1.after"].int()
    assert 0 < (after - before).abs().max() <= 8
    assert torch.equal(arrays["shown.0.before"], arrays["shown.1.before"])

    done = (tmp_path / "views.parts").stat().st_mtime_ns
    again, _ = evaluated("views", *given)
    assert again["shown"] == table["shown"] and (tmp_path / "views.parts").stat().st_mtime_ns == done


def test_what_is_shown_after_is_what_the_trained_view_gives(images, pretrained):
    run, module = pretrained["learned"], script("eval")
    config = load(module.schema_of("views"), ["task=views", sources(run), "images=4", "device=cpu"], module.of_run)
    data = EvaluationData(config, torch.device("cpu"), None)
    (found,) = views.evaluate(subjects_of(config), data, config, Parts(None)).shown

    settings = yaml.safe_load((run / "config.yaml").read_text())
    model = {k: v for k, v in settings["model"].items() if k in ModelConfig.model_fields}
    encoder = Encoder(resolve(ModelConfig, model)).eval()
    view = build_view(resolve(ViewedTermConfig, settings["terms"]["simclr"]), encoder, 0)
    kept, _ = checkpoint.find(run / "checkpoints")
    tensors = kept.tensors(checkpoint.MODEL)
    for part, prefix in ((encoder, "encoder."), (view, "views.simclr.")):
        part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    assert isinstance(view, Structured) and view.layer.weight.abs().max() > 0
    with data.own_batches("val", data.choose("val", 4)) as batches:
        (batch,) = batches
    x = batch.images[0]
    by_hand = view(encoder, Batch(torch.stack([x, x]), batch.labels, batch.index)).images[0]
    for ours, theirs in ((found.before, x), (found.after, by_hand)):
        assert torch.equal(ours, (255 * theirs.detach()).round().to(torch.uint8))
    assert not torch.equal(found.before, found.after) and found.step == 4
    for name, size in view.scalars().items():
        assert found.constants[name] == pytest.approx(float(size), rel=1e-6)


def test_seeds_are_one_line_and_runs_without_knn_are_noted(images, pretrained, tmp_path, capsys):
    runs = [Path(shutil.copytree(pretrained["pgd"], tmp_path / f"seed-{number}")) for number in range(3)]
    for number, run in enumerate(runs):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["run"] |= {"seed": number, "dir": str(run)}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        lines = [
            {"step": 0, "knn_top1": 0.1 * number},
            {"step": 3, "knn_top1": 0.4},
            {"step": 3, "epoch": 1.0, "lr": 1},
        ]
        lines[1] |= {"knn_top1": NAN} if number == 1 else {}
        plain = [json.dumps({k: None if v != v else v for k, v in line.items()}) for line in lines]
        (run / "metrics.jsonl").write_text("\n".join(plain) + "\n")
    table, picture = evaluated("views", sources(*runs), f"output={tmp_path / 'x.json'}", "images=0")
    assert table["shown"] == [] and "val" not in table
    (line,) = picture.axes[0].get_lines()
    np.testing.assert_allclose(line.get_ydata(), [10, NAN], rtol=1e-12)
    assert [text.get_text() for text in picture.axes[0].get_legend().get_texts()] == ["seed (mean ± sd of 3)"]
    (runs[0] / "metrics.jsonl").write_text('{"step": 3, "epoch": 1.0, "lr": 1}\n')
    evaluated("views", sources(runs[0]), f"output={tmp_path / 'x.json'}", "images=0")
    assert "seed-0 measured no kNN accuracy" in capsys.readouterr().out


def test_images_need_a_checkpoint_and_labelled_images(images, pretrained, tmp_path):
    run = Path(shutil.copytree(pretrained["learned"], tmp_path / "run"))
    given = [sources(run), f"output={tmp_path / 'x.json'}", "device=cpu"]
    with pytest.raises(UsageError, match="images out with images=0"):
        evaluated("views", *given, f"data.root={images / 'val' / 'cat'}")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match=r"has no checkpoint, .* or leave the images out with images=0"):
        evaluated("views", *given)
    assert evaluated("views", *given, "images=0")[0]["shown"] == []


def _shown_here(runs: list[Path]) -> tuple[dict, dict[str, torch.Tensor]]:
    distributed.initialize("cpu")
    module = script("eval")
    config = load(module.schema_of("views"), ["task=views", sources(*runs), "images=3"], module.of_run)
    data = EvaluationData(config, torch.device("cpu"), None)
    return split_arrays(views.evaluate(subjects_of(config), data, config, Parts(None)))


def test_each_of_two_ranks_has_to_the_bit_what_one_has_though_the_loss_gathers_negatives(pretrained):
    plain, arrays = _shown_here([*pretrained.values()])
    for theirs, their_arrays in run_ranks(2, _shown_here, [*pretrained.values()]):
        assert repr(theirs) == repr(plain) and theirs["shown"][1]["kind"] == "attack"
        assert all(their_arrays[name].equal(array) for name, array in arrays.items())
        assert their_arrays.keys() == arrays.keys()


def test_a_real_fine_tuning_is_shown_with_the_clean_loss_that_it_does_not_lower(pretrained, tmp_path):
    module, run = script("finetune"), tmp_path / "run"
    given = [f"source={pretrained['pgd']}", f"run.dir={run}", "fare.alpha=0", "train.steps=2", "train.batch=4"]
    given += ["train.device=cpu", "attack.steps=2", "robust.attack.steps=2", "robust.every_steps=1", "robust.images=4"]
    given += ["optimizer.warmup_steps=1", "run.log_every=1", "classifier.linear.l2=[0.1]"]
    assert module.finetune(load(module.FinetuneConfig, given, module.of_source)) == 0
    table, _ = evaluated("fare", sources(run))
    assert Path(table["arrays"]) == Path("eval-fare.safetensors") and (run / "eval-fare.png").stat().st_size > 10_000
    arrays = load_file(str(run / "eval-fare.safetensors"))
    assert arrays["runs.0.losses.adversarial.values"].isfinite().all()
    assert 0 <= arrays["runs.0.losses.clean.values"][0] < 1e-8 < arrays["runs.0.losses.clean.values"][1]
    assert arrays["runs.0.accuracies.robust_top1.steps"].tolist() == [0, 1, 2]
