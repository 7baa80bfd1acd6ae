"""Our kernels beside their plain references, PyTorch and other libraries, against the machine's ceilings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import Tensor

from fasttrain.benchmarks.cases import OURS, PYTORCH, REFERENCE, Case
from fasttrain.benchmarks.cases.apgd import apgd_cases
from fasttrain.benchmarks.cases.augment import augment_cases
from fasttrain.benchmarks.cases.contrastive import nt_xent_cases, sup_con_cases
from fasttrain.benchmarks.cases.layers import batchnorm_cases, convolution_cases
from fasttrain.benchmarks.ceilings import COPY, PRODUCT, Ceilings, ceilings
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, alternate_steps, marked, quantity, refused
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig

Kernel = Literal["nt_xent", "sup_con", "batchnorm", "convolution", "apgd", "augment"]
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"Relative error, by the inputs' precision, that always counts as agreement."


class KernelBenchConfig(Config):
    """Which kernels, at what sizes."""

    kernels: tuple[Kernel, ...] = get_args(Kernel)
    "which of them"
    images: int | None = Field(None, ge=2)
    "N of the contrastive losses, two views each; null: 4,096 on a CPU, 32,768 on a GPU"
    dim: int = Field(128, ge=1)
    "d of their embeddings"
    temperature: float = Field(0.1, gt=0)
    "their τ"
    batch: int | None = Field(None, ge=2)
    """images of the layers' input, those that APGD attacks and those of which two views are made; null: 128 and 16
    on a CPU, on a GPU 2,048 and 256, tensors that no cache holds and beside which a launch is short"""
    channels: int = Field(64, ge=1)
    "its channels"
    size: int = Field(32, ge=8)
    "its pixels a side, and a small view's"
    pixels: int = Field(224, ge=8)
    "those of the images that APGD attacks, and a large view's"
    bf16: bool | None = None
    "time bf16 inputs beside float32 ones; null: on a GPU"
    side: int | None = Field(None, ge=1)
    "of the large square matrix product; null: 2,048 on a CPU, 8,192 on a GPU"
    copy_mib: int | None = Field(None, ge=1)
    "MiB of the large copy; null: 256 on a CPU, 1,024 on a GPU"


class Error(NamedTuple):
    """How far a contestant's results are from float64."""

    relative: list[float]  # ‖found − true‖ / ‖true‖, one a result
    agrees: bool


def compare_kernels(config: KernelBenchConfig, rounds: int) -> Iterator[Report]:
    """Time, peak memory, share of the ceiling that binds and agreement of every contestant, case by case.

    Yields after every round.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = {dtype: ceilings(dtype, device, config.side, config.copy_mib) for dtype in dtypes(config, device)}
    done: list[Report] = []
    for case in cases(config, device):
        print(case.title, file=sys.stderr, flush=True)
        for found in compare(case, limits[case.dtype], rounds, device):
            yield joined([*done, found])
        done.append(found)


def joined(reports: list[Report]) -> Report:
    """Those of several cases as one."""
    return Report(
        "\n\n".join(report.text for report in reports),
        [row for report in reports for row in report.rows],
        {name: length for report in reports for name, length in report.bars.items()},
        "time over ours",
        all(report.passed for report in reports),
    )


def cases(config: KernelBenchConfig, device: torch.device) -> Iterator[Case]:
    for dtype in dtypes(config, device):
        torch.manual_seed(0)
        gpu = device.type == "cuda"
        images, batch = config.images or (32_768 if gpu else 4096), config.batch or (2048 if gpu else 128)
        contrastive = images, config.dim, config.temperature, dtype, device
        layer = (batch, config.channels, config.size, config.size), dtype, device
        if "nt_xent" in config.kernels:
            yield from nt_xent_cases(*contrastive)
        if "sup_con" in config.kernels:
            yield from sup_con_cases(*contrastive)
        if "batchnorm" in config.kernels:
            yield from batchnorm_cases(*layer)
        if "convolution" in config.kernels:
            yield from convolution_cases(*layer)
        if "apgd" in config.kernels and dtype == torch.float32:
            yield from apgd_cases(config.batch or (256 if gpu else 128), config.pixels, device)
        if "augment" in config.kernels and dtype == torch.float32:
            yield from _augment_cases(config, device)


def _augment_cases(config: KernelBenchConfig, device: torch.device) -> Iterator[Case]:
    """Small views of images as small, with CIFAR's colours, and large ones of larger images, with ImageNet's."""
    images = config.batch or (256 if device.type == "cuda" else 16)
    small, large = AugmentConfig(size=config.size, jitter=0.5, blur=0), AugmentConfig(size=config.pixels)
    yield from augment_cases(images, (small.size, small.size), small, device)
    yield from augment_cases(images, (5 * large.size // 3, 9 * large.size // 4), large, device)


def dtypes(config: KernelBenchConfig, device: torch.device) -> list[torch.dtype]:
    low = device.type == "cuda" if config.bf16 is None else config.bf16
    return [torch.float32, torch.bfloat16] if low else [torch.float32]


def compare(case: Case, limits: Ceilings, rounds: int, device: torch.device) -> Iterator[Report]:
    """One case: what agrees with float64, then peak memory and time, in alternating rounds with the ceilings."""
    errors, refusals = agreement(case)
    runs = {name: case.contestants[name] for name in errors} | case.floors | limits.contestants
    contestants = {name: marked(run) for name, run in runs.items()}
    needed = {OURS, *limits.contestants}
    for standing in alternate_steps(contestants, rounds, None, device, memory=True, needed=needed):
        stayed = {name: error for name, error in errors.items() if name in standing.timings}
        yield report(case, limits, standing.timings, stayed, refusals | standing.refusals)


def report(
    case: Case,
    limits: Ceilings,
    timings: Mapping[str, StepTiming],
    errors: Mapping[str, Error],
    refusals: Mapping[str, str],
) -> Report:
    rows = [row(case, timing, timings, limits, errors) for timing in timings.values()]
    product = quantity(limits.work[PRODUCT].flops / timings[PRODUCT].seconds, "FLOP/s")
    copy = quantity(limits.work[COPY].bytes / timings[COPY].seconds, "B/s")
    work = f"{quantity(case.work.flops, 'FLOP')} in products, {quantity(case.work.bytes, 'B')}"
    lines = [
        f"### {case.title}\n",
        f"{work}; ceilings of this run {product}, {copy}\n",
        table(case, timings, rows, errors),
        "",
        *(f"- {sentence}" for sentence in sentences(case, timings, errors)),
        *(f"- {name} does not run: {reason}" for name, reason in refusals.items()),
    ]
    bars = {f"{case.title}\n{r['name']}": r["over_ours"] for r in rows if r["over_ours"] is not None}
    return Report("\n".join(lines), rows, bars, "time over ours", errors[OURS].agrees)


def agreement(case: Case, rounded: float | None = None) -> tuple[dict[str, Error], dict[str, str]]:
    """Each contestant's error, and why those that are not ours do not run, if so.

    It agrees if every result is no further from float64 than the rounding of the precision (``rounded``, or that of the
    inputs), or than twice what PyTorch's usual code is.
    """
    truth = case.truth()
    distances: dict[str, list[float]] = {}
    refusals: dict[str, str] = {}

    def measure(name: str) -> None:
        distances[name] = [distance(*pair) for pair in zip(case.contestants[name](), truth, strict=True)]

    for name in case.contestants:
        if (reason := refused(partial(measure, name), raises=name == OURS)) is not None:
            refusals[name] = reason
    usual = distances.get(PYTORCH, [0.0] * len(truth))
    allowed = [max(rounded or case.rounded or ROUNDED[case.dtype], 2 * error) for error in usual]
    return {
        name: Error(found, all(error <= most for error, most in zip(found, allowed, strict=True)))
        for name, found in distances.items()
    }, refusals


def distance(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    return (torch.linalg.vector_norm(found.double() - true) / torch.linalg.vector_norm(true)).item()


def row(
    case: Case,
    timing: StepTiming,
    timings: Mapping[str, StepTiming],
    limits: Ceilings,
    errors: Mapping[str, Error],
) -> dict:
    """What is known of one contestant, floor or ceiling, for JSON; "over_ours" only where both do the same."""
    error = errors.get(timing.name)
    work = limits.work.get(timing.name, case.work)
    share, binding = limits.share(work, timing, timings)
    comparable = errors[OURS].agrees and timing.name not in limits.work and (error is None or error.agrees)
    return {
        "kernel": case.kernel,
        "passes": case.passes,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        **timing.row(),
        "over_ours": timing.over(timings[OURS]) if comparable else None,
        "work": work._asdict(),
        "share": share,
        "ceiling": binding,
        "errors": None if error is None else dict(zip(case.results, error.relative, strict=True)),
        "agrees": None if error is None else error.agrees,
    }


def table(case: Case, timings: Mapping[str, StepTiming], rows: list[dict], errors: Mapping[str, Error]) -> str:
    head = ["what", "ms, median", "least to greatest", "over ours", "of the ceiling", "peak MiB beyond the inputs"]
    lines = [[*head, *(f"error, {result}" for result in case.results)]]
    lines.append(["---"] * len(lines[0]))
    for values, timing in zip(rows, timings.values(), strict=True):
        over, memory, error = values["over_ours"], timing.memory, errors.get(timing.name)
        lines.append(
            [
                timing.name,
                milliseconds(timing.seconds),
                f"{milliseconds(min(timing.rounds))} to {milliseconds(max(timing.rounds))}",
                "" if over is None else f"{over:.2f}",
                "" if timing.name in case.floors else f"{100 * values['share']:.0f} % of the {values['ceiling']}",
                "" if memory is None or error is None else f"{memory / 2**20:,.1f}",
                *([""] * len(case.results) if error is None else [f"{value:.1e}" for value in error.relative]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentences(case: Case, timings: Mapping[str, StepTiming], errors: Mapping[str, Error]) -> Iterator[str]:
    """Our speed-up over the reference, PyTorch and the floors; who does not agree with float64."""
    for name, error in errors.items():
        if not error.agrees:
            pairs = zip(case.results, error.relative, strict=True)
            evidence = ", ".join(f"{result} {value:.1e}" for result, value in pairs)
            yield f"{name} DOES NOT MATCH float64: {evidence} off; no speed-up is given"
    for name in (REFERENCE, PYTORCH):
        if name in errors and errors[OURS].agrees and errors[name].agrees:
            yield Comparison(OURS, name, True, "both agree with float64").sentence(timings)
    for name in case.floors.keys() & timings.keys() if errors[OURS].agrees else ():
        yield f"{OURS}: {timings[OURS].over(timings[name]):.2f} times the time of {name}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
