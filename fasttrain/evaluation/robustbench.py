"""What RobustBench takes of a model: its claim as JSON, and the model itself as Python and weights.

::

    <folder>/
      claim.json    what a file of its model_info says
      model.py      load() -> images in [0, 1] to logits, by torch alone
      model.pt      the weights, under torchvision's names

``robustbench.benchmark(load(), …)`` measures the claim anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

import fasttrain
from fasttrain.data.augment import AugmentConfig
from fasttrain.errors import UsageError
from fasttrain.evaluation.autoattack import EvaluatedAttackConfig
from fasttrain.models import Encoder, ModelConfig
from fasttrain.output import write_output
from fasttrain.printable import printable

MODULE = "model"
ELSEWHERE = "choose another place with output=…"
THREATS = {"linf": "Linf", "l2": "L2"}
YOURS = ("link", "name", "authors", "venue", "reported", "additional_data")
"What of a claim only its authors know."


class Table(NamedTuple):
    """A data set that RobustBench has tables for."""

    classes: int
    first: str  # class
    last: str
    images: int  # that its figures are of
    radii: dict[str, str]  # norm -> eps


TABLES = {
    "cifar10": Table(10, "airplane", "truck", 10_000, {"linf": "8/255", "l2": "0.5"}),
    "cifar100": Table(100, "apple", "worm", 10_000, {"linf": "8/255"}),
    "imagenet": Table(1000, "n01440764", "n15075141", 5_000, {"linf": "4/255"}),
}


class Measured(NamedTuple):
    """What was found, of how many images; shares in [0, 1]."""

    clean: float
    autoattack: float
    images: int
    doubts: Sequence[str] = ()  # what makes it unreliable


class Shown(NamedTuple):
    """Of what it was found."""

    data: str  # what to call the data
    classes: Sequence[str]  # in the order of the labels
    augment: AugmentConfig

    @property
    def table(self) -> str | None:
        """The data set of RobustBench's that this is."""
        ends = (len(self.classes), *self.classes[:1], *self.classes[-1:])
        return next((name for name, table in TABLES.items() if table[:3] == ends), None)

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side, of which the central square is shown."""
        return round(self.augment.size / self.augment.eval_crop)


def check_claim(attack: EvaluatedAttackConfig, shown: Shown) -> None:
    """See, before the hours that it takes, that RobustBench can measure the same.

    Raises:
        UsageError: another attack than the standard AutoAttack, or images of another size than RobustBench's.
    """
    if (attack.name, attack.version) != ("autoattack", "standard"):
        what = f"version={attack.version}" if attack.name == "autoattack" else f"name={attack.name}"
        raise UsageError(
            f"format=robustbench claims what the standard AutoAttack leaves, and this is robust.attack.{what}: set "
            "robust.attack.name=autoattack robust.attack.version=standard"
        )
    if shown.table in ("cifar10", "cifar100") and (shown.augment.size, shown.shorter) != (32, 32):
        raise UsageError(
            f"augment.size={shown.augment.size} augment.eval_crop={shown.augment.eval_crop:g} shows and attacks other "
            f"pixels than the 32 x 32 of RobustBench's {shown.table}: set augment.size=32 augment.eval_crop=1"
        )


def write_claim(
    folder: Path,
    encoder: Encoder,
    weight: Tensor,
    bias: Tensor,
    attack: EvaluatedAttackConfig,
    shown: Shown,
    measured: Measured,
) -> list[str]:
    """Write the claim that ``attack`` left so much of the classifier W x + b on the features of ``encoder``.

    Args:
        folder: for its three files; made if need be.
        weight: W, [C, F].
        bias: b, [C].

    Returns:
        Lines for a person: what was written, what is left to do, and what RobustBench will miss.

    Raises:
        UsageError: as :func:`check_claim`, or the folder cannot be written.
    """
    check_claim(attack, shown)
    contents: dict[str, str | bytes] = {
        "claim.json": json.dumps(claim(encoder.config, attack, shown, measured), indent=2) + "\n",
        f"{MODULE}.py": source(encoder, len(weight), attack, shown),
        f"{MODULE}.pt": weights(encoder, weight, bias),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be made ({error.strerror or error}): {ELSEWHERE}") from None
    for name, content in contents.items():
        write_output(folder / name, content, ELSEWHERE)
    written = [f"written to {printable(folder / name)}" for name in contents]
    return [*written, f"of the claim fill in {', '.join(YOURS)}: only you know them", *missed(attack, shown, measured)]


def claim(
    model: ModelConfig, attack: EvaluatedAttackConfig, shown: Shown, measured: Measured
) -> dict[str, str | int | bool | None]:
    """As a file of RobustBench's model_info; what is not known here is empty."""
    notes = [
        f"AutoAttack (standard), {THREATS[attack.norm]} {radius(attack)}, {measured.images:,} images, by fasttrain "
        f"{fasttrain.__version__}",
        *measured.doubts,
    ]
    return {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": shown.table or shown.data,
        "venue": "",
        "architecture": architecture(model),
        "eps": radius(attack),
        "clean_acc": f"{100 * measured.clean:.2f}",
        "reported": "",
        "autoattack_acc": f"{100 * measured.autoattack:.2f}",
        "footnote": "; ".join(notes),
        "unreliable": bool(measured.doubts),
    }


def missed(attack: EvaluatedAttackConfig, shown: Shown, measured: Measured) -> list[str]:
    """What RobustBench's tables will miss in the claim, a line each."""
    if shown.table is None:
        return [f"RobustBench has no table for '{shown.data}': the claim is for no leaderboard of its"]
    table, threat, eps = TABLES[shown.table], THREATS[attack.norm], radius(attack)
    found = []
    if attack.norm not in table.radii:
        found.append(f"RobustBench has no {threat} table for {shown.table}")
    elif eps != table.radii[attack.norm]:
        found.append(f"RobustBench's {threat} table for {shown.table} is at {table.radii[attack.norm]}, this at {eps}")
    if measured.images < table.images:
        found.append(f"RobustBench's figures are of {table.images:,} images, these of {measured.images:,}")
    return found


def radius(attack: EvaluatedAttackConfig) -> str:
    """``8/255`` of a bound a value, ``0.5`` of a norm, as RobustBench writes them."""
    return f"{attack.eps_255:g}/255" if attack.norm == "linf" else f"{attack.eps_255 / 255:g}"


def architecture(model: ModelConfig) -> str:
    """``ResNet-18``, with what else it is."""
    width = "" if model.width == 1 else f", width {model.width:g}"
    return f"ResNet-{model.arch.removeprefix('resnet')}{width}"


def source(encoder: Encoder, classes: int, attack: EvaluatedAttackConfig, shown: Shown) -> str:
    """The model as a Python file that needs torch alone."""
    templates = Environment(
        loader=PackageLoader("fasttrain.evaluation"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    backbone, model = encoder.backbone, encoder.config
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    return templates.get_template("robustbench.py.jinja").render(
        architecture=architecture(model),
        size=shown.augment.size,
        classes=classes,
        module=MODULE,
        weights=f"{MODULE}.pt",
        benchmark=_benchmark(attack, shown),
        mean=list(model.mean),
        std=list(model.std),
        channels=[stage[0].conv1.out_channels for stage in stages],
        depths=[len(stage) for stage in stages],
        block=type(stages[0][0]).__name__,
        stem=model.stem,
    )


def _benchmark(attack: EvaluatedAttackConfig, shown: Shown) -> str | None:
    """The arguments with which ``benchmark`` measures the claim; None of data that it does not know."""
    if shown.table is None:
        return None
    images = f'load(), n_examples={TABLES[shown.table].images}, dataset="{shown.table}"'
    eps = radius(attack).replace("/", " / ")
    shows = ""
    if shown.table == "imagenet":
        usual = (shown.shorter, shown.augment.size) == (256, 224)
        steps = f"Compose([Resize({shown.shorter}), CenterCrop({shown.augment.size}), ToTensor()])"
        shows = ", preprocessing=" + ('"Res256Crop224"' if usual else steps)
    return f'{images}, threat_model="{THREATS[attack.norm]}", eps={eps}{shows}'


def weights(encoder: Encoder, weight: Tensor, bias: Tensor) -> bytes:
    """The backbone's, with W and b as its ``fc``, as ``torch.load(…, weights_only=True)`` reads them."""
    backbone = {name: x for name, x in encoder.backbone.state_dict().items() if not name.startswith("fc.")}
    named = backbone | {"fc.weight": weight, "fc.bias": bias}
    file = io.BytesIO()
    torch.save({name: x.detach().cpu().contiguous() for name, x in named.items()}, file)
    return file.getvalue()


__all__ = ["Measured", "Shown", "check_claim", "write_claim"]
