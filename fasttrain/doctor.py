"""Would a run work here? Each check is a function that returns a :class:`Finding`; ``launch/doctor.py`` runs them.

Checks of one machine run on every rank; what they find is joined to one line by :func:`joined`, the worst first.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import fasttrain
from fasttrain import distributed
from fasttrain.data import shapes
from fasttrain.data.augment import AugmentConfig, CentreCrop
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import Loader, LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.environment import dali_package, driver
from fasttrain.errors import UsageError
from fasttrain.optim import APEX_INSTALL, OptimizerConfig, require_apex
from fasttrain.printable import printable
from fasttrain.run import RunConfig

Status = Literal["ok", "warning", "fail"]
SEVERITY = {"ok": 0, "warning": 1, "fail": 2}

OPEN_FILES = 4096
SHARED_MEMORY = 128 << 20
"bytes of /dev/shm a rank: DeepSpeed's launcher leaves 66 MB, and NCCL's transports within a machine want some"
STATES = {"sgd": 1, "lars": 1, "adamw": 2}
"tensors of a weight's size that an optimiser keeps"
SKEW = 2.0
"seconds between two machines' clocks beyond which their logs do not fit together"


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    status: Status
    what: str
    remedy: str = ""

    def line(self) -> str:
        text = printable(f"{self.status:8s}{self.name:18s}{self.what}")
        return f"{text}\n{'':26s}-> {printable(self.remedy)}" if self.remedy else text


def attempt(name: str, check: Callable[[], Finding], remedy: str) -> Finding:
    """What ``check`` finds; that it fails, if it raises: whatever breaks here would break a run."""
    try:
        return check()
    except Exception as error:
        return broken(name, error, remedy)


def broken(name: str, error: Exception, remedy: str) -> Finding:
    """The finding that ``error`` is; a :class:`UsageError` has its remedy in it."""
    if isinstance(error, UsageError):
        return Finding(name, "fail", str(error))
    return Finding(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", remedy)


def joined(findings: list[Finding]) -> list[Finding]:
    """One finding a name of what all ranks found: the worst, with the ranks it holds for unless it is all of them.

    All ranks call it together, each with the same names.
    """
    everyone = [[Finding(*finding) for finding in rank] for rank in distributed.all_gather_object(findings)]
    lines = []
    for same in zip(*everyone, strict=True):
        worst = max(same, key=lambda finding: SEVERITY[finding.status])
        ranks = [rank for rank, finding in enumerate(same) if finding.status == worst.status]
        where = "" if len(ranks) == len(same) else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}: "
        lines.append(worst._replace(what=where + worst.what))
    return lines


# A machine -----------------------------------------------------------------------------------------------------------


def machine(device: str, optimizer: OptimizerConfig, loader: LoaderConfig) -> list[Finding]:
    """What can be said of this rank's machine before any process group."""
    return [
        attempt("GPU", lambda: gpu(device), "reinstall the driver, or set train.device=cpu"),
        open_files(),
        shared_memory(),
        apex(optimizer),
        ffcv(loader),
    ]


def versions() -> dict[str, str]:
    """Of what must be the same on every rank, and "absent" for what is not there."""
    found = {"fasttrain": fasttrain.__version__, "Python": platform.python_version(), "CUDA": torch.version.cuda or ""}
    packages = {"torch": "torch", "DeepSpeed": "deepspeed", "DALI": dali_package() or "", "FFCV": "ffcv"}
    for name, package in packages.items():
        try:
            found[name] = metadata.version(package)
        except (metadata.PackageNotFoundError, ValueError):
            found[name] = "absent"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = driver() or "unknown"
    return {name: version for name, version in found.items() if version}


def same_versions() -> Finding:
    """Versions, which all ranks must share; and DALI's CUDA, which must be torch's. All ranks call it together."""
    mine = versions()
    everyone = distributed.all_gather_object({**mine, "host": socket.gethostname()})
    text = ", ".join(f"{name} {version}" for name, version in mine.items())
    for name in mine:
        values = {found.get(name): found["host"] for found in reversed(everyone)}
        if len(values) > 1:
            differing = " and ".join(f"{value} ({host})" for value, host in sorted(values.items(), key=str))
            return Finding("versions", "fail", f"{name} differs: {differing}", "install the same on all machines")
    dali, cuda = dali_package(), torch.version.cuda
    if dali and cuda and dali.lower().split("cuda")[1][:2] != cuda.split(".")[0]:
        return Finding(
            "versions", "warning", f"{text}; {dali} is for another CUDA", f"pip install nvidia-dali-cuda{cuda[:2]}0"
        )
    return Finding("versions", "ok", text)


def gpu(device: str) -> Finding:
    """Whether PyTorch can use this rank's GPU, and nobody else does."""
    if not torch.cuda.is_available():
        if found := driver():
            return Finding(
                "GPU",
                "warning" if device == "cpu" else "fail",
                f"there is one (driver {found}), but PyTorch {torch.__version__} cannot use it",
                "install a PyTorch build whose CUDA the driver supports (nvidia-smi names it), or set train.device=cpu",
            )
        status: Status = "fail" if device == "cuda" else "ok"
        return Finding("GPU", status, "none; runs on the CPU", "set train.device=cpu" if status == "fail" else "")
    count, ranks = torch.cuda.device_count(), _ranks_here()
    if count < ranks:
        return Finding("GPU", "fail", f"{count} for {ranks} ranks on this machine", "start one process a GPU")
    index = distributed.local_rank()
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    if not any(arch.split("_")[1].startswith(str(major)) for arch in built_for):
        what = f"{name} (sm_{major}{minor}) is not among what PyTorch was built for ({' '.join(built_for)})"
        return Finding("GPU", "fail", what, "install a PyTorch build for this GPU")
    free, total = torch.cuda.mem_get_info(index)
    what = f"{count} x {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    if free < 0.9 * total:
        return Finding("GPU", "warning", what, "see nvidia-smi for who holds the rest")
    return Finding("GPU", "ok", what)


def measuring() -> Finding:
    """How a machine with a GPU is measured, which nothing here does."""
    command = "python launch/bench.py gpu"
    return Finding("measure", "ok", f"{command}: kernels checked, waits, every mode, steps and loaders; 8 minutes")


def _ranks_here() -> int:
    """Ranks on this machine, as torchrun or DeepSpeed says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def open_files() -> Finding:
    """Sockets, pipes and libraries are files too."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = most != resource.RLIM_INFINITY and most < OPEN_FILES
    status: Status = "ok" if not low else "warning" if most >= 1024 else "fail"
    return Finding("open files", status, f"at most {most}", f"ulimit -n {16 * OPEN_FILES}" if low else "")


def shared_memory(path: str = "/dev/shm") -> Finding:
    """A container's default of 64 MB is too little."""
    needed = SHARED_MEMORY * _ranks_here()
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("shared memory", "fail", f"{path}: {error.strerror}", f"mount a tmpfs at {path}")
    what = f"{free / 2**20:,.0f} MiB free in {path}"
    if free >= needed:
        return Finding("shared memory", "ok", what)
    remedy = f"{needed / 2**20:,.0f} MiB are wanted: start the container with --shm-size=8g, or remount {path}"
    return Finding("shared memory", "warning" if 2 * free >= needed else "fail", what, remedy)


def apex(optimizer: OptimizerConfig) -> Finding:
    """NVIDIA's apex, which is needed only where the optimiser asks for it."""
    try:
        require_apex()
    except UsageError:
        return _absent("apex", optimizer.implementation == "apex", APEX_INSTALL)
    return Finding("apex", "ok", "NVIDIA's, with its CUDA kernels")


def ffcv(loader: LoaderConfig) -> Finding:
    """FFCV, which is needed only where the loader is its."""
    from fasttrain.data.beton import INSTALL

    try:
        return Finding("FFCV", "ok", metadata.version("ffcv"))
    except metadata.PackageNotFoundError:
        return _absent("FFCV", loader.kind == "ffcv", INSTALL)


def _absent(name: str, wanted: bool, install: str) -> Finding:
    if wanted:
        return Finding(name, "fail", "absent, and needed", install)
    return Finding(name, "ok", "absent, not needed", f"optional: {install}")


def decode(device: torch.device) -> Finding:
    """The loader decodes a few drawings, kept as JPEG, as Pillow does."""
    name, count = f"decode on {device.type}", 32
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            label = shapes.CLASSES[number % 2]
            path = Path(folder, "train", label, f"{number:02d}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.draw(label, "train", number)).save(path, quality=92, subsampling=0)
        catalog = open_catalog(DataConfig(root=folder), "train")
        order = Order(catalog.indices, 0, count, shuffle=False, drop_last=False)
        augment = CentreCrop(AugmentConfig(size=shapes.SIDE, eval_crop=1.0))
        loader = make_loader(LoaderConfig(bad_share=0), catalog, order, augment, device)
        try:
            next(loader.iterate())
            began = time.perf_counter()
            (batch,) = loader.iterate()
            rate = count / (time.perf_counter() - began)
        finally:
            loader.close()
        expected = np.stack([np.asarray(Image.open(catalog.path(i)).convert("RGB")) for i in range(count)])
    found = batch.images[0].permute(0, 2, 3, 1).cpu().numpy() * 255
    error = float(abs(found - expected).mean())
    what = f"{count} small images at {rate:,.0f} a second, {error:.2f} grey levels from Pillow's"
    if not error <= 3:
        return Finding(name, "fail", what, "reinstall nvidia-dali for this machine's CUDA")
    return Finding(name, "ok", what)


# All ranks together --------------------------------------------------------------------------------------------------


def group() -> Finding:
    """Who takes part. All ranks call it together."""
    hosts = distributed.all_gather_object(socket.gethostname())
    names = sorted(set(hosts))
    what = f"{len(hosts)} ranks on {len(names)} hosts ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if nodes > len(names):
        remedy = "start with srun, one launcher a node (launch/slurm)"
        return Finding("ranks", "warning", f"{what}, of {nodes} nodes in the allocation", remedy)
    return Finding("ranks", "ok", what)


def collective(device: torch.device, module: nn.Module | None) -> Finding:
    """The sum of a large tensor over all ranks: right, and how fast. All ranks call it together."""
    world = distributed.world_size()
    if world == 1:
        return Finding("collective", "ok", "one rank: nothing to sum over")
    nbytes, rounds = (256 << 20 if device.type == "cuda" else 16 << 20), 3
    seconds = []
    for _ in range(rounds + 1):
        x = torch.full((nbytes // 4,), float(distributed.rank() + 1), device=device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        seconds.append((float(x[-1]), time.perf_counter() - began)[1])  # reading it waits for a GPU
        if not bool((x == world * (world + 1) / 2).all()):
            return Finding("collective", "fail", "a sum over the ranks is wrong", "check the network and its drivers")
    rate = nbytes / min(seconds[1:])
    what = f"sums {rate / 1e9:.2f} GB/s over {world} ranks (bus {2 * (world - 1) / world * rate / 1e9:.2f} GB/s)"
    if module is None:
        return Finding("collective", "ok", what)
    gradients = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    what += f"; gradients of {gradients / 1e6:,.0f} MB take {1e3 * gradients / rate:,.0f} ms a step"
    slow = gradients / rate > 1
    remedy = "name the fast network by NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, or raise train.accumulation"
    return Finding("collective", "warning" if slow else "ok", what, remedy if slow else "")


def clocks() -> Finding:
    """How far the ranks' clocks are apart. All ranks call it together."""
    if distributed.world_size() > 1:
        dist.barrier()
    times = distributed.all_gather_object(time.time())
    apart = max(times) - min(times)
    if apart > SKEW:
        first, last = times.index(min(times)), times.index(max(times))
        what = f"rank {first} is {apart:.1f} s behind rank {last}"
        return Finding("clocks", "warning", what, "synchronise them (chrony, ntp): logs and file times mislead")
    return Finding("clocks", "ok", f"within {max(apart, 0.01):.2f} s")


def same_data(catalogs: Sequence[Catalog], root: str | None) -> list[Finding]:
    """Every rank lists the same images, and whether those of ``root`` were verified. All ranks call it together."""
    findings = []
    for catalog in catalogs:
        name = f"data, {catalog.split}"
        fingerprints = distributed.all_gather_object(catalog.fingerprint)
        others = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
        what = catalog.contents()
        what += f", {len(catalog.excluded):,} left out" if catalog.excluded else ""
        what += "".join(f"; {note}" for note in catalog.notes)
        if others:
            what = f"rank {others[0]} lists other images than rank 0 in {catalog.root}"
            findings.append(Finding(name, "fail", what, "copy the data and its manifest to every machine alike"))
        elif root is not None and catalog.names is not None and catalog.nbytes is None:
            remedy = f"python launch/prepare.py data.root={root}" + " data.by_content=true" * catalog.by_content
            findings.append(Finding(name, "warning", f"{what}; without a manifest", remedy))
        else:
            findings.append(Finding(name, "warning" if catalog.notes else "ok", what))
    return findings


def reading(loader: Loader, batches: int = 3) -> Finding:
    """This rank's loader delivers the run's own first batches."""
    began, images = time.perf_counter(), 0
    iterator = loader.iterate()
    for _ in range(batches):
        images += len(next(iterator).labels)
    rate = images / (time.perf_counter() - began)
    what = f"{images} images of the run in {batches} batches, {rate:,.0f} a second a rank with the start-up"
    if loader.bad.found:
        first = next(iter(loader.bad.found.values()))
        remedy = "restore it, or have launch/prepare.py leave such files out"
        return Finding("loader", "warning", f"{what}; {len(loader.bad.found)} bad: {first}", remedy)
    return Finding("loader", "ok", what)


def disk(run: RunConfig, optimizer: OptimizerConfig, module: nn.Module, steps: int) -> Finding:
    """The run's folder can be written, is the same one on every rank, and has room for the checkpoints that a run of
    ``steps`` keeps. All ranks call it together."""
    folder = Path(run.dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    probe = distributed.on_rank_zero(lambda: _probe(place))
    try:
        seen = distributed.all_gather_object(Path(probe).is_file())
    finally:
        if distributed.rank() == 0:
            Path(probe).unlink()
    if not all(seen):
        what = f"rank {seen.index(False)} does not see what rank 0 writes in {place}"
        return Finding("run.dir", "fail", what, "set run.dir to a folder that all machines share")
    weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kept = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    one, free = kept + 4 * weights * STATES[optimizer.name], shutil.disk_usage(place).free
    count = run.keep + 1 + bool(run.keep_best)  # one of them is the one being written
    count += steps // run.keep_every if run.keep_every else 0
    needed = one * count
    what = f"{free / 1e9:,.1f} GB free in {place}, {needed / 1e9:,.2f} needed: {count} x {one / 1e6:,.1f} MB"
    if free > 2 * needed:
        return Finding("run.dir", "ok", what)
    return Finding(
        "run.dir", "warning" if free > needed else "fail", what, "free space, or keep fewer (run.keep, run.keep_every)"
    )


def _probe(place: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=place, delete=False) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        return file.name
    except OSError as error:
        raise UsageError(f"'{place}' cannot be written ({error.strerror}): choose another run.dir") from None


def show(findings: Sequence[Finding]) -> bool:
    """Print on rank 0, at once, so that a check that hangs is the one after the last line; True when none failed."""
    for finding in findings:
        if distributed.rank() == 0:
            print(finding.line(), file=sys.stdout, flush=True)
    return all(finding.status != "fail" for finding in findings)


__all__ = [
    "Finding",
    "apex",
    "attempt",
    "broken",
    "clocks",
    "collective",
    "decode",
    "disk",
    "ffcv",
    "gpu",
    "group",
    "joined",
    "machine",
    "measuring",
    "open_files",
    "reading",
    "same_data",
    "same_versions",
    "shared_memory",
    "show",
    "versions",
]
