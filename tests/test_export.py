"""What a run leaves behind reads as its card says, by PyTorch alone, and back in as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttrain.config import load, resolve
from fasttrain.data.augment import AugmentConfig, CentreCrop, apply_reference
from fasttrain.errors import UsageError
from fasttrain.export import ExportConfig, export, load_backbone, load_encoder
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from tests.test_launch import script
from tests.test_weights import network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Block(nn.Module):
    """A basic block as torchvision writes it."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        short = [nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)]
        self.downsample = nn.Sequential(*short) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


class Plain(nn.Module):
    """torchvision's ResNet-18, thin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        for stage, (inputs, planes) in enumerate(((4, 4), (4, 8), (8, 16), (16, 32)), start=1):
            blocks = Block(inputs, planes, 1 if stage == 1 else 2), Block(planes, planes, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Normalize(nn.Module):
    """torchvision.transforms.Normalize."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@pytest.mark.parametrize("normaliser", ["outside", "inside"])
def test_the_readmes_snippet_gives_our_features(tmp_path, normaliser):
    ours = network(classes=0, mean=MEAN, std=STD)
    export(ours, tmp_path, AugmentConfig(size=40), normaliser)
    card, model = json.loads((tmp_path / "encoder.json").read_text()), Plain()
    if normaliser == "outside":
        model.load_state_dict(load_file(tmp_path / "encoder.safetensors"))  # strict
        model = nn.Sequential(Normalize(card["input"]["mean"], card["input"]["std"]), model).eval()
    else:
        model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), model)
        model.load_state_dict(load_file(tmp_path / "encoder.safetensors"))  # strict
        model = model.eval()
    images = torch.rand(3, 3, 40, 40)
    with torch.no_grad():
        expected, found = ours(images).features, model(images)
        naive = (model[1] if normaliser == "outside" else model)(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    off = float((naive - expected).norm() / expected.norm())
    assert (off > 1e-3) == (normaliser == "outside")  # what [0, 1] gives where normalised pixels are expected


@pytest.mark.parametrize("normaliser", ["outside", "inside"])
def test_an_export_loads_back_to_the_bit(tmp_path, normaliser):
    ours = network(classes=0, mean=MEAN, std=STD)
    path = export(ours, tmp_path, AugmentConfig(), normaliser, step=7)
    images = torch.rand(2, 3, 32, 32)
    for source in (tmp_path, path):
        loaded = load_encoder(str(source))
        assert torch.equal(loaded(images).features, ours(images).features) and loaded.config.mean == MEAN
    (tmp_path / "encoder.json").unlink()
    if normaliser == "inside":  # it still says what it is
        torch.testing.assert_close(load_encoder(str(path))(images).features, ours(images).features)


@pytest.mark.parametrize(("size", "crop", "shape"), [(40, 0.875, (90, 70)), (32, 1.0, (32, 32)), (32, 1.0, (50, 80))])
def test_the_cards_transforms_show_what_an_evaluation_shows(tmp_path, size, crop, shape):
    config = AugmentConfig(size=size, eval_crop=crop)
    export(network(classes=0, mean=MEAN, std=STD), tmp_path, config)
    (resize, centre, to_tensor, normalize) = json.loads((tmp_path / "encoder.json").read_text())["input"]["transforms"]
    assert [x["name"] for x in (resize, centre, to_tensor)] == ["Resize", "CenterCrop", "ToTensor"]
    assert normalize == {"name": "Normalize", "mean": list(MEAN), "std": list(STD)}
    ramps = np.linspace(0, 255, shape[0])[:, None, None], np.linspace(0, 255, shape[1])[None, :, None]
    pixels = np.concatenate(np.broadcast_arrays(ramps[0], ramps[1], (ramps[0] + ramps[1]) / 2), 2).astype(np.uint8)

    image = Image.fromarray(pixels)  # as torchvision's documentation has it
    scale = resize["size"] / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - centre["size"]) // 2 for side in image.size)
    shown = np.asarray(image.crop((left, top, left + centre["size"], top + centre["size"]))) / 255

    draws = CentreCrop(config).draw(0, np.array([0]), np.array([shape])).take((0, 0))
    assert np.abs(shown - apply_reference(pixels, draws, size)).max() < 0.03  # half a pixel of the ramp


def test_settings_that_contradict_a_card_are_refused_and_those_of_how_it_runs_are_used(tmp_path):
    export(network(classes=0, mean=MEAN, std=STD), tmp_path)
    for given, message in (
        ({"arch": "resnet50"}, r"model.arch=resnet50, but .* it is resnet18: leave model.arch out"),
        ({"stem": "cifar"}, "model.stem=cifar, but .* it is imagenet"),
        ({"width": 2}, "model.width=2.0, but .* it is 0.0625"),
        ({"mean": [0, 0, 0]}, r"model.mean=\[0.0, 0.0, 0.0\], but .* it is \[0.5, 0.4, 0.3\]"),
        ({"std": [1, 1, 1]}, "model.std="),
    ):
        with pytest.raises(UsageError, match=message):
            load_encoder(str(tmp_path), resolve(ModelConfig, given))
    same = {"arch": "resnet18", "width": 0.0625, "mean": MEAN, "std": STD, "sync_bn": False}
    loaded = load_encoder(str(tmp_path), resolve(ModelConfig, same))
    assert not loaded.config.sync_bn and loaded.config.std == STD


def test_a_backbone_starts_from_weights_and_the_heads_stay(tmp_path):
    source = network(classes=0)
    export(source, tmp_path)
    encoder = Encoder(ModelConfig(arch="resnet18", width=0.0625, classes=3, head=HeadConfig(width=8, out=8)))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    load_backbone(encoder, str(tmp_path))
    for name, tensor in encoder.state_dict().items():
        kept = name.startswith("head.") or ".fc." in name
        expected = before[name] if kept else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    for other, key in (({"stem": "cifar"}, "model.stem"), ({"mean": MEAN}, "model.mean")):
        with pytest.raises(UsageError, match=key):
            load_backbone(Encoder(ModelConfig(**{"arch": "resnet18", "width": 0.0625, **other})), str(tmp_path))


def test_pretraining_takes_what_the_weights_say_of_themselves(tmp_path):
    module = script("pretrain")
    export(network(classes=0, mean=MEAN, std=STD), tmp_path)
    torch.save(network().backbone.state_dict(), tmp_path / "x.pth")

    def model_of(*arguments: str) -> ModelConfig:
        return load(module.PretrainConfig, [f"run.dir={tmp_path / 'run'}", *arguments], module.of_weights).model

    found = model_of(f"model.weights={tmp_path}")
    assert (found.arch, found.stem, found.width, found.mean, found.std) == ("resnet18", "imagenet", 0.0625, MEAN, STD)
    assert found.head.width == 128  # the schema's own
    assert model_of(f"model.weights={tmp_path / 'x.pth'}").stem == "imagenet"
    assert model_of().stem == "cifar"
    with pytest.raises(UsageError, match="no run or weights at"):
        model_of("model.weights=/nowhere")


@pytest.fixture
def run_folder(tmp_path) -> Path:
    data = {"root": str(tmp_path / "data"), "share": 0.1, "val": "test"}
    saved = {"data": data, "loader": {"kind": "ffcv"}, "augment": {"size": 16, "eval_crop": 0.5, "flip": 0.3}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(saved))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["eval", "finetune"])
def test_a_runs_settings_hold_for_its_own_data_set_alone(run_folder, name, capsys):
    module = script(name)
    of_eval = name == "eval"
    schema = module.schema_of("knn") if of_eval else module.FinetuneConfig
    base = module.of_run if of_eval else module.of_source
    usual = ["task=knn"] if name == "eval" else [f"run.dir={run_folder}/x"]

    def settings(*arguments: str):
        return load(schema, [*usual, f"source={run_folder}", *arguments], base)

    same = run_folder.parent / "data"
    for found in (settings(), settings(f"data.root={same}/")):
        assert found.data.share == 0.1 and found.data.val == "test" and found.loader.kind == "ffcv"
        assert (found.augment.size, found.augment.eval_crop) == (16, 0.5)
    assert not capsys.readouterr().err
    found = settings("data.root=/other", "data.val=held")
    assert found.data.share == 1 and found.data.val == "held" and found.loader.kind == "auto"
    assert found.augment.size == 16
    said = capsys.readouterr().err
    assert "is another data set than the run's" in said and "data.share=0.1" in said and "loader.kind=ffcv" in said


def test_a_run_that_went_on_after_its_export_gives_its_newest_weights(tmp_path, capsys):
    from fasttrain.checkpoint import files, saver
    from fasttrain.checkpoint.state import Snapshot

    old, new = network(classes=0), network(classes=0)
    with torch.no_grad():
        new.backbone.conv1.weight.add_(1)
    weights = {f"encoder.{name}": tensor for name, tensor in new.state_dict().items()}
    snapshot = Snapshot(weights, {}, {}, {"00000/random.cpu": torch.get_rng_state()}, None)
    config = {"model": new.config.model_dump(mode="json") | {"weights": None}}
    files.write(tmp_path / "checkpoints", 9, saver._contents(9, snapshot, {"config": config}))
    export(old, tmp_path, step=9)
    assert torch.equal(load_encoder(str(tmp_path)).backbone.conv1.weight, old.backbone.conv1.weight)
    export(old, tmp_path, step=6)
    assert torch.equal(load_encoder(str(tmp_path)).backbone.conv1.weight, new.backbone.conv1.weight)
    assert "is older than the newest checkpoint" in capsys.readouterr().err
    (tmp_path / "encoder.json").write_text('{"model": {')  # cut
    assert torch.equal(load_encoder(str(tmp_path)).backbone.conv1.weight, new.backbone.conv1.weight)
    (tmp_path / "encoder.safetensors").write_bytes(b"noise")
    assert torch.equal(load_encoder(str(tmp_path)).backbone.conv1.weight, new.backbone.conv1.weight)


def test_weights_of_a_run_that_diverged_are_named(tmp_path):
    encoder = network(classes=0)
    with torch.no_grad():
        encoder.backbone.layer3[0].conv1.weight[0, 0, 0, 0] = torch.nan
    path = export(encoder, tmp_path)
    with pytest.raises(UsageError, match=r"layer3.0.conv1.weight is not finite \(1 of \d+"):
        load_encoder(str(path))
    with pytest.raises(UsageError, match="not finite"):
        load_encoder(str(tmp_path))


def test_metadata_of_safetensors_is_anyones(tmp_path):
    weights = {k: v.contiguous() for k, v in network().backbone.state_dict().items()}
    save_file(weights, tmp_path / "x.safetensors", metadata={"format": "np", "model": "{"})
    assert load_encoder(str(tmp_path / "x.safetensors")).config.arch == "resnet18"
    assert ExportConfig().normaliser == "outside"
