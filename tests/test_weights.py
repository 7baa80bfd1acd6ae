"""Anyone's weights: the layouts of others load to the bit, and every other file is refused for what it is."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttrain.config import resolve
from fasttrain.errors import UsageError
from fasttrain.export import export, load_encoder
from fasttrain.models import Encoder, HeadConfig, ModelConfig, ResNet
from fasttrain.models.resnet import recognised

Weights = dict[str, Tensor]
THIN = {"arch": "resnet18", "width": 0.0625}


def network(classes: int = 10, **shape) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(**{**THIN, **shape}, head=HeadConfig(layers=0), classes=classes)).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.1, 0.5)
    return encoder


@pytest.fixture(scope="module")
def whole() -> Weights:
    """torchvision's state dict of a thin ResNet-18, classifier included."""
    return {name: tensor.clone() for name, tensor in network().backbone.state_dict().items()}


def bare(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    out = {}
    for name, tensor in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def sequential(weights: Weights, **places: int) -> Weights:
    return {f"{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": tensor for name, tensor in weights.items()}


def other(weights: Weights) -> Weights:
    """A copy that is not the encoder: loading it would be seen."""
    return {name: tensor + 1 for name, tensor in weights.items()}


ALL = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
NO_POOL = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
FUNCTIONAL = {"conv1": 0, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
SOME = torch.zeros(2, 2)


def huggingface(weights: Weights) -> Weights:
    out = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
        if parts[0] in ("conv1", "bn1"):
            new = f"resnet.embedder.embedder.{kinds[parts[0][:-1]]}.{parts[1]}"
        else:
            stage, block, what = int(parts[0][-1]) - 1, parts[1], parts[2]
            inner = f"shortcut.{kinds[parts[3]]}" if what == "downsample" else f"layer.{int(what[-1]) - 1}."
            inner += "" if what == "downsample" else kinds[what[:-1]]
            new = f"resnet.encoder.stages.{stage}.layers.{block}.{inner}.{parts[-1]}"
        out[new] = tensor
    return out


LAYOUTS = {
    "torchvision": lambda w: w,
    "without a classifier": bare,
    "of another number of classes": lambda w: bare(w) | {"fc.weight": SOME, "fc.bias": torch.zeros(2)},
    "an ordered dict with metadata": lambda w: nn.Module.state_dict(network().backbone),
    "the ImageNet example": lambda w: {"epoch": 90, "arch": "resnet18", "state_dict": under("module.", w)},
    "model, DeiT and torchvision's references": lambda w: {"model": w, "optimizer": {"state": {0: {"m": SOME}}}},
    "timm's average": lambda w: {"state_dict": other(w), "state_dict_ema": w},
    "torch.compile": lambda w: {"model": under("_orig_mod.", w)},
    "torch.compile under DDP": lambda w: under("module._orig_mod.", w),
    "MoCo v2": lambda w: {
        "state_dict": under("module.encoder_q.", bare(w))
        | under("module.encoder_q.fc.", {"0.weight": SOME, "2.weight": SOME})
        | under("module.encoder_k.", other(bare(w)))
        | {"module.queue": SOME, "module.queue_ptr": torch.zeros(1)}
    },
    "MoCo v3": lambda w: {
        "state_dict": under("module.base_encoder.", bare(w))
        | under("module.momentum_encoder.", other(bare(w)))
        | {"module.predictor.0.weight": SOME, "module.base_encoder.fc.0.weight": SOME}
    },
    "SimSiam": lambda w: {
        "state_dict": under("module.encoder.", bare(w))
        | {"module.encoder.fc.6.weight": SOME, "module.predictor.0.weight": SOME}
    },
    "SupContrast": lambda w: {
        "opt": argparse.Namespace(model="resnet18"),
        "model": renamed(under("encoder.module.", bare(w)), ("downsample", "shortcut")) | {"head.0.weight": SOME},
        "epoch": 1000,
    },
    "kuangliu": lambda w: renamed(w, ("downsample", "shortcut"), ("fc.", "linear.")),
    "solo-learn": lambda w: {
        "state_dict": under("backbone.", bare(w))
        | under("momentum_backbone.", other(bare(w)))
        | {"projector.0.weight": SOME, "momentum_projector.0.weight": SOME, "classifier.weight": SOME, "queue": SOME}
    },
    "solo-learn of old": lambda w: {
        "state_dict": under("encoder.", bare(w)) | under("momentum_encoder.", other(bare(w))) | {"prototypes.w": SOME}
    },
    "lightly": lambda w: {
        "state_dict": under("backbone.", sequential(bare(w), **ALL)) | {"projection_head.layers.0.weight": SOME}
    },
    "lightly's MoCo": lambda w: {
        "state_dict": under("backbone.", sequential(bare(w), **ALL))
        | under("backbone_momentum.", sequential(other(bare(w)), **ALL))
        | {"projection_head_momentum.layers.0.weight": SOME}
    },
    "a Sequential without the max-pool": lambda w: under("f.", sequential(bare(w), **NO_POOL)) | {"g.0.weight": SOME},
    "a Sequential of a functional ReLU": lambda w: {
        "model": renamed(sequential(bare(w), **FUNCTIONAL), ("downsample", "shortcut"))
    },
    "converted SimCLR": lambda w: {"resnet": w, "head": {"fc1.weight": SOME}},
    "VISSL": lambda w: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", bare(w)), "heads": {"0.clf.weight": SOME}}}
        }
    },
    "SwAV": lambda w: under("module.", bare(w)) | {"module.projection_head.0.weight": SOME, "prototypes.weight": SOME},
    "DINO": lambda w: {
        "student": under("module.backbone.", other(bare(w))) | {"module.head.mlp.0.weight": SOME},
        "teacher": under("backbone.", bare(w)) | {"head.mlp.0.weight": SOME},
        "dino_loss": {"center": SOME},
    },
    "Barlow Twins": lambda w: {
        "model": under("module.backbone.", bare(w))
        | {"module.projector.0.weight": SOME, "module.bn.running_mean": SOME}
    },
    "BYOL by lucidrains": lambda w: (
        under("net.", w)
        | under("online_encoder.net.", w)
        | under("target_encoder.net.", other(w))
        | {"online_encoder.projector.0.weight": SOME, "online_predictor.0.weight": SOME}
    ),
    "OpenMMLab": lambda w: {"meta": {}, "state_dict": under("backbone.", bare(w)) | {"neck.fc0.weight": SOME}},
    "HuggingFace": lambda w: huggingface(bare(w)) | {"classifier.1.weight": SOME},
    "our own checkpoints": lambda w: (
        under("encoder.backbone.", w)
        | {"encoder.head.0.weight": SOME, "encoder.layer_heads.0.head.0.weight": SOME}
        | under("prepare.encoder.backbone.", other(w))
    ),
    "numbers and settings": lambda w: {
        "state_dict": w,
        "best": np.float64(1),
        "type": np.dtype("f4"),
        "where": Path("x"),
    },
    "in half precision": lambda w: {k: v.half().float() if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_others_load_to_the_bit(whole, tmp_path, layout):
    content = LAYOUTS[layout](whole)
    torch.save(content, tmp_path / "x.ckpt")
    loaded = load_encoder(str(tmp_path / "x.ckpt"), ModelConfig(**THIN)).backbone.state_dict()
    half = layout == "in half precision"
    assert all(torch.equal(loaded[k], v.half().float() if half else v) for k, v in bare(whole).items())
    assert loaded.keys() == bare(whole).keys()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.torch", "x.pth.tar", "x", "x.safetensors"])
def test_the_ending_decides_nothing(whole, tmp_path, name):
    path = str(tmp_path / name)
    for write in (
        lambda: torch.save(whole, path),
        lambda: torch.save(whole, path, _use_new_zipfile_serialization=False),
        lambda: save_file(whole, path, metadata={"format": "tf", "of": "someone"}),
    ):
        write()
        assert torch.equal(load_encoder(path, ModelConfig(**THIN)).backbone.conv1.weight, whole["conv1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(whole, tmp_path, dtype):
    torch.save({k: v.to(dtype) for k, v in whole.items()}, tmp_path / "x.pth")
    loaded = load_encoder(str(tmp_path / "x.pth")).backbone.state_dict()
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(loaded["conv1.weight"], whole["conv1.weight"].to(dtype).float())


def test_what_was_passed_over_is_said(whole, tmp_path, capsys):
    for layout, said in (
        ("MoCo v2", "'state_dict.encoder_q.*' is taken; passed over: fc, encoder_k., queue, queue_ptr"),
        ("DINO", "'teacher.backbone.*' is taken; passed over: student.backbone., head"),
        ("timm's average", "'state_dict_ema.*' is taken; passed over: state_dict., fc"),
    ):
        torch.save(LAYOUTS[layout](whole), tmp_path / "x.pth")
        load_encoder(str(tmp_path / "x.pth"))
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["resnet12", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize(("stem", "width"), [("imagenet", 1.0), ("cifar", 0.125), ("imagenet", 2.0)])
def test_the_architecture_is_told_from_the_weights(arch, stem, width):
    stem = "none" if arch == "resnet12" else stem
    with torch.device("meta"):
        weights = ResNet(arch, stem, width=width).state_dict()
    assert recognised(weights) == (arch, stem, width)


def test_weights_that_are_told_apart_need_no_model_and_contradict_a_wrong_one(whole, tmp_path, capsys):
    path = str(tmp_path / "x.pth")
    torch.save(whole, path)
    loaded = load_encoder(path, resolve(ModelConfig, {"mean": [0.5, 0.4, 0.3]}))
    assert loaded.config.arch == "resnet18" and loaded.config.mean == (0.5, 0.4, 0.3)
    assert "ImageNet's mean and std" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"does not fit model.arch=resnet50 .* it looks like model.arch=resnet18"):
        load_encoder(path, ModelConfig(arch="resnet50"))
    load_encoder(path, resolve(ModelConfig, {"classes": 10, "sync_bn": False}))
    assert "model.classes is given and not used" in capsys.readouterr().err


def fake(module: str, name: str, *bases: type, **members) -> type:
    """A class of a library that is not there when the file is read."""
    made = type(name, bases or (object,), {"__module__": module, **members})
    package = types.ModuleType(module)
    setattr(package, name, made)
    sys.modules[module] = package
    return made


def test_objects_of_unknown_classes_beside_weights_do_no_harm(whole, tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    settings = fake("lightning_of_old", "AttributeDict", dict)(lr=0.1)
    node = fake("omega_nodes", "Node")()
    node.value = settings
    found = collections.defaultdict(list, {"a": [1]})
    content = {"state_dict": whole, "hyper_parameters": settings, "node": node, "found": found, "bomb": Bomb()}
    for new in (True, False):
        torch.save(content, tmp_path / f"{new}.ckpt", _use_new_zipfile_serialization=new)
    for module in ("lightning_of_old", "omega_nodes"):
        del sys.modules[module]
    allowed = set(torch.serialization.get_safe_globals())
    for new in (True, False):
        loaded = load_encoder(str(tmp_path / f"{new}.ckpt"))
        assert torch.equal(loaded.backbone.conv1.weight, whole["conv1.weight"])
    assert not (tmp_path / "ran").exists() and set(torch.serialization.get_safe_globals()) == allowed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def write_zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


class System:
    def __reduce__(self):
        return os.system, ("true",)


REFUSED = {
    "a list": (lambda p, w: torch.save([w], p), "it is a list; known are"),
    "a text": (lambda p, w: torch.save("weights", p), "it is a str"),
    "a tensor": (lambda p, w: torch.save(SOME, p), r"it is one tensor \(2, 2\)"),
    "an empty mapping": (lambda p, w: torch.save({}, p), "it is an empty mapping"),
    "no tensors": (lambda p, w: torch.save({"epoch": 3}, p), "of 'epoch', without tensors"),
    "a module": (lambda p, w: torch.save(network().backbone, p), r"pickled object \(fasttrain.*ResNet\).*state_dict"),
    "a module in a mapping": (lambda p, w: torch.save({"model": nn.ReLU()}, p), "'model' is a whole pickled object"),
    "an optimiser": (
        lambda p, w: torch.save(torch.optim.SGD([nn.Parameter(SOME)], 1.0).state_dict(), p),
        "state of an optimiser, without weights",
    ),
    "another network": (lambda p, w: torch.save(nn.Linear(2, 2).state_dict(), p), "2 tensors named 'weight', 'bias'"),
    "TorchScript": (lambda p, w: torch.jit.script(nn.ReLU()).save(str(p)), "a TorchScript program"),
    "npy": (lambda p, w: np.save(p.open("wb"), np.zeros(3)), "an array of NumPy's"),
    "npz": (lambda p, w: np.savez(p.open("wb"), a=np.zeros(3)), r"arrays of NumPy's \(.npz\)"),
    "HDF5": (lambda p, w: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5, as of Keras"),
    "Keras": (lambda p, w: write_zip(p, "config.json", "model.weights.h5"), "a model of Keras"),
    "ONNX": (lambda p, w: p.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x032.1" + bytes(99)), "as of ONNX"),
    "a zip": (lambda p, w: write_zip(p, "resnet50.pth"), "an archive: unpack it"),
    "a gzip": (lambda p, w: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "an archive: unpack it"),
    "a tar": (lambda p, w: p.write_bytes(bytes(257) + b"ustar" + bytes(300)), "an archive: unpack it"),
    "Git LFS": (
        lambda p, w: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "git lfs pull",
    ),
    "a web page": (lambda p, w: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "a web page"),
    "text": (lambda p, w: p.write_text('{"not": "weights"}'), "text "),
    "nothing": (lambda p, w: p.write_bytes(b""), r"empty \(0 bytes\)"),
    "noise": (lambda p, w: p.write_bytes(bytes(range(130, 256)) * 9), "of no known format"),
    "a pickle": (lambda p, w: p.write_bytes(pickle.dumps({"a": 1}, 2)), "a pickle of Python's own"),
    "a cut file": (lambda p, w: (torch.save(w, p), cut(p)), "cut short or damaged"),
    "a cut file of old": (
        lambda p, w: (torch.save(w, p, _use_new_zipfile_serialization=False), cut(p)),
        "damaged or cut short",
    ),
    "a cut .safetensors": (lambda p, w: (save_file(w, p), cut(p)), "damaged or cut short"),
    "one call of the system's": (lambda p, w: torch.save({"model": w, "x": System()}, p), r"holds (posix|os).system"),
    "arrays": (
        lambda p, w: torch.save({k: v.numpy() for k, v in w.items()}, p),
        "conv1.weight is a whole pickled object .*not a tensor",
    ),
    "NaN": (
        lambda p, w: torch.save(w | {"layer2.0.bn1.weight": w["layer2.0.bn1.weight"] / 0}, p),
        "layer2.0.bn1.weight is not finite",
    ),
    "integers": (
        lambda p, w: torch.save(w | {"conv1.weight": w["conv1.weight"].char()}, p),
        "conv1.weight is of torch.int8",
    ),
    "a key too many": (
        lambda p, w: torch.save(w | {"layer1.0.se.weight": SOME}, p),
        r"layer1.0.se.weight is \(2, 2\) there and absent here",
    ),
    "a part that nothing is known of": (
        lambda p, w: torch.save(under("backbone.", bare(w)) | {"rpn.conv.weight": SOME}, p),
        "nothing is known of its key 'rpn.conv.weight'",
    ),
    "a key missing": (
        lambda p, w: torch.save({k: v for k, v in w.items() if k != "bn1.bias"}, p),
        r"bn1.bias is absent there and \(4,\) here",
    ),
    "a deep stem": (
        lambda p, w: torch.save(renamed(w, ("conv1.weight", "conv1.0.weight")), p),
        "nothing|no ResNet|conv1.0.weight",
    ),
    "two encoders": (
        lambda p, w: torch.save(under("left.", bare(w)) | under("right.", other(bare(w))), p),
        "two encoders, 'left.' and 'right.'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_refused_for_what_it_is(whole, tmp_path, case):
    write, message = REFUSED[case]
    path = tmp_path / "weights.pth"
    write(path, whole)
    with pytest.raises(UsageError, match=message) as caught:
        load_encoder(str(path), ModelConfig(**THIN))
    said = str(caught.value)
    assert "\n" not in said and "weights_only" not in said and "safe_globals" not in said and "weights.pth" in said


def test_places_without_weights_are_refused_for_what_they_are(whole, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    torch.save(whole, tmp_path / "folder/model.pth")
    for name, message in (
        ("pipe", "neither a file nor a folder"),
        ("folder", r"is it the folder of a run\?; to take a file in it, name it \(.*folder/model.pth, say\)"),
        ("nowhere", "no run or weights at"),
        ("folder/model.pth/x", "no run or weights at"),
    ):
        with pytest.raises(UsageError, match=message):
            load_encoder(str(tmp_path / name))


CARDS = {
    "someone else's": json.dumps({"architecture": "resnet18", "num_classes": 10}),
    "another someone's": json.dumps({"model": "resnet18"}),
    "a third one's": json.dumps({"model": {"arch": "resnet18", "num_classes": 10}}),
    "a list": "[1, 2]",
    "a number": "5",
    "broken": '{"model": {"arch": "resn',
    "empty": "",
    "noise": bytes(range(256)),
    "deep": "[" * 100000,
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_is_not_ours_is_passed_over_with_a_line(whole, tmp_path, card, capsys):
    torch.save(whole, tmp_path / "hub.pth")
    content = CARDS[card]
    (tmp_path / "hub.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load_encoder(str(tmp_path / "hub.pth")).config.arch == "resnet18"
    assert "hub.json' beside the weights is not a card" in capsys.readouterr().err


def test_a_card_of_a_newer_version_is_refused(tmp_path):
    export(network(classes=0), tmp_path)
    card = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps({**card, "a new fact": 1}))
    load_encoder(str(tmp_path))
    card["model"]["activation"] = "silu"
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match=r"unknown key 'activation'.*use the version that wrote it"):
        load_encoder(str(tmp_path))


def test_a_folder_that_is_a_mess_is_no_traceback(whole, tmp_path):
    (tmp_path / "encoder.safetensors").mkdir()
    (tmp_path / "encoder.json").mkdir()
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        load_encoder(str(tmp_path))
