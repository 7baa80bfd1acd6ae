"""Take a step again whose loss or gradient was not finite, and say where the first such value arises.

  python launch/replay.py runs/pretrain/not-finite-step-00001234          all its images in one process
  torchrun --nproc-per-node 8 launch/replay.py …                          as the run took it, where they do not fit

The folder holds the weights and the random state before the step, the indices of its images and the configuration of
the run. Further key=value change the replay alone (device=cpu, precision=fp32). Exit code 1: not finite again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasttrain import cli, distributed, engine
from fasttrain.config import Config, PathText, resolve
from fasttrain.cuda_graph import Usual
from fasttrain.errors import UsageError
from fasttrain.models import Encoder
from fasttrain.nonfinite import read_bundle
from fasttrain.optim import build_optimizer
from fasttrain.precision import Precision

import finetune
import pretrain
import torch
from torch import Tensor, nn


class ReplayConfig(Config):
    """Which step, and how."""

    bundle: PathText
    "a run's folder not-finite-step-…"
    device: distributed.Device = "auto"
    "auto: the GPU when there is one"
    precision: Precision | None = None
    "another than the run's: finite in fp32, it is the precision's doing"


def replay(config: ReplayConfig) -> int:
    device = distributed.initialize(config.device)
    step, weights, random = distributed.agree(lambda: read_bundle(Path(config.bundle)))
    schemas = {"PretrainConfig": pretrain.PretrainConfig, "FinetuneConfig": finetune.FinetuneConfig}
    if step["schema"] not in schemas:
        raise UsageError(f"bundle={config.bundle} is of a '{step['schema']}', not of a run of ours", everywhere=True)
    run = resolve(schemas[step["schema"]], step["config"])
    precision = config.precision or run.train.precision
    train = run.train.model_copy(update={"zero_stage": 0, "precision": precision})
    run = run.model_copy(update={"train": train.on(device)})

    parts = distributed.agree(lambda: build(run, device))
    if parts.catalogs[0].fingerprint != step["data"]:
        raise UsageError(f"bundle={config.bundle} is of other images than {run.data.root} holds now", everywhere=True)
    trainer = engine.initialize(parts.module, build_optimizer(run.optimizer, parts.module, 0, device), run.train)
    try:
        trainer.module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"bundle={config.bundle} has other weights than its run ({reason})", everywhere=True) from None
    restore_random_state(random, len(step["ranks"]))

    findings = [f"weight {name} before the step" for name, tensor in weights.items() if not finite(tensor)]
    batches = parts.loader.iterate(step["step"] * run.train.accumulation)
    trainer.train()
    passes, meter = Usual(trainer), engine.Meter(run.train.batch)
    with noting(trainer.module, findings):
        for micro, forward in enumerate(engine.forwards(trainer, passes, batches, run.train, meter)):
            check_images(step["ranks"], micro, forward.index)
            findings += [f"term {name}" for name, value in forward.terms.items() if not finite(value)]
            findings += [f"loss of micro-batch {micro}: {float(forward.value)}"] if not finite(forward.value) else []
            passes.backward(forward.loss)
            if micro + 1 < run.train.accumulation:
                trainer.step()
    named = [(n, p.grad) for n, p in trainer.module.named_parameters() if p.grad is not None]
    findings += [f"gradient of {name}" for name, gradient in named if not finite(gradient)]
    parts.loader.close()
    for rank, found in enumerate(distributed.all_gather_object(findings)):
        if distributed.rank() == 0:
            print(f"{step['what']}; again on rank {rank} of {distributed.world_size()}: " + summary(found))
    return int(any(distributed.all_gather_object(bool(findings))))


def build(run: Config, device: torch.device):
    """The run's parts; of a finetuning run the encoder's weights come from the bundle."""
    if isinstance(run, pretrain.PretrainConfig):
        return pretrain.build(run, device)
    return finetune.build(run, Encoder(run.model).to(device), device)


def restore_random_state(random: dict[str, Tensor], world: int) -> None:
    """This rank's; with another number of ranks the first one's on all."""
    rank = distributed.rank() if distributed.world_size() == world else 0
    torch.set_rng_state(random[f"{rank:05d}/random.cpu"])
    if torch.cuda.is_available() and f"{rank:05d}/random.cuda" in random:
        torch.cuda.set_rng_state(random[f"{rank:05d}/random.cuda"])


def check_images(ranks: list[dict], micro: int, index: Tensor) -> None:
    """The images of this micro-batch are those that the run saw, however they are split over the ranks."""
    seen = [i for rank in ranks for part in rank["index"][micro : micro + 1] for i in part]
    mine = [i for part in distributed.all_gather_object(index.tolist()) for i in part]
    if seen != mine:
        raise UsageError(f"micro-batch {micro} has other images than the run saw (first {mine[:1]}, not {seen[:1]})")


@contextmanager
def noting(module: nn.Module, findings: list[str]) -> Iterator[None]:
    """Within it, modules add themselves to ``findings`` in the order in which they give what is not finite."""

    def note(name: str):
        def hook(_: nn.Module, given: tuple, out: object) -> None:
            inputs, outputs = ([x for x in flat(value) if x.is_floating_point()] for value in (given, out))
            if all(map(finite, inputs)) and not all(map(finite, outputs)):
                findings.append(f"output of {name}, whose input is finite")

        return hook

    hooks = [part.register_forward_hook(note(name or "the whole step")) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def flat(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from flat(part)


def finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def summary(found: list[str], most: int = 8) -> str:
    """In the order of the step."""
    if not found:
        return "all finite"
    more = f"\n  and {len(found) - most} more" if len(found) > most else ""
    return "not finite:\n  " + "\n  ".join(found[:most]) + more


if __name__ == "__main__":
    cli.main(ReplayConfig, replay, __doc__, positional=("bundle",))
