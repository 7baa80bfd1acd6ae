"""FARE: its loss and gradients by explicit formula, its frozen reference, its script from start to resume."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fasttrain import distributed, engine
from fasttrain.attacks import AttackConfig, Linf, apgd
from fasttrain.attacks.losses import squared_distance
from fasttrain.config import load, resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.export import export, load_encoder
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.reference import keep_in_evaluation
from fasttrain.nonfinite import Gate
from fasttrain.objectives import Reference, fare, fare_one_sided, surrogate_one_sided
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.step import Term, TrainStep
from fasttrain.views import adversarial
from tests.ranks import run_ranks
from tests.test_launch import ROOT, metrics, script

ALPHA, GLOBAL = 0.3, 8
ATTACK = AttackConfig(steps=3)


def small_encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    """A smooth network (at ReLU's kink rounding decides gradients) whose BatchNorms are not the identity."""
    torch.manual_seed(0)
    model = ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(layers=0))
    encoder = Encoder(model).to(dtype)
    for module in encoder.modules():
        if hasattr(module, "relu"):
            module.relu = torch.nn.SiLU()
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, 0.1, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return encoder


def moved(encoder: Encoder) -> Encoder:
    """Somewhere beside its reference."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder


def some_batch(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, GLOBAL, 3, 8, 8, generator=generator, dtype=dtype)
    return Batch(images, torch.randint(0, 3, (GLOBAL,), generator=generator), torch.arange(GLOBAL))


def step_of(encoder: Encoder, batchnorm: str = "eval", accumulation: int = 1) -> TrainStep:
    reference = Reference(encoder)
    if batchnorm == "eval":
        keep_in_evaluation(encoder)
    view = adversarial(ATTACK, fare_one_sided(), seed=7, accumulation=accumulation)
    return TrainStep(encoder, [Term("adversarial", fare(), 1.0, view), Term("clean", fare(), ALPHA)], reference)


def test_the_loss_is_the_formula_image_by_image_and_so_are_its_parameter_gradients():
    encoder, batch = small_encoder(torch.double), some_batch(1, torch.double)
    original = copy.deepcopy(encoder).eval()
    step = step_of(encoder)
    moved(encoder)
    plain = copy.deepcopy(encoder).eval()
    attack = adversarial(ATTACK, fare_one_sided(), seed=7)  # draws what the step's own view draws at its first call
    z = attack(encoder, Reference(original)(batch)).images[0]
    assert 0 < (z - batch.images[0]).abs().amax() <= 8 / 255 + 1e-12

    loss, values = step.train()(batch)
    loss.backward()
    expected = {"adversarial": 0.0, "clean": 0.0}
    for i, x in enumerate(batch.images[0]):
        target = original(x[None]).features[0].detach()
        for name, image in (("adversarial", z[i]), ("clean", x)):
            for ours, theirs in zip(plain(image[None]).features[0], target, strict=True):
                expected[name] = expected[name] + (ours - theirs) ** 2 / GLOBAL
    total = expected["adversarial"] + ALPHA * expected["clean"]
    total.backward()
    for ours, theirs in [(values[name], expected[name]) for name in values] + [(loss, total)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0, check_dtype=True)
    for ours, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_the_one_sided_losses_are_those_of_the_formula_and_pass_gradcheck():
    batch = some_batch(2, torch.double)._replace(targets=torch.randn(GLOBAL, 5, dtype=torch.double))
    features = torch.randn(GLOBAL, 5, dtype=torch.double, requires_grad=True)
    encoded = small_encoder()(batch.images[0].float())
    head = torch.nn.Linear(5, 3).double()
    for one_sided in (fare_one_sided(), surrogate_one_sided(head)):
        loss = one_sided(None, batch)
        assert torch.autograd.gradcheck(lambda f, loss=loss: loss(encoded._replace(features=f)), features)
    distances = fare_one_sided()(None, batch)(encoded._replace(features=features))
    torch.testing.assert_close(distances, squared_distance(features, batch.targets))
    surrogate = surrogate_one_sided(head)(None, batch)(encoded._replace(features=features))
    logits = features @ head.weight.T + head.bias
    by_hand = [z.exp().sum().log() - z[y] for z, y in zip(logits, batch.labels, strict=True)]
    torch.testing.assert_close(surrogate, torch.stack(by_hand))


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_the_reference_stays_as_it_was_and_the_statistics_as_they_are_told_to(batchnorm):
    encoder, batch = small_encoder(), some_batch(3)
    step = step_of(encoder, batchnorm=batchnorm).train()
    before = {k: v.clone() for k, v in step.state_dict().items()}
    assert not any(part.training for part in step.prepare.encoder.modules())
    assert not any(parameter.requires_grad for parameter in step.prepare.parameters())
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        step(batch)[0].backward()
        optimizer.step()
    after = step.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert not [k for k in changed if k.startswith("prepare.")]
    assert [k for k in after if k.startswith("prepare.encoder.backbone.")]  # saved with the run
    assert "encoder.backbone.conv1.weight" in changed and "encoder.backbone.bn1.bias" in changed
    assert ("encoder.backbone.bn1.running_mean" in changed) == (batchnorm == "train")


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_a_term_of_weight_0_is_reported_and_leaves_no_trace(batchnorm):
    steps = []
    for terms in (slice(0, 1), slice(None, None, -1)):
        step = step_of(small_encoder(), batchnorm=batchnorm)
        moved(step.encoder)
        step.terms = tuple(term._replace(weight=float(term.name != "clean")) for term in step.terms)[terms]
        loss, values = step.train()(some_batch(5))
        loss.backward()
        steps.append((step, loss, values))
    (without, loss, _), (step, same, values) = steps
    assert same.equal(loss) and values["clean"] > 1e-3 and not values["clean"].requires_grad
    assert all(ours.equal(theirs) for ours, theirs in zip(step.buffers(), without.buffers(), strict=True))
    for ours, theirs in zip(step.parameters(), without.parameters(), strict=True):
        assert ours.grad is theirs.grad or ours.grad.equal(theirs.grad)


def test_a_batch_without_targets_is_refused():
    encoder, batch = small_encoder(), some_batch(4)
    with pytest.raises(UsageError, match="no targets"):
        fare()(encoder(batch.images[0]), batch)


class Case(NamedTuple):
    stage: int = 0
    accumulation: int = 1


def trained(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Weights after 3 steps of each case; consecutive images are one rank's part of a micro-batch."""
    distributed.initialize("cpu")
    results, world, rank = [], distributed.world_size(), distributed.rank()
    for case in cases:
        encoder = small_encoder()
        step = step_of(encoder, accumulation=case.accumulation)
        moved(encoder)
        settings = OptimizerConfig(name="adamw", lr=1e-3, lr_scaling="none", betas=(0.9, 0.95))
        optimizer = build_optimizer(settings, step, case.stage, torch.device("cpu"))
        train = engine.TrainConfig(
            batch=GLOBAL, accumulation=case.accumulation, zero_stage=case.stage, precision="fp32"
        )
        trainer, size = engine.initialize(step, optimizer, train), GLOBAL // case.accumulation
        trainer.train()
        gate = Gate(trainer)
        for number in range(3):
            whole = some_batch(number)
            for micro in range(case.accumulation):
                begin = micro * size + rank * size // world
                part = slice(begin, begin + size // world)
                loss, _ = trainer(Batch(whole.images[:, part], whole.labels[part], whole.index[part]))
                trainer.backward(loss)
                gate.step()
        results.append({k: v.detach().clone() for k, v in step.state_dict().items() if v.is_floating_point()})
    return results


def test_two_ranks_any_stage_and_accumulation_take_the_steps_of_one_process():
    cases = [Case(0), Case(2), Case(1, accumulation=2)]
    ((theirs,),) = run_ranks(1, trained, [Case()], timeout=300)
    for results in run_ranks(2, trained, cases, timeout=300):
        for case, ours in zip(cases, results, strict=True):
            start = moved(small_encoder()).state_dict()
            for name, tensor in start.items():
                key = f"encoder.{name}"
                if tensor.is_floating_point():
                    assert float((ours[key] - theirs[key]).norm()) < 1e-3 * max(float(theirs[key].norm()), 0.1), case


TINY = [
    "augment.size=16",
    "train.batch=8",
    "train.steps=24",
    "optimizer.warmup_steps=1",
    "run.log_every=1",
    "run.save_every=12",
    "loader.threads=1",
    "train.device=cpu",
    "attack.steps=3",
    "robust.attack.steps=2",
    "robust.every_steps=12",
    "classifier.linear.l2=[0.1]",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    shape = {"arch": "resnet18", "stem": "cifar", "width": 0.0625, "zero_init_residual": False}
    export(Encoder(ModelConfig(**shape, head=HeadConfig(layers=0))), folder)
    return folder


def finetune_here(*arguments: str) -> int:
    module = script("finetune")
    return module.finetune(load(module.FinetuneConfig, [*TINY, *arguments], module.of_source))


@pytest.fixture(scope="module")
def finished(images, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    assert finetune_here(f"source={source}", f"data.root={images}", f"run.dir={folder}", "optimizer.lr=0.001") == 0
    return folder


def distance_under_attack(encoder: Encoder, reference: Encoder, folder: Path) -> float:
    """Mean over the images in ``folder`` of the largest squared distance to the reference that APGD finds."""
    pixels = [np.array(Image.open(path).resize((16, 16))) for path in sorted(folder.rglob("*.jpg"))]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        targets = reference(images).features

    def distance(x: torch.Tensor) -> torch.Tensor:
        return squared_distance(encoder(x).features, targets)

    with torch.no_grad():
        return float(distance(apgd(Linf(8 / 255), 10)(distance, images)).mean())


def test_a_run_lowers_the_distance_that_an_attack_can_reach_on_new_images(finished, source, images):
    before, reference, after = (load_encoder(str(folder)) for folder in (source, source, finished))
    reached = [distance_under_attack(encoder, reference, images / "val") for encoder in (before, after)]
    assert reached[1] < 0.7 * reached[0]
    lines = metrics(finished)
    assert [line["step"] for line in lines if "robust_top1" in line] == [0, 12, 24]
    (count,) = {line["robust_images"] for line in lines if "robust_top1" in line}
    said = script("finetune").summary(NamedTuple("Run", [("dir", Path)])(finished), AttackConfig())
    assert (
        f"of {count:,.0f}, 95 % interval " in said and "under               apgd on cross-entropy, linf 8/255" in said
    )
    assert lines[1]["loss/clean"] < 1e-8 < lines[2]["loss/clean"]  # it starts as the reference
    assert lines[1]["loss/adversarial"] > 1
    assert json.loads((finished / "encoder.json").read_text())["finetuned_from"] == str(source)


def test_a_resumed_run_ends_where_the_undisturbed_one_did_without_a_new_classifier(
    images, source, finished, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints/step-00000024")
    module = script("finetune")
    monkeypatch.setattr(module, "fit_to_clean_features", None)
    given = [f"source={source}", f"data.root={images}", f"run.dir={folder}", "optimizer.lr=0.001"]
    assert module.finetune(load(module.FinetuneConfig, [*TINY, *given], module.of_source)) == 0
    last = "checkpoints/step-00000024/model.safetensors"
    ours, theirs = load_file(str(folder / last)), load_file(str(finished / last))
    assert all(ours[name].equal(theirs[name]) for name in theirs) and "prepare.classifier.weight" in theirs
    columns = ("step", "loss", "clean_top1", "robust_top1")
    assert [[line.get(c) for c in columns] for line in metrics(folder)] == [
        [line.get(c) for c in columns] for line in metrics(finished)
    ]


def test_a_run_that_goes_on_needs_its_source_no_more(images, source, tmp_path):
    gone = Path(shutil.copytree(source, tmp_path / "source"))
    given = [f"source={gone}", f"data.root={images}", f"run.dir={tmp_path / 'run'}", "robust.every_steps=0"]
    given += ["attack.steps=1", "optimizer.warmup_steps=0", "optimizer.schedule=constant"]
    assert finetune_here(*given, "train.steps=1") == 0
    shutil.rmtree(gone)
    assert finetune_here(*given, "train.steps=2") == 0
    assert json.loads((tmp_path / "run/encoder.json").read_text())["step"] == 2


def test_robust_evaluation_of_a_run_is_printed_and_written(images, finished, tmp_path, capsys):
    module = script("eval")
    given = ["task=robust", f"source={finished}", f"output={tmp_path / 'found.json'}", "linear.l2=[0.1]"]
    given += ["device=cpu"]
    given += ["robust.attack.steps=2", "robust.images=6"]
    module.evaluate(load(module.schema_of("robust"), given, module.of_run))
    table = json.loads((tmp_path / "found.json").read_text())
    assert 0 <= table["robust_top1"] <= table["clean_top1"] <= 1
    assert table["images"] == table["val"]["images"] == 6 and table["attack"]["eps_255"] == 8
    assert "robust_top1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=/nowhere"], "no run or weights at '/nowhere'"),
        (["optimizer.warmup_epochs=1"], "warmup_epochs=1 and warmup_steps=1: set one of them to 0"),
        (["optimizer.warmup_steps=24"], "24 steps of warm-up in a run of 24"),
        (["fare.alpha=-1"], "fare.alpha=-1: should be greater than or equal to 0"),
        (["fare.against=labels"], "fare.against='labels': should be 'distance' or 'cross_entropy'"),
        (["robust.attack.batchnorm=train"], "set batchnorm=eval"),
        (["attack.batchnorm=train"], "set attack.batchnorm=eval or fare.batchnorm=train"),
        (["attack.name=fgsm", "attack.steps=10"], "the distance has no gradient: use attack.name=apgd"),
        (["attack.eps_255=0"], "attack.eps_255=0: an image that is not moved"),
        (["augment.views=2"], "augment.views=2: FARE looks at each image once"),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(images, source, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        finetune_here(f"source={source}", f"data.root={images}", f"run.dir={tmp_path / 'run'}", *arguments)
    assert "\n" not in str(caught.value)


def test_the_source_of_a_finetuning_has_to_be_given():
    module = script("finetune")
    with pytest.raises(UsageError, match="source"):
        load(module.FinetuneConfig, TINY, module.of_source)


def test_every_configuration_resolves():
    paths = sorted((ROOT / "configs/finetune").glob("*.yaml"))
    assert paths
    for path in paths:
        resolve(script("finetune").FinetuneConfig, {"source": "x", **yaml.safe_load(path.read_text())})
