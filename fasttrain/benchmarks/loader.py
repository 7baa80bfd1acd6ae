"""Our loaders beside bare DALI and FFCV pipelines that decode, crop, flip and colour the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import Field

from fasttrain.benchmarks.timing import Report, alternate, table
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig, SimCLR, blur_radius
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import UsageError


class LoaderBenchConfig(Config):
    """What to load."""

    batch: int = Field(128, ge=1)
    "images a batch"
    batches: int = Field(20, ge=1)
    "batches a round"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()


def compare_loaders(config: LoaderBenchConfig, rounds: int) -> Iterator[Report]:
    """Images (not views) a second: ours with all of the augmentation and without colour, the bare pipeline likewise.

    Yields after every round.

    Ours deliver float32 in [0, 1]; the bare ones uint8. FFCV has no colour jitter of its own, so its bare pipeline is
    timed without colour only.
    """
    catalog = open_catalog(config.data, "train")
    augment, loader, batch = config.augment, config.loader, config.batch
    count = min(len(catalog), batch * config.batches)
    picked = np.sort(np.random.default_rng(0).choice(catalog.indices, count, replace=False))
    plain = augment.model_copy(update={"jitter_p": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def ours(config: AugmentConfig) -> Callable[[], int]:
        order = Order(picked, 0, batch, drop_last=False)
        reader = make_loader(loader, catalog, order, SimCLR(config, 0), device)
        return lambda: sum(len(delivered.labels) for delivered in reader.iterate())

    contestants = {"fasttrain, all": ours(augment), "fasttrain, crop and flip": ours(plain)}
    if loader.kind == "ffcv":
        contestants["bare FFCV, crop and flip"] = bare_ffcv(catalog, plain, batch, count, loader.thread_count())
    elif catalog.encoded:
        files = [catalog.path(i) for i in picked]
        if odd := next((path for path in files if not _is_utf8(path)), None):
            raise UsageError(
                f"'{odd}' is not UTF-8, and DALI's own reader opens no other names: rename it, or link to it"
            )
        contestants["bare DALI, all"] = bare_dali(files, augment, batch, loader.thread_count(), device)
        contestants["bare DALI, crop and flip"] = bare_dali(files, plain, batch, loader.thread_count(), device)
    for timings in alternate(contestants, rounds):
        rates = {timing.name: timing.rate for timing in timings}
        yield Report(table(timings, "images"), [timing._asdict() for timing in timings], rates, "images/s")


def _is_utf8(path: str) -> bool:
    return path == path.encode(errors="replace").decode()


def bare_dali(
    files: list[str], augment: AugmentConfig, batch: int, threads: int, device: torch.device
) -> Callable[[], int]:
    """DALI's own reader, crops, flips, colour twist and blur, drawn by DALI; two views from one decode."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    s = augment.jitter

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index or 0 if gpu else None,
        prefetch_queue_depth=2,
        enable_conditionals=True,
        seed=1,
    )
    def pipeline():
        encoded, label = fn.readers.file(files=files, labels=[0] * len(files), random_shuffle=True, name="reader")
        image = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        views = []
        for _ in range(augment.views):
            view = fn.random_resized_crop(
                image,
                size=[augment.size] * 2,
                random_area=list(augment.scale),
                random_aspect_ratio=list(augment.ratio),
            )
            view = fn.flip(view, horizontal=fn.random.coin_flip(probability=augment.flip))
            if augment.jitter_p or augment.grey:
                jittered = fn.random.coin_flip(probability=augment.jitter_p)
                coloured = 1 - fn.random.coin_flip(probability=augment.grey)

                def factor(spread: float, rest: float, jittered=jittered):
                    drawn = fn.random.uniform(range=[rest - spread, rest + spread])
                    return jittered * drawn + (1 - jittered) * rest

                view = fn.color_twist(
                    view,
                    brightness=factor(0.8 * s, 1),
                    contrast=factor(0.8 * s, 1),
                    saturation=coloured * factor(0.8 * s, 1),
                    hue=factor(72 * s, 0),
                )
            if augment.blur and fn.random.coin_flip(probability=augment.blur, dtype=types.BOOL):
                sigma = fn.random.uniform(range=list(augment.sigma))
                view = fn.gaussian_blur(view, sigma=sigma, window_size=2 * blur_radius(augment.size) + 1)
            views.append(view)
        return *views, label

    pipe = pipeline()
    pipe.build()
    steps = -(-len(files) // batch)

    def run() -> int:
        for _ in range(steps):
            pipe.run()
        return steps * batch

    return run


def bare_ffcv(catalog: Catalog, augment: AugmentConfig, batch: int, images: int, threads: int) -> Callable[[], int]:
    """``ffcv.loader.Loader`` with its own crops and flips; it decodes each image once a view."""
    if catalog.beton is None:
        raise UsageError(f"'{catalog.root}' is no FFCV file: write one with launch/prepare.py, or use loader.kind=dali")
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    torch_threads = torch.get_num_threads()
    pipelines = {"image": None, "label": None, "index": None}
    for view in range(augment.views):
        decoder = RandomResizedCropRGBImageDecoder((augment.size, augment.size), augment.scale, augment.ratio)
        steps = [RandomHorizontalFlip(augment.flip), ToTensor()]
        pipelines[f"view{view}"] = PipelineSpec("image", decoder=decoder, transforms=steps)
    bare = Loader(
        str(catalog.beton),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines=pipelines,
        seed=0,
    )
    torch.set_num_threads(torch_threads)  # its constructor changed it

    def run() -> int:
        done = 0
        while done < images:
            for _ in bare:
                done += batch
                if done >= images:
                    break
        return done

    return run
