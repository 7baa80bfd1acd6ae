"""The backbone alone, under torchvision's key names: out of a run, and back in from a run or from anyone's weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fasttrain import checkpoint
from fasttrain.config import resolve
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.run import replace_file

WEIGHTS, CARD = "encoder.safetensors", "encoder.json"


def export(encoder: Encoder, folder: Path, **facts: Any) -> Path:
    """Write ``encoder.safetensors`` (the backbone, torchvision's keys, no ``fc``) and ``encoder.json`` (what it is).

    With ``model.fc = torch.nn.Identity()`` (and, of a CIFAR stem, ``conv1`` and ``maxpool`` replaced) the weights load
    strictly into torchvision's ResNet. ``facts`` go into the card as they are.

    Raises:
        UsageError: the folder cannot be written.
    """
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in encoder.backbone.state_dict().items()
        if not name.startswith("fc.")
    }
    card = {"model": encoder.config.model_dump(mode="json"), "features": encoder.backbone.num_features, **facts}
    try:
        replace_file(folder / CARD, json.dumps(card, indent=1) + "\n")
        replace_file(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    except OSError as error:
        raise UsageError(
            f"the encoder cannot be written to {folder} ({error}): free space and run the same command again"
        ) from None
    return folder / WEIGHTS


def load_encoder(source: str, model: ModelConfig | None = None) -> Encoder:
    """An encoder without heads from a run's folder, an exported ``.safetensors``, or torchvision-named weights.

    Args:
        source: a run's folder (its export, or else its newest whole checkpoint), or a ``.safetensors``, ``.pth`` or
            ``.pt`` file; the last two are read as plain tensors only and never run code.
        model: the architecture, needed where no ``encoder.json`` lies beside the weights.

    Raises:
        UsageError: nothing to load, or weights that do not fit the architecture; it names the first key that differs.
    """
    path = Path(source)
    if not path.exists():
        raise UsageError(f"no run or weights at '{source}': give a run's folder or a .safetensors file")
    weights, found = _read_run(path) if path.is_dir() else _read_file(path)
    model = found or model
    if model is None:
        raise UsageError(
            f"'{source}' has no {CARD} beside it: say what it is with model.arch=… (and model.stem, model.width)"
        )
    encoder = Encoder(model.model_copy(update={"head": HeadConfig(layers=0), "classes": 0}))
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    own = encoder.backbone.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name.endswith("num_batches_tracked") and name not in weights:
            weights[name] = own[name]  # very old torchvision weights lack it
            continue
        ours, theirs = own.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [tuple(x.shape) if x is not None else "absent" for x in (ours, theirs)]
            raise UsageError(
                f"'{source}' does not fit model.arch={model.arch} model.stem={model.stem} model.width={model.width}: "
                f"{name} is {shapes[1]} there and {shapes[0]} here"
            )
    encoder.backbone.load_state_dict(weights)
    return encoder.eval()


def _read_run(folder: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    if (folder / WEIGHTS).exists():
        weights, model = _read_file(folder / WEIGHTS)
        if model is not None:
            return weights, model
    found, _ = checkpoint.find(folder / "checkpoints")
    if found is None:
        raise UsageError(f"'{folder}' holds neither {WEIGHTS} nor a checkpoint: is it the folder of a run?")
    prefix = "encoder.backbone."
    weights = found.tensors(checkpoint.MODEL)
    model = resolve(ModelConfig, found.state["config"]["model"])
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}, model


def _read_file(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    try:
        is_plain = path.suffix == ".safetensors"  # load_file would refuse a name that is not UTF-8
        weights = load(path.read_bytes()) if is_plain else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UsageError(f"'{path}' cannot be read as weights: {' '.join(str(error).split())[:200]}") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    card = path.with_suffix(".json")
    model = resolve(ModelConfig, json.loads(card.read_text())["model"]) if card.exists() else None
    return weights, model
