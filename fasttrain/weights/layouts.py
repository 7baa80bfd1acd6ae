"""Where among the keys of a file a ResNet is, and how each of its keys is called by torchvision.

An encoder is found by the key of its first block's first convolution, under any of :data:`NAMINGS`; what stands before
that is its prefix. All beneath the prefix must be the ResNet's, or a head's by :data:`HEADS`; all beside it in the same
state dict a head's or a copy's of the encoder. Whatever else there is, is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.errors import UsageError
from fasttrain.weights.files import Inert

KNOWN = (
    "known are ResNets under the names of torchvision and timm, alone or as MoCo, SimSiam, BYOL, SwAV, DINO, VICReg, "
    "Barlow Twins, SupContrast, solo-learn, lightly, VISSL, OpenMMLab, Lightning and converted SimCLR weights hold "
    "them, and of HuggingFace"
)

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"What DistributedDataParallel, torch.compile and others put between the names of a module and its parts."

HEADS = re.compile(
    r"(\w+_)?(fc|fc\d+|linear|heads?|neck|mlp|classifiers?|projectors?|projections?|proj|predictors?|predictions?|pred"
    r"|prototypes?|queues?|ptr|center|criterion|loss|loss_fn|metrics?|evaluator|acc\w*)(_\w+|\d+)?|bn|g|l[12]"
)
"Parts of a model that are no part of its encoder: the first word of a key beneath the encoder's prefix or beside it."

COPIES = {"momentum", "k", "key", "target", "student", "prepare"}
"""Words in the names of encoders of which the file holds a better one: momentum copies, the student of a teacher, and
what our own fine-tuning compares with."""
BEST = {"teacher", "ema"}
"Words in the names of encoders that their own evaluations take: DINO's teacher, and timm's averages."


class Naming(NamedTuple):
    """Names of a ResNet's parts."""

    first: str  # of the first block's first convolution
    to_torchvision: dict[str, str]  # pattern -> replacement, in turn


def _in_order(*positions: int) -> Naming:
    """The parts of an ``nn.Sequential`` of torchvision's children, stem, BatchNorm and four stages at ``positions``."""
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    names = {rf"^{at}\.": f"{part}." for at, part in zip(positions, parts, strict=True)}
    return Naming(f"{positions[2]}.0.conv1.weight", {"^(?=\\d)": "#"} | {f"^#{k[1:]}": v for k, v in names.items()})


NAMINGS = (
    Naming("layer1.0.conv1.weight", {}),
    _in_order(0, 1, 2, 3, 4, 5),  # of a ResNet whose ReLU is a function
    _in_order(0, 1, 3, 4, 5, 6),  # without the max-pool
    _in_order(0, 1, 4, 5, 6, 7),  # all children: lightly
    Naming(
        "encoder.stages.0.layers.0.layer.0.convolution.weight",  # HuggingFace
        {
            r"^embedder\.embedder\.convolution\.": "conv1.",
            r"^embedder\.embedder\.normalization\.": "bn1.",
            **{rf"^encoder\.stages\.{i}\.layers\.": f"layer{i + 1}." for i in range(4)},
            r"\.shortcut\.convolution\.": ".downsample.0.",
            r"\.shortcut\.normalization\.": ".downsample.1.",
            **{rf"\.layer\.{i}\.convolution\.": f".conv{i + 1}." for i in range(3)},
            **{rf"\.layer\.{i}\.normalization\.": f".bn{i + 1}." for i in range(3)},
        },
    ),
)
SHORTCUT = re.compile(r"^(layer\d\.\d+)\.shortcut\.")
"CIFAR ResNets call downsample so: kuangliu's, and SupContrast after it."
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PART = re.compile(r"(conv1|bn1|layer[1-4])\.")


class Found(NamedTuple):
    """A ResNet's weights and what a person should know of them."""

    weights: dict[str, Tensor]  # float32, under torchvision's names, without heads
    taken: str  # the encoder's prefix in the file; "" where there is none
    dropped: list[str]  # what else was there
    normaliser: tuple[Tensor, Tensor] | None = None  # 1 / std and -mean / std, where the file holds it


class _Candidate(NamedTuple):
    place: str  # of its state dict among the file's mappings
    tensors: dict[str, Any]
    prefix: str
    naming: Naming

    @property
    def name(self) -> str:
        return f"{self.place}{self.prefix}"

    @property
    def words(self) -> set[str]:
        return set(re.split(r"[._]", self.name))


def encoder_in(content: Any, source: str) -> Found:
    """The one encoder in what a file holds.

    Of an encoder and its momentum copy (``encoder_k``, ``momentum_encoder``, ``target``) the encoder is taken, of a
    student and its teacher the teacher, of weights and their moving average (``ema``) the average.

    Raises:
        UsageError: there is none, or more than one, or something beside it that no known layout has.
    """
    candidates = list(_candidates(content))
    if not candidates:
        raise UsageError(f"'{source}' holds no ResNet: it is {_described(content)}; {KNOWN}")
    best = max(_merit(candidate) for candidate in candidates)
    chosen, *equals = (candidate for candidate in candidates if _merit(candidate) == best)
    for other in equals:
        if not _same(chosen, other):
            raise UsageError(
                f"'{source}' holds two encoders, '{chosen.name}' and '{other.name}', and nothing says which is meant: "
                "save the state_dict of one"
            )
    return _taken(chosen, candidates, source)


def _candidates(content: Any) -> Iterator[_Candidate]:
    for place, mapping in _mappings(content):
        tensors = {WRAPPERS.sub("", key): value for key, value in mapping.items()}
        known: dict[str, Naming] = {}
        for naming in NAMINGS:
            for key in tensors:
                if key == naming.first or key.endswith("." + naming.first):
                    known.setdefault(key[: -len(naming.first)], naming)
        yield from (_Candidate(place, tensors, prefix, naming) for prefix, naming in known.items())


def _mappings(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in ``content`` with its dotted place ("" or "state_dict."), its keys as texts."""
    if isinstance(content, dict) and depth < 8:
        yield place, {str(key): value for key, value in content.items()}
        for key, value in content.items():
            yield from _mappings(value, f"{place}{key}.", depth + 1)


def _merit(candidate: _Candidate) -> int:
    return len(candidate.words & BEST) - len(candidate.words & COPIES)


def _same(one: _Candidate, other: _Candidate) -> bool:
    """Whether both are one encoder under two names."""
    ours, theirs = ({k: v for k, v in _part(x).items() if isinstance(v, Tensor)} for x in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _part(candidate: _Candidate) -> dict[str, Any]:
    """What is beneath its prefix, under torchvision's names."""
    return {
        _renamed(key[len(candidate.prefix) :], candidate.naming): value
        for key, value in candidate.tensors.items()
        if key.startswith(candidate.prefix)
    }


def _renamed(key: str, naming: Naming) -> str:
    for pattern, replacement in naming.to_torchvision.items():
        key = re.sub(pattern, replacement, key)
    return SHORTCUT.sub(r"\1.downsample.", key)


def _taken(chosen: _Candidate, candidates: list[_Candidate], source: str) -> Found:
    beneath = _part(chosen)
    scale, shift = (chosen.tensors.get(f"{chosen.prefix[:-2]}0.{name}") for name in ("weight", "bias"))
    inside = chosen.prefix.endswith("1.") and all(isinstance(x, Tensor) and x.numel() == 3 for x in (scale, shift))
    others = [c for c in candidates if c is not chosen]
    dropped = dict.fromkeys(c.name for c in others if c.tensors is not chosen.tensors)
    weights = {}
    for name, value in beneath.items():
        if PART.match(name):
            weights[name] = _float32(value, name, source)
        elif isinstance(value, Tensor):
            dropped[_head(name, name, source)] = None
    for key, value in chosen.tensors.items():
        if not isinstance(value, Tensor) or key.startswith(chosen.prefix):
            continue
        copy = next((c for c in others if c.tensors is chosen.tensors and key.startswith(c.prefix)), None)
        if copy is not None:
            dropped[copy.prefix] = None
        elif not (inside and key.startswith(f"{chosen.prefix[:-2]}0.")):
            ways = (c.prefix for c in candidates if c.tensors is chosen.tensors)
            dropped[_head(min((_beside(key, way) for way in ways), key=len), key, source)] = None
    return Found(weights, chosen.name, list(dropped), (scale.flatten(), shift) if inside else None)


def _beside(key: str, prefix: str) -> str:
    """``key`` from where it leaves the way to the encoder."""
    words, way = key.split("."), prefix.split(".")
    while len(words) > 1 and way and words[0] == way[0]:
        words, way = words[1:], way[1:]
    return ".".join(words)


def _head(name: str, key: str, source: str) -> str:
    """The first word of a head's key, which may be dropped."""
    word = name.split(".")[0]
    if not HEADS.fullmatch(word) and word not in COPIES and not set(word.split("_")) & COPIES:
        raise UsageError(f"'{source}' does not hold a ResNet alone: nothing is known of its key '{key}'; {KNOWN}")
    return word


def _float32(value: Any, name: str, source: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(f"'{source}': {name} is {_described(value)}, not a tensor")
    if name.endswith("num_batches_tracked"):
        return value.to(torch.int64)
    if value.layout != torch.strided or value.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise UsageError(f"'{source}': {name} is of {value.dtype}: weights are 16, 32 or 64-bit floating point numbers")
    return value.to(torch.float32)


def _described(content: Any) -> str:
    """What it is, for a person."""
    if isinstance(content, Inert):
        whole = f"{type(content).__module__}.{type(content).__name__}"
        return f"a whole pickled object ({whole}), which is code: save its state_dict() instead"
    if isinstance(content, Tensor):
        return f"one tensor {tuple(content.shape)}"
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    whole = [f"'{key}' is {_described(value)}" for key, value in content.items() if isinstance(value, Inert)]
    tensors = [key for _, mapping in _mappings(content) for key, v in mapping.items() if isinstance(v, Tensor)]
    if {"state", "param_groups"} <= content.keys():
        return "the state of an optimiser, without weights"
    if not tensors:
        keys = ", ".join(f"'{key}'" for key in list(content)[:4])
        what = f"whose {whole[0]}" if whole else f"of {keys}, without tensors"
        return f"a mapping {what}" if content else "an empty mapping"
    return f"{len(tensors)} tensors named " + ", ".join(f"'{key}'" for key in tensors[:3]) + ", …"


__all__ = ["KNOWN", "Found", "encoder_in"]
