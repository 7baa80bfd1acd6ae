"""One rank of a script of ``launch/`` in a forked process, watched and, where it is asked for, made to fail."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# What a rank needs is imported before it is forked, so that one starts in a fraction of a second.
import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # which torch.optim imports at the first optimizer
import torch.utils.tensorboard

from fasttrain import cli, step
from fasttrain.data import dali
from fasttrain.data.augment import SimCLR  # noqa: F401
from fasttrain.evaluation import online  # noqa: F401

ROOT = Path(__file__).parent.parent.parent


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {name: _script(name) for name in ("pretrain", "finetune", "replay")}


class Fault(NamedTuple):
    """What happens at the ``operation``-th file operation (opening, renaming …) on the checkpoints' folder."""

    operation: int
    what: str  # "SIGKILL", "SIGTERM then SIGKILL", or an errno's name: the operation and all after it fail with it
    delay: float = 0.0  # seconds from the operation to the kill
    rank: int = 0
    once: bool = False  # the operation alone fails


class Poison(NamedTuple):
    """NaN in what the rank computes of one micro-batch."""

    where: str  # image, attack, loss, first gradient, second gradient
    position: int
    rank: int


class Place(NamedTuple):
    """A rank's place among the others."""

    rank: int
    world: int
    port: int


def run(
    script: str, place: Place, folder: str, arguments: list[str], fault: Fault | None, poison: Poison | None
) -> None:
    """Be rank ``place.rank``, whose output goes to ``folder/rank-<n>.log`` and whose sample ids to ``seen-<n>``."""
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_WORLD_SIZE=str(place.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(place.port),
        GLOO_SOCKET_IFNAME="lo",
    )
    log = os.open(f"{folder}/rank-{place.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    poison = poison if poison is not None and poison.rank == place.rank else None
    _record(f"{folder}/seen-{place.rank}", poison)
    if poison is not None:
        _spread(poison)
    sabotage = Sabotage(Path(folder) / "run" / "checkpoints", fault)
    if fault is not None and fault.rank == place.rank:
        sys.addaudithook(sabotage)
    sys.argv = [f"launch/{script}.py", *arguments]
    module = SCRIPTS[script]
    try:
        cli.main(getattr(module, f"{script.capitalize()}Config"), getattr(module, script), "", positional=("bundle",))
    finally:
        Path(folder, f"operations-{place.rank}").write_text(str(sabotage.count))


def seen(folder: Path, rank: int = 0) -> list[tuple[int, list[int]]]:
    """(micro-batch of the run, sample ids) in the order in which the rank took them, over all its lives."""
    path = folder / f"seen-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    taken = []
    for line in lines:
        try:
            taken.append(tuple(json.loads(line)))
        except ValueError:  # cut short by a kill
            continue
    return taken


now = -1
"The micro-batch that was taken last."


def _record(path: str, poison: Poison | None) -> None:
    iterate = dali.DaliLoader.iterate

    def recorded(self, start: int = 0):
        global now
        with open(path, "a", buffering=1) as file:
            for position, batch in enumerate(iterate(self, start), start):
                file.write(json.dumps([position, batch.index.tolist()]) + "\n")
                now = position
                if poison is not None and (poison.where, poison.position) == ("image", now):
                    batch.images[0, 0] = torch.nan
                yield batch

    dali.DaliLoader.iterate = recorded


def _spread(poison: Poison) -> None:
    """Put NaN where the poison says; all other micro-batches are as they were."""

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * torch.nan if now == poison.position else tensor

    # by their full names, since their packages export functions under the same
    evaluation = import_module("fasttrain.attacks.evaluation")
    gradient_penalty = import_module("fasttrain.objectives.gradient_penalty")
    forward = step.TrainStep.forward
    if poison.where == "loss":

        def losing(self, *arguments):
            loss, values = forward(self, *arguments)
            return spoilt(loss), values

        step.TrainStep.forward = losing
    elif poison.where == "first gradient":

        def hooked(self, *arguments):
            if not hasattr(self, "hook"):
                self.hook = next(self.encoder.parameters()).register_hook(spoilt)
            return forward(self, *arguments)

        step.TrainStep.forward = hooked
    elif poison.where == "second gradient":
        image_gradient = gradient_penalty._image_gradient

        def differentiated(*arguments, **options):
            gradient = image_gradient(*arguments, **options)
            if gradient.requires_grad:
                gradient.register_hook(spoilt)
            return gradient

        gradient_penalty._image_gradient = differentiated
    elif poison.where == "attack":
        checked = evaluation._checked

        def attacked(*arguments):
            loss = checked(*arguments)
            if loss.requires_grad:
                loss.register_hook(spoilt)
            return loss

        evaluation._checked = attacked


class Sabotage:
    """An audit hook: Python announces each file operation to it first, and what it raises the operation raises."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.prefix, self.fault = str(folder), fault
        self.count, self._lock = 0, threading.Lock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self._alters(event, arguments):
            return
        with self._lock:
            self.count += 1
            count = self.count
        if "SIG" in self.fault.what:
            if count == self.fault.operation:
                threading.Thread(target=self._strike, daemon=True).start() if self.fault.delay else self._strike()
        elif count == self.fault.operation or (count > self.fault.operation and not self.fault.once):
            number = getattr(errno, self.fault.what)
            raise OSError(number, os.strerror(number), str(arguments[0]))

    def _alters(self, event: str, arguments: tuple) -> bool:
        if not any(isinstance(a, str | os.PathLike) and str(a).startswith(self.prefix) for a in arguments):
            return False
        if event == "open":
            mode, flags = arguments[1:]
            return any(letter in mode for letter in "wax+") if mode else bool(flags & os.O_ACCMODE)
        return event in ALTERING

    def _strike(self) -> None:
        if self.fault.what == "SIGTERM then SIGKILL":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.fault.delay)
        os.kill(os.getpid(), signal.SIGKILL)


ALTERING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
