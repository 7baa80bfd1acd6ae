"""The backbone alone, under torchvision's key names: out of a run, and back in from a run or from anyone's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fasttrain import checkpoint, distributed
from fasttrain.config import Config, resolve
from fasttrain.data.augment import AugmentConfig
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.resnet import recognised
from fasttrain.nonfinite import unusable
from fasttrain.run import replace_file
from fasttrain.weights import encoder_in, read

WEIGHTS, CARD = "encoder.safetensors", "encoder.json"
PREFIX = "encoder.backbone."
"Of the backbone's weights in a checkpoint."
WHAT_IT_IS = ("arch", "stem", "width", "mean", "std")
"Settings of a model that its weights go with, and no others."
HOW_IT_RUNS = ("sync_bn", "checkpoint_activations")
"Settings that any weights run with."
HOW_IT_BEGAN = ("weights", "frozen")
"Settings of a run's model that say what it started from, and what of that it trained."


class ExportConfig(Config):
    """The encoder that a run leaves behind."""

    normaliser: Literal["outside", "inside"] = "outside"
    """outside: weights of a ResNet, which wants normalised pixels; inside: of Sequential(Conv2d(3, 3, 1, groups=3),
    ResNet), whose first convolution normalises pixels in [0, 1]."""


def export(
    encoder: Encoder,
    folder: Path,
    augment: AugmentConfig | None = None,
    normaliser: Literal["outside", "inside"] = "outside",
    **facts: Any,
) -> Path:
    """Write ``encoder.safetensors`` (the backbone, torchvision's keys, no ``fc``) and ``encoder.json`` (what it is).

    With ``model.fc = torch.nn.Identity()`` (and, of a CIFAR stem, ``conv1`` and ``maxpool`` replaced) the weights load
    strictly into torchvision's ResNet, which wants RGB pixels x in [0, 1] as (x - mean) / std, a channel. With
    ``normaliser="inside"`` they load strictly into ``Sequential(Conv2d(3, 3, 1, groups=3), model)``, which wants x.
    (Within ``conv1`` itself it could not be: that pads with zeros *after* the normalisation.) The card says which, and
    the torchvision transforms that show an image as an evaluation by ``augment`` does, to rounding. ``facts`` go into
    the card as they are.

    Raises:
        UsageError: the folder cannot be written.
    """
    weights = {name: tensor for name, tensor in encoder.backbone.state_dict().items() if not name.startswith("fc.")}
    if normaliser == "inside":
        first = {"0.weight": encoder.scale.view(3, 1, 1, 1), "0.bias": encoder.shift.flatten()}
        weights = first | {f"1.{name}": tensor for name, tensor in weights.items()}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    card = {
        "model": encoder.config.model_dump(mode="json"),
        "features": encoder.backbone.num_features,
        "input": describe_input(encoder.config, augment, normaliser),
        **facts,
    }
    try:
        replace_file(folder / CARD, json.dumps(card, indent=1) + "\n")
        replace_file(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    except OSError as error:
        raise UsageError(
            f"the encoder cannot be written to {folder} ({error}): free space and run the same command again"
        ) from None
    return folder / WEIGHTS


def describe_input(model: ModelConfig, augment: AugmentConfig | None, normaliser: str) -> dict[str, Any]:
    """What the exported weights expect, as plain data; ``transforms`` are torchvision's, each with its arguments."""
    mean, std = list(model.mean), list(model.std)
    transforms: list[dict[str, Any]] = [{"name": "ToTensor"}]
    if augment is not None:
        shorter = round(augment.size / augment.eval_crop)
        resize = {"name": "Resize", "size": shorter, "interpolation": "bilinear", "antialias": True}
        transforms = [resize, {"name": "CenterCrop", "size": augment.size}, *transforms]
    if normaliser == "outside":
        transforms.append({"name": "Normalize", "mean": mean, "std": std})
    return {
        "layout": "NCHW, RGB",
        "normaliser": normaliser,
        "expects": "pixels in [0, 1]" if normaliser == "inside" else "(pixels in [0, 1] - mean) / std, a channel",
        "mean": mean,
        "std": std,
        "transforms": transforms,
    }


class Source(NamedTuple):
    """Weights of a backbone, and what is known of it."""

    weights: dict[str, Tensor]  # under torchvision's names, without a classifier
    model: ModelConfig
    notes: list[str]  # what was taken as what, and what was passed over


def load_encoder(source: str, model: ModelConfig | None = None) -> Encoder:
    """An encoder without heads from a run's folder, an exported ``.safetensors``, or anyone's weights of a ResNet.

    What was passed over in a file (heads, copies) is said in a line of rank 0's.

    Args:
        source: a run's folder (its export, or else its newest whole checkpoint), or a file of safetensors or PyTorch,
            with any wrappers and names that :mod:`fasttrain.weights.layouts` knows; files never run code.
        model: what was given of the architecture. It must agree with the card beside the weights, or else with the
            weights themselves; mean and std, which those do not show, are ImageNet's where they are not given.

    Raises:
        UsageError: nothing to load, or weights that do not fit; it names the first key that differs.
    """
    found = read_source(source, model)
    for note in found.notes:
        distributed.say(note)
    head = {"head": HeadConfig(layers=0), "classes": 0, "layer_heads": False}
    encoder = Encoder(found.model.model_copy(update=head))
    encoder.backbone.load_state_dict(found.weights)
    return encoder.eval()


def load_backbone(encoder: Encoder, source: str) -> None:
    """Give ``encoder`` the backbone of :func:`load_encoder`'s ``source``; its heads stay as they are.

    Raises:
        UsageError: as :func:`load_encoder`, and weights of another architecture or for other pixels.
    """
    found = read_source(source, ModelConfig(**encoder.config.model_dump(include=set(WHAT_IT_IS))))
    for note in found.notes:
        distributed.say(note)
    encoder.backbone.load_state_dict(encoder.backbone.state_dict() | found.weights)
    distributed.say(f"the backbone starts from '{source}', the heads from random weights")


def read_source(source: str, given: ModelConfig | None = None) -> Source:
    """What :func:`load_encoder` loads; it says nothing."""
    path = Path(source)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise UsageError(f"'{source}' cannot be read ({error.strerror})") from None
    if not exists:
        raise UsageError(f"no run or weights at '{source}': give a run's folder or a .safetensors file")
    weights, card, notes = _read_run(path) if is_folder else _read_file(path)
    if fault := unusable(weights):
        raise UsageError(f"'{source}' cannot be used: {fault}; take weights from before the run diverged")
    values = given.model_dump(include=given.model_fields_set) if given is not None else {}
    if unused := [name for name in values if name not in WHAT_IT_IS + HOW_IT_RUNS]:
        named = ", ".join(f"model.{name}" for name in unused)
        notes.append(f"WARNING: {named} is given and not used: of '{source}' the backbone alone is taken")
    values = {name: value for name, value in values.items() if name not in unused}
    if card is not None:
        theirs = card.model_dump()
        for name in WHAT_IT_IS:
            if name in values and values[name] != theirs[name]:
                raise UsageError(
                    f"model.{name}={_short(values[name])}, but '{source}' says of itself that it is "
                    f"{_short(theirs[name])}: leave model.{name} out"
                )
        model = card.model_copy(update={name: values[name] for name in HOW_IT_RUNS if name in values})
    else:
        shape = recognised(weights)
        if shape is None and "arch" not in values:
            raise UsageError(f"'{source}' is no ResNet that is known here: say what it is with model.arch=… (--help)")
        model = resolve(ModelConfig, (shape._asdict() if shape is not None else {}) | values)
        assumed = "" if {"mean", "std"} <= values.keys() else ", and pixels normalised by ImageNet's mean and std"
        notes.append(
            f"'{source}' has no {CARD}: taken as model.arch={model.arch} model.stem={model.stem} "
            f"model.width={model.width:g}{assumed}"
        )
    return Source(_fitted(weights, model, source), model, notes)


def _fitted(weights: dict[str, Tensor], model: ModelConfig, source: str) -> dict[str, Tensor]:
    """``weights``, if they are those of ``model``."""
    with torch.device("meta"):
        own = Encoder(model.model_copy(update={"head": HeadConfig(layers=0), "classes": 0})).backbone.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name.endswith("num_batches_tracked") and name not in weights:
            weights = weights | {name: torch.zeros((), dtype=torch.int64)}  # very old torchvision weights lack it
            continue
        ours, theirs = own.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [tuple(x.shape) if x is not None else "absent" for x in (ours, theirs)]
            shape = recognised(weights)
            like = f"; it looks like model.arch={shape.arch} model.stem={shape.stem} model.width={shape.width:g}"
            raise UsageError(
                f"'{source}' does not fit model.arch={model.arch} model.stem={model.stem} model.width={model.width}: "
                f"{name} is {shapes[1]} there and {shapes[0]} here" + (like if shape is not None else "")
            )
    return weights


def _read_run(folder: Path) -> tuple[dict[str, Tensor], ModelConfig | None, list[str]]:
    complaint = None
    if (folder / WEIGHTS).exists():
        try:
            weights, card, notes = _read_file(folder / WEIGHTS)
        except UsageError as error:
            complaint = str(error)
        else:
            if card is not None and not _is_older(folder):
                return weights, card, notes
            complaint = f"'{folder / WEIGHTS}' " + (
                "is older than the newest checkpoint" if card is not None else f"has no {CARD} that can be read"
            )
    found, damaged = checkpoint.find(folder / "checkpoints")
    if found is None:
        files = sorted(x.name for x in folder.iterdir() if x.is_file() and x.suffix in (".pth", ".pt", ".safetensors"))
        what = complaint or f"'{folder}' holds neither {WEIGHTS} nor a checkpoint: is it the folder of a run?"
        raise UsageError(what + (f"; to take a file in it, name it ({folder / files[0]}, say)" if files else ""))
    try:
        tensors = found.tensors(checkpoint.MODEL)
        model = _model_of(found.state["config"]["model"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise UsageError(f"{found.path} is no checkpoint of a run ({type(error).__name__}: {error})") from None
    complaints = [f"{complaint}: the weights of {found.path} are taken instead"] if complaint else []
    notes = [f"WARNING: {line}" for line in complaints + damaged]
    held = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return encoder_in(held, str(found.path)).weights, model, notes


def _is_older(folder: Path) -> bool:
    """Whether a run has gone on since it was exported."""
    step = json.loads((folder / CARD).read_bytes()).get("step")
    return isinstance(step, int) and any(
        path.name > f"step-{step:08d}" for path in (folder / "checkpoints").glob("step-*")
    )


def _read_file(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None, list[str]]:
    found = encoder_in(read(path), str(path))
    card, notes = _read_card(path.with_suffix(".json"))
    if card is None and found.normaliser is not None:
        scale, shift = found.normaliser
        std, mean = (1 / scale).tolist(), (-shift / scale).tolist()
        shape = recognised(found.weights)
        card = resolve(ModelConfig, {**shape._asdict(), "mean": mean, "std": std}) if shape is not None else None
    if found.dropped:
        taken = f"'{found.taken}*' is taken" if found.taken else "its ResNet is taken"
        notes.append(f"of '{path}' {taken}; passed over: {', '.join(found.dropped)}")
    return found.weights, card, notes


def _read_card(path: Path) -> tuple[ModelConfig | None, list[str]]:
    """What a file beside weights says of them where it is one that :func:`export` wrote.

    Raises:
        UsageError: a newer version wrote it, and what it says is not understood.
    """
    if not path.exists():
        return None, []
    try:
        card = json.loads(path.read_bytes())
        model = card["model"]
        ours = model.keys() >= set(WHAT_IT_IS)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        ours = False
    if not ours:
        return None, [f"'{path}' beside the weights is not a card that fasttrain wrote whole, and is passed over"]
    try:
        return _model_of(model), []
    except UsageError as error:
        raise UsageError(
            f"'{path}' is not understood ({error}): use the version that wrote it, or move it away and give what it "
            "says with model.arch=… and so on"
        ) from None


def _model_of(saved: dict[str, Any]) -> ModelConfig:
    """The model of a saved configuration, without how it began."""
    return resolve(ModelConfig, {name: value for name, value in saved.items() if name not in HOW_IT_BEGAN})


def _short(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
