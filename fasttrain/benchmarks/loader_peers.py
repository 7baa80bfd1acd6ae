"""Others at a loader's work: bare DALI and FFCV pipelines, torchvision, kornia, lightly and solo-learn.

Each is built as its documentation says and told the augmentation that ours has, on as many threads or worker processes.
Where it cannot be told, it does what it does: DALI changes colours in one order and kornia a batch's in one, kornia's
crops are not antialiased, solo-learn's are bicubic, and the blur of its DALI pipeline has a window of 23 pixels.
"""

from __future__ import annotations

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasttrain.benchmarks.loader_work import Epoch, Work, by_workers, insist, spreads, window
from fasttrain.data.augment import AugmentConfig
from fasttrain.errors import UsageError

PeerName = Literal["torchvision", "kornia", "lightly", "solo_learn", "solo_learn_dali", "dali", "ffcv"]


class Peer(NamedTuple):
    """Somebody else's loader."""

    title: str
    build: Callable[[Work, AugmentConfig], Epoch]  # UsageError: it cannot do that work
    modules: tuple[str, ...]  # what it imports
    install: str

    def lacking(self) -> str | None:
        """Why it cannot be imported, and the remedy; None where it can."""
        for name in self.modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # torchvision's beside a torch that it was not built for is a RuntimeError
                return f"{reason(error)} ({self.install})"
        return None


def torchvision(work: Work, augment: AugmentConfig) -> Epoch:
    """Its transforms v2 on uint8 tensors."""
    view = torchvision_view(augment)
    return by_workers(work, work.dataset(lambda image: [view(image) for _ in range(augment.views)]))


def torchvision_view(augment: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    from torchvision.transforms import v2

    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(augment.size, scale=augment.scale, ratio=augment.ratio, antialias=True),
        v2.RandomHorizontalFlip(augment.flip),
    ]
    if augment.jitter_p:
        steps.append(v2.RandomApply([v2.ColorJitter(*spreads(augment))], augment.jitter_p))
    if augment.grey:
        steps.append(v2.RandomGrayscale(augment.grey))
    if augment.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(window(augment), augment.sigma)], augment.blur))
    if augment.solarise:
        steps.append(v2.RandomSolarize(128, augment.solarise))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def kornia(work: Work, augment: AugmentConfig) -> Epoch:
    """Its augmentations of a float batch, from decoded images that lie on the device."""
    cropping = "resample" if work.device.type == "cuda" else "slice"  # a loop over the images, faster on a CPU
    view, images = kornia_view(augment, cropping), work.pixels

    def epoch() -> Iterator[Sequence[Tensor]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(work.threads)
        try:
            for chosen in torch.randperm(len(images)).split(work.batch):
                batch = images[chosen.to(work.device)].float() / 255
                with torch.no_grad():
                    views = [view(batch) for _ in range(augment.views)]
                yield views
        finally:
            torch.set_num_threads(threads)

    return epoch


def kornia_view(augment: AugmentConfig, cropping: str = "slice") -> Callable[[Tensor], Tensor]:
    from kornia import augmentation as of

    size = (augment.size, augment.size)
    steps = [
        of.RandomResizedCrop(size, augment.scale, augment.ratio, align_corners=False, cropping_mode=cropping),
        of.RandomHorizontalFlip(p=augment.flip),
    ]
    if augment.jitter_p:
        steps.append(of.ColorJitter(*spreads(augment), p=augment.jitter_p))
    if augment.grey:
        steps.append(of.RandomGrayscale(p=augment.grey))
    if augment.blur:
        steps.append(of.RandomGaussianBlur((window(augment),) * 2, augment.sigma, p=augment.blur))
    if augment.solarise:
        steps.append(of.RandomSolarize(0.0, 0.0, p=augment.solarise))
    return torch.nn.Sequential(*steps)


def lightly(work: Work, augment: AugmentConfig) -> Epoch:
    """Its data set and SimCLR's views as it makes them."""
    from lightly.data import LightlyDataset
    from lightly.transforms.multi_view_transform import MultiViewTransform

    transform = MultiViewTransform([lightly_view(augment)] * augment.views)
    return by_workers(work, LightlyDataset.from_torch_dataset(work.dataset(None), transform))


def lightly_view(augment: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    insist("lightly's SimCLR", augment, scale=(augment.scale[0], 1.0), ratio=(3 / 4, 4 / 3), solarise=0.0)
    return SimCLRViewTransform(
        input_size=augment.size,
        cj_prob=augment.jitter_p,
        cj_strength=augment.jitter,
        min_scale=augment.scale[0],
        random_gray_scale=augment.grey,
        gaussian_blur=augment.blur,
        sigmas=augment.sigma,
        hf_prob=augment.flip,
        normalize=None,
    )


def solo_learn(work: Work, augment: AugmentConfig) -> Epoch:
    """Its torchvision pipeline."""
    from solo.data.pretrain_dataloader import build_transform_pipeline, prepare_n_crop_transform

    view = build_transform_pipeline("custom", solo_learn_settings(augment))
    return by_workers(work, work.dataset(prepare_n_crop_transform([view], [augment.views])))


def solo_learn_dali(work: Work, augment: AugmentConfig) -> Epoch:
    """Its DALI pipeline and the iterator around it; it leaves out what does not fill the last batch."""
    from nvidia.dali.plugin.pytorch import LastBatchPolicy
    from solo.data.dali_dataloader import PretrainPipelineBuilder, PretrainWrapper, build_transform_pipeline_dali
    from solo.data.pretrain_dataloader import prepare_n_crop_transform

    work.require_files()
    gpu = work.device.type == "cuda"
    kind = "gpu" if gpu else "cpu"
    view = build_transform_pipeline_dali("custom", solo_learn_settings(augment), kind)
    built = PretrainPipelineBuilder(
        work.folder,
        batch_size=work.batch,
        device=kind,
        transforms=prepare_n_crop_transform([view], [augment.views]),
        num_threads=work.threads,
    )
    number = (work.device.index or 0) if gpu else None
    pipeline = built.pipeline(batch_size=work.batch, num_threads=work.threads, device_id=number, seed=built.seed)
    pipeline.build()
    batches = PretrainWrapper(
        model_batch_size=work.batch,
        model_rank=0,
        model_device=work.device,
        dataset_size=len(work.catalog.indices),
        pipelines=pipeline,
        output_map=[*(f"large{view}" for view in range(augment.views)), "label"],
        reader_name="Reader",
        last_batch_policy=LastBatchPolicy.DROP,
        auto_reset=True,
    )

    endless = (views for _ in itertools.count() for _, views, _ in batches)  # one that is left unfinished goes on
    return lambda: itertools.islice(endless, len(work.catalog.indices) // work.batch)


def solo_learn_settings(augment: AugmentConfig) -> Any:
    """As its YAML files say it; mean and deviation leave the values in [0, 1]."""
    from omegaconf import OmegaConf

    sigma = {"sigma": (0.1, 2.0)} if augment.blur else {}
    insist("solo-learn", augment, ratio=(3 / 4, 4 / 3), **sigma)
    brightness, contrast, saturation, hue = spreads(augment)
    jitter = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    low, high = augment.scale
    return OmegaConf.create(
        {
            "crop_size": augment.size,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "rrc": {"enabled": True, "crop_min_scale": low, "crop_max_scale": high},
            "color_jitter": {"prob": augment.jitter_p, **jitter},
            "grayscale": {"prob": augment.grey},
            "gaussian_blur": {"prob": augment.blur},
            "solarization": {"prob": augment.solarise},
            "equalization": {"prob": 0.0},
            "horizontal_flip": {"prob": augment.flip},
        }
    )


def bare_dali(work: Work, augment: AugmentConfig) -> Epoch:
    """DALI's own reader, crops, flips, colour twist and blur, drawn by DALI; all views from one decode."""
    from nvidia.dali import fn, pipeline_def, types

    work.require_files()
    files = [work.catalog.path(index) for index in work.catalog.indices]
    if odd := next((path for path in files if path != path.encode(errors="replace").decode()), None):
        raise UsageError(f"'{odd}' is not UTF-8, and DALI's own reader opens no other names: rename it, or link to it")
    gpu = work.device.type == "cuda"
    s = augment.jitter

    @pipeline_def(
        batch_size=work.batch,
        num_threads=work.threads,
        device_id=work.device.index or 0 if gpu else None,
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
                view = fn.gaussian_blur(view, sigma=sigma, window_size=window(augment))
            if augment.solarise and fn.random.coin_flip(probability=augment.solarise, dtype=types.BOOL):
                bright = view >= 128
                view = bright * (types.Constant(255, dtype=types.UINT8) - view) + (True ^ bright) * view
            views.append(view)
        return *views, label

    pipe = pipeline()
    pipe.build()

    def epoch() -> Iterator[Sequence[Tensor]]:
        for _ in range(-(-len(files) // work.batch)):
            *views, _ = pipe.run()
            yield [torch.from_dlpack(view.as_tensor()).permute(0, 3, 1, 2) for view in views]

    return epoch


def bare_ffcv(work: Work, augment: AugmentConfig) -> Epoch:
    """``ffcv.loader.Loader`` with its own crops and flips; it decodes each image once a view."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    beton = work.require_beton()
    insist("FFCV", augment, jitter_p=0.0, grey=0.0, blur=0.0, solarise=0.0)
    torch_threads = torch.get_num_threads()
    pipelines = {"image": None, "label": None, "index": None}
    for view in range(augment.views):
        decoder = RandomResizedCropRGBImageDecoder((augment.size, augment.size), augment.scale, augment.ratio)
        steps = [RandomHorizontalFlip(augment.flip), ToTensor()]
        pipelines[f"view{view}"] = PipelineSpec("image", decoder=decoder, transforms=steps)
    bare = Loader(
        str(beton.beton),
        batch_size=work.batch,
        num_workers=work.threads,
        order=OrderOption.RANDOM,
        indices=np.searchsorted(beton.indices, work.catalog.indices),
        os_cache=True,
        drop_last=False,
        pipelines=pipelines,
        seed=0,
    )
    torch.set_num_threads(torch_threads)  # its constructor changed it

    def epoch() -> Iterator[Sequence[Tensor]]:
        for views in bare:
            yield [view.permute(0, 3, 1, 2).to(work.device, non_blocking=True) for view in views]

    return epoch


@contextmanager
def numba_as_it_is() -> Iterator[None]:
    """FFCV's memory manager marks a type that all of numba shares, an array of bytes, as read-only: functions that were
    compiled for it are not found any more. After this they are, and FFCV's are not."""
    shared = numba.uint8[::1]
    try:
        yield
    finally:
        shared.mutable = True


def reason(error: Exception) -> str:
    """In one line; what kind of error it is where that is not ours."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, UsageError) else f"{type(error).__name__}: {line}"


DALI = "pip install nvidia-dali-cuda120"
SOLO_LEARN = "pip install git+https://github.com/vturrisi/solo-learn"
PEERS: dict[PeerName, Peer] = {
    "torchvision": Peer("torchvision", torchvision, ("torchvision.transforms.v2",), "pip install torchvision"),
    "kornia": Peer("kornia", kornia, ("kornia.augmentation",), "pip install kornia"),
    "lightly": Peer("lightly", lightly, ("lightly.data", "lightly.transforms"), "pip install lightly"),
    "solo_learn": Peer("solo-learn", solo_learn, ("solo.data.pretrain_dataloader",), SOLO_LEARN),
    "solo_learn_dali": Peer("solo-learn, DALI", solo_learn_dali, ("solo.data.dali_dataloader",), SOLO_LEARN),
    "dali": Peer("bare DALI", bare_dali, ("nvidia.dali",), DALI),
    "ffcv": Peer("bare FFCV", bare_ffcv, ("ffcv.loader",), "pip install -e '.[ffcv]', after its system packages"),
}


def importable(names: Iterable[PeerName]) -> tuple[list[Peer], dict[str, list[str]]]:
    """Those that can be imported; why others cannot, and who."""
    found, missing = [], defaultdict(list)
    for peer in map(PEERS.__getitem__, names):
        if why := peer.lacking():
            missing[why].append(peer.title)
        else:
            found.append(peer)
    return found, missing
