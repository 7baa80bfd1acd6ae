"""What is written for RobustBench: the model file is the same network, and the claim says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fasttrain.data.augment import AugmentConfig
from fasttrain.errors import UsageError
from fasttrain.evaluation.autoattack import EvaluatedAttackConfig
from fasttrain.evaluation.robustbench import TABLES, YOURS, Measured, Shown, check_claim, write_claim
from fasttrain.models import Encoder, ModelConfig

STANDARD = EvaluatedAttackConfig(name="autoattack")
CIFAR = Shown(
    "cifar-10-batches-py",
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    AugmentConfig(size=32, eval_crop=1),
)
OTHER_PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)}
ELSEWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import load
asked = torch.load(sys.argv[1] + "/asked.pt")
answers = {}
for dtype in (torch.float64, torch.float32):
    model = load().to(dtype)
    assert not any(module.training for module in model.modules())
    x = asked["images"].to(dtype).requires_grad_()
    logits = model(x)
    gradient, = torch.autograd.grad((logits * asked["upstream"].to(dtype)).sum(), [x])
    answers[str(dtype)] = {"logits": logits.detach(), "gradient": gradient}
assert not any(name.partition(".")[0].startswith("fasttrain") for name in sys.modules)
torch.save(answers, sys.argv[1] + "/answers.pt")
"""


def trained(**settings) -> Encoder:
    """One whose BatchNorms are not what they start as."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(zero_init_residual=False, **settings)).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                torch.nn.init.uniform_(values, low, low + 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"arch": "resnet18", "stem": "cifar", "width": 0.125}, 32),
        ({"arch": "resnet50", "stem": "imagenet", "width": 0.0625, **OTHER_PIXELS}, 48),
        ({"arch": "resnet12", "stem": "none", "width": 0.125, "classes": 3}, 32),
    ],
    ids=lambda value: value["arch"] if isinstance(value, dict) else value,
)
def test_the_file_is_the_same_network_without_us(settings, size, tmp_path):
    encoder = trained(**settings)
    weight, bias = torch.randn(10, encoder.backbone.num_features), torch.randn(10)
    folder = tmp_path / "new" / "claim"
    lines = write_claim(folder, encoder, weight, bias, STANDARD, CIFAR, Measured(0.5, 0.25, 100))
    assert {f"written to {path}" for path in folder.iterdir()} == set(lines[:3])
    asked = {"images": torch.rand(2, 3, size, size, dtype=torch.float64), "upstream": torch.randn(2, 10)}
    torch.save(asked, folder / "asked.pt")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(folder)], env=bare, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = torch.load(folder / "answers.pt")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        here = encoder.to(dtype)
        x = asked["images"].to(dtype).requires_grad_()
        logits = torch.nn.functional.linear(here(x).features, weight.to(dtype), bias.to(dtype))
        (gradient,) = torch.autograd.grad((logits * asked["upstream"].to(dtype)).sum(), [x])
        theirs = answers[str(dtype)]
        for ours, other in ((logits.detach(), theirs["logits"]), (gradient, theirs["gradient"])):
            largest = float(ours.abs().max())
            assert largest > 0 and torch.allclose(other, ours, rtol=tolerance, atol=tolerance * largest)


def test_the_claim_says_what_was_measured(tmp_path):
    encoder = trained(arch="resnet18", stem="cifar", width=0.125)
    weight, bias = torch.zeros(10, 64), torch.zeros(10)

    def written(attack, shown, measured):
        lines = write_claim(tmp_path, encoder, weight, bias, attack, shown, measured)[3:]
        assert lines == json.loads(json.dumps(lines))  # ranks tell each other
        return json.loads((tmp_path / "claim.json").read_text()), lines, (tmp_path / "model.py").read_text()

    claim, lines, source = written(STANDARD, CIFAR, Measured(0.8, 0.4307, 10_000))
    assert claim["clean_acc"] == "80.00" and claim["autoattack_acc"] == "43.07" and claim["eps"] == "8/255"
    assert claim["dataset"] == "cifar10" and claim["architecture"] == "ResNet-18, width 0.125"
    assert claim["number_forward_passes"] == 1 and claim["unreliable"] is False
    assert not any(claim[name] for name in YOURS) and lines == [
        f"of the claim fill in {', '.join(YOURS)}: only you know them"
    ]
    assert 'benchmark(load(), n_examples=10000, dataset="cifar10", threat_model="Linf", eps=8 / 255)' in source
    l2 = EvaluatedAttackConfig(name="autoattack", norm="l2", eps_255=127.5)
    claim, lines, source = written(l2, CIFAR, Measured(0.8, 0.4, 1000, ["the network is random"]))
    assert claim["eps"] == "0.5" and claim["unreliable"] and "the network is random" in claim["footnote"]
    assert lines[1:] == ["RobustBench's figures are of 10,000 images, these of 1,000"]
    assert 'threat_model="L2", eps=0.5)' in source
    claim, lines, _ = written(EvaluatedAttackConfig(name="autoattack", eps_255=4), CIFAR, Measured(0.8, 0.4, 10_000))
    assert lines[1:] == ["RobustBench's Linf table for cifar10 is at 8/255, this at 4/255"]
    claim, lines, source = written(STANDARD, CIFAR._replace(data="mine", classes=["a", "b"]), Measured(0.8, 0.4, 10))
    assert claim["dataset"] == "mine" and "benchmark(" not in source
    assert lines[1:] == ["RobustBench has no table for 'mine': the claim is for no leaderboard of its"]


def test_data_are_known_by_their_classes():
    assert CIFAR.table == "cifar10"
    for name, table in TABLES.items():
        classes = [table.first, *map(str, range(table.classes - 2)), table.last]
        assert CIFAR._replace(classes=classes).table == name
        assert CIFAR._replace(classes=classes[:-1]).table is None
    assert CIFAR._replace(classes=[]).table is None


def test_imagenet_is_asked_for_as_it_was_shown(tmp_path):
    encoder = trained(arch="resnet18", stem="imagenet", width=0.0625)
    classes = ["n01440764", *map(str, range(998)), "n15075141"]
    for settings, expected in (
        ({}, 'eps=4 / 255, preprocessing="Res256Crop224")'),
        ({"size": 256}, "eps=4 / 255, preprocessing=Compose([Resize(293), CenterCrop(256), ToTensor()]))"),
    ):
        shown = Shown("val", classes, AugmentConfig(**settings))
        attack = EvaluatedAttackConfig(name="autoattack", eps_255=4)
        weight, bias = torch.zeros(1000, encoder.backbone.num_features), torch.zeros(1000)
        write_claim(tmp_path, encoder, weight, bias, attack, shown, Measured(0.5, 0.25, 5000))
        assert expected in (tmp_path / "model.py").read_text()


@pytest.mark.parametrize(
    ("attack", "shown", "message"),
    [
        ({"name": "apgd"}, CIFAR, r"this is robust.attack.name=apgd: set robust.attack.name=autoattack"),
        ({"name": "autoattack", "version": "first_two"}, CIFAR, r"this is robust.attack.version=first_two"),
        (
            {"name": "autoattack"},
            CIFAR._replace(augment=AugmentConfig(size=48, eval_crop=1)),
            r"augment.size=48 .* other pixels than the 32 x 32 of RobustBench's cifar10: set augment.size=32",
        ),
    ],
)
def test_what_robustbench_would_not_measure_is_refused(attack, shown, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        check_claim(EvaluatedAttackConfig(**attack), shown)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=message):
        weights = torch.zeros(10, 64), torch.zeros(10)
        write_claim(tmp_path, trained(width=0.125), *weights, EvaluatedAttackConfig(**attack), shown, Measured(1, 1, 1))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    encoder = trained(arch="resnet18", stem="cifar", width=0.0625)
    weight, bias = torch.zeros(10, encoder.backbone.num_features), torch.zeros(10)
    with pytest.raises(UsageError, match="cannot be made"):
        write_claim(tmp_path / "file" / "claim", encoder, weight, bias, STANDARD, CIFAR, Measured(1, 1, 1))
