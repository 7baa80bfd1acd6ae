"""Trajectories: what a network in training says of each validation image, after each epoch, as probabilities on disk.

A file ``trajectories.safetensors`` beside the weights holds those of all tasks and seeds; its header says of what each
is. Probabilities are in float16 (or float32), rounded to 11 (24) binary digits; those below 6e-8 (1e-45) are 0 there.
Whoever reads them divides by their sums, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fasttrain.errors import UsageError
from fasttrain.output import write_output

FILE = "trajectories.safetensors"
TOLERANCE = 2**-8
"How far a sum of probabilities may be from 1: float16 rounds each by half of 2⁻¹⁰ of it at most."
BLOCK = 1 << 22
"Probabilities that are looked at at a time."


class Trajectory(NamedTuple):
    """Of one training, of a task by one seed."""

    task: str  # what it is called
    seed: int
    probabilities: Tensor  # [T, N, C] float16 or float32: at the start and after each epoch
    labels: Tensor  # [N] int64, in the task
    index: Tensor  # [N] int64, positions in the validation split's listing
    data: str  # fingerprint of the validation split
    classes: tuple[str, ...]  # names of the C classes, in the order of the labels
    settings: dict[str, object]  # how it was trained, as JSON has it


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> int:
    """Write them to one file, whole or not at all, and return its bytes.

    Raises:
        UsageError: it cannot be written.
    """
    tensors, cards = {}, []
    for number, one in enumerate(trajectories):
        for name in ("probabilities", "labels", "index"):
            tensors[f"{number}/{name}"] = getattr(one, name).cpu().contiguous()
        cards.append({name: getattr(one, name) for name in ("task", "seed", "data", "classes", "settings")})
    content = save(tensors, metadata={"trajectories": json.dumps(cards)})
    write_output(path, content, "choose another place with output=…")
    return len(content)


def read_trajectories(path: Path) -> list[Trajectory]:
    """The file's trajectories, in its order; their tensors are mapped, not read, until they are used.

    Raises:
        UsageError: there is no such file, it is none of these, or its probabilities are none.
    """
    try:
        with safe_open(str(path), "pt") as file:
            cards = json.loads((file.metadata() or {})["trajectories"])
            found = [
                Trajectory(
                    **{**card, "classes": tuple(card["classes"])},
                    **{name: file.get_tensor(f"{number}/{name}") for name in ("probabilities", "labels", "index")},
                )
                for number, card in enumerate(cards)
            ]
    except FileNotFoundError:
        raise UsageError(f"'{path}' does not exist: python launch/eval.py transfer {path.parent} … writes it") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"'{path}' holds no trajectories ({type(error).__name__}: {error})") from None
    for one in found:
        _check(one, path)
    return found


def check_probabilities(probabilities: Tensor, what: str) -> None:
    """See that each row of [..., C] is a distribution, to float16's rounding.

    Raises:
        UsageError: a value below 0 or not finite, or a row whose sum is not 1.
    """
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    for block in rows.split(max(1, BLOCK // rows.shape[1])):
        block = block.double()
        sums = block.sum(-1)
        if not bool(((block >= 0).all(-1) & ((sums - 1).abs() <= TOLERANCE)).all()):
            worst = sums[(sums - 1).abs().nan_to_num(torch.inf).argmax()]
            raise UsageError(
                f"{what} are no probabilities: a row sums to {float(worst):.6g}, where 1 was expected, or has a value "
                "below 0; give softmax's, not logits"
            )


def _check(one: Trajectory, path: Path) -> None:
    shape, count = tuple(one.probabilities.shape), len(one.labels)
    if len(shape) != 3 or shape[1:] != (count, len(one.classes)) or len(one.index) != count:
        raise UsageError(
            f"'{path}': the trajectory of task {one.task} has probabilities {list(shape)} for {count} labels and "
            f"{len(one.classes)} classes: [epochs, {count}, {len(one.classes)}] was expected"
        )
    check_probabilities(one.probabilities, f"'{path}': what the trajectory of task {one.task} holds")


__all__ = ["FILE", "Trajectory", "check_probabilities", "read_trajectories", "write_trajectories"]
