"""Check a machine, or all machines of a job, for the run of a configuration before hours are spent on it.

  python launch/doctor.py configs/pretrain/simclr_imagenet.yaml data.root=/data/imagenet
  torchrun --nproc-per-node 8 launch/doctor.py ...            launched as the run will be, to meet what it will meet
  deepspeed --hostfile launch/hostfile launch/doctor.py ...
  sbatch launch/slurm/train.sbatch doctor ...

It takes what launch/pretrain.py takes, trains nothing and leaves nothing behind. A line a check: ok, warning or fail,
and the remedy below it. The exit code is 0, or 2 where the run would fail.
"""

from __future__ import annotations

from datetime import timedelta

from pretrain import Parts, PretrainConfig, build, of_weights

from fasttrain import cli, distributed, doctor
from fasttrain.doctor import attempt, joined, show

import torch

PATIENCE = timedelta(minutes=2)
"for the other ranks, to come and in each collective"
NETWORK = "check that all ranks reach MASTER_ADDR, and name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"


def examine(config: PretrainConfig) -> int:
    alone = doctor.machine(config.train.device, config.optimizer, config.loader)
    try:
        device = distributed.initialize(config.train.device, PATIENCE)
    except Exception as error:
        show([*alone, doctor.broken("process group", error, NETWORK)])
        return cli.EXIT_MISTAKE
    good = [show([doctor.group()]), show([doctor.same_versions()]), show(joined(alone)), show([doctor.clocks()])]
    for kind in dict.fromkeys([torch.device("cpu"), device]):
        found = attempt(f"decode on {kind.type}", lambda kind=kind: doctor.decode(kind), "reinstall nvidia-dali")
        good.append(show(joined([found])))
    try:
        config = config.model_copy(update={"train": config.train.on(device)})
        parts = distributed.agree(lambda: build(config, device))
    except Exception as error:
        show([attempt("collective", lambda: doctor.collective(device, None), NETWORK)])
        show([doctor.broken("configuration", error, "see the traceback of launch/pretrain.py")])
        return cli.EXIT_MISTAKE
    good.append(show([attempt("collective", lambda: doctor.collective(device, parts.module), NETWORK)]))
    good.append(show(doctor.same_data(parts.catalogs, config.data.root)))
    good.append(show(joined([attempt("loader", lambda: doctor.reading(parts.loader), "see launch/prepare.py")])))
    parts.loader.close()
    good.append(show([attempt("run.dir", lambda: disk(config, parts), "choose another run.dir")]))
    if device.type == "cuda":
        show([doctor.measuring()])
    return 0 if all(good) else cli.EXIT_MISTAKE


def disk(config: PretrainConfig, parts: Parts) -> doctor.Finding:
    return doctor.disk(config.run, config.optimizer, parts.module, parts.plan.steps)


if __name__ == "__main__":
    cli.main(PretrainConfig, examine, __doc__, base=of_weights)
