"""Tasks: a few classes of a data set to be told apart, in an order of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import torch
from torch import Tensor

from fasttrain.data.catalog import Catalog
from fasttrain.errors import UsageError

PAPER = ((0, 1, 2, 3, 4), (6, 11, 16, 21, 26), (56, 58, 62, 66, 68), (95, 96, 97, 98, 99))
"The four 5-way tasks on CIFAR-100 of Cowlagi, Liu & Neervannan, section 4, by label."
WAY = 5

Classes = tuple[int | str, ...]
"Labels, or names, of classes."
Tasks = Annotated[tuple[Classes, ...] | str, pydantic.Field(union_mode="left_to_right")]
"""paper (four 5-way tasks by the labels of CIFAR-100), all (one of all classes), random:N (N disjoint 5-way tasks), or
lists of labels or names."""


class Task(NamedTuple):
    """Classes to be told apart."""

    name: str
    classes: tuple[int, ...]  # labels of the data set; in the task they are 0, 1, 2, …

    def members(self, catalog: Catalog, indices: np.ndarray) -> np.ndarray:
        """Those of ``indices`` that are of its classes, in their order."""
        return indices[np.isin(catalog.labels[indices], self.classes)]

    def relabelled(self, labels: Tensor) -> Tensor:
        """Labels of the data set [n] -> of the task [n]."""
        of_class = torch.full((max(self.classes) + 1,), -1, dtype=torch.int64, device=labels.device)
        of_class[torch.tensor(self.classes, device=labels.device)] = torch.arange(
            len(self.classes), device=labels.device
        )
        return of_class[labels]


def task_of(classes: Classes | None, catalog: Catalog) -> Task:
    """The task of telling these classes apart; None: all of them.

    Raises:
        UsageError: a class that the data lack, twice the same, or fewer than two.
    """
    if classes is None:
        return Task(f"all {len(catalog.classes)} classes", tuple(range(len(catalog.classes))))
    labels = tuple(_label(one, catalog) for one in classes)
    if len(set(labels)) < len(labels):
        raise UsageError(f"task {_shown(classes)} has a class twice: give each once")
    if len(labels) < 2:
        raise UsageError(f"task {_shown(classes)} has {len(labels)} class: there is nothing to tell apart, give two")
    return Task(_shown(labels), labels)


def tasks_of(asked: Sequence[Classes] | str, catalog: Catalog, seed: int = 0) -> list[Task]:
    """What :data:`Tasks` asks for, of this data set; random ones depend on ``seed`` and the number of classes alone.

    Raises:
        UsageError: as :func:`task_of`; a word that is none of these; more random tasks than there are classes for.
    """
    if asked == "all":
        return [task_of(None, catalog)]
    if asked == "paper":
        if len(catalog.classes) <= max(max(classes) for classes in PAPER):
            raise UsageError(
                f"tasks=paper are of CIFAR-100's labels up to 99, and '{catalog.root}' has {len(catalog.classes)} "
                "classes: give data.root=…/cifar-100-python.tar.gz, or tasks=random:4"
            )
        return [task_of(classes, catalog) for classes in PAPER]
    if isinstance(asked, str):
        word, _, count = asked.partition(":")
        if word != "random" or not count.isdecimal() or not int(count):
            raise UsageError(f"tasks={asked}: should be paper, all, random:N or lists of classes, [[0,1,2],[cat,dog]]")
        total = len(catalog.classes)
        if int(count) * WAY > total:
            raise UsageError(
                f"tasks={asked}: {count} disjoint {WAY}-way tasks need {int(count) * WAY} classes, and "
                f"'{catalog.root}' has {total}"
            )
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(total)
        return [task_of(tuple(sorted(part.tolist())), catalog) for part in order[: int(count) * WAY].reshape(-1, WAY)]
    return [task_of(classes, catalog) for classes in asked]


def _label(one: int | str, catalog: Catalog) -> int:
    if isinstance(one, str) and one in catalog.classes:
        return catalog.classes.index(one)
    if isinstance(one, int) and 0 <= one < len(catalog.classes):
        return one
    if str(one) in catalog.classes:
        return catalog.classes.index(str(one))
    few = ", ".join(catalog.classes[:5]) + (", …" if len(catalog.classes) > 5 else "")
    raise UsageError(
        f"class {one!r} is none of the {len(catalog.classes)} in '{catalog.root}' ({few}): give labels from 0 to "
        f"{len(catalog.classes) - 1}, or names"
    )


def _shown(classes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, classes))}]"


__all__ = ["PAPER", "Classes", "Task", "Tasks", "task_of", "tasks_of"]
