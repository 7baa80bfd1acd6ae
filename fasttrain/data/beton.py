"""FFCV files (``.beton``): written from any catalogue, checked, listed.

The format, its reader, its encoder and its JPEG decoder (libjpeg-turbo, fast DCT) are FFCV's (Leclerc et al. 2023),
whose own ``Loader`` reads these files; ours is in ``ffcv.py``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import torch
from tqdm import tqdm

from fasttrain.data.catalog import Catalog
from fasttrain.data.header import header_size
from fasttrain.errors import UsageError

INSTALL = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install -e '.[ffcv]'"
PAGE = 1 << 25
"""No sample straddles a multiple of this many bytes: FFCV's cached reader loads pages, and its writer's are 8 MiB."""

_thread = threading.local()  # .decoder: DALI's, one a writing thread

Mode = Literal["jpg", "raw", "smart", "proportion"]


class Listing(NamedTuple):
    """What a ``.beton`` holds. A sample's id is its position in the full listing that the file was written from."""

    classes: list[str]
    labels: np.ndarray  # [full] int64; -1 where the file lacks the sample
    ids: np.ndarray  # [n] int64, sorted
    sizes: np.ndarray  # [full, 2] int32 (height, width); 0 where the file lacks the sample
    excluded: list[tuple[str, str]]  # (path, reason) of what the writer left out
    fingerprint: str


def read_listing(path: str | Path) -> Listing:
    """Labels, ids, sizes and classes of an FFCV file, from its metadata and, where there is one, its sidecar.

    Raises:
        UsageError: ffcv is missing, or the file is not there, damaged, or not the one its sidecar describes.
    """
    beton, sidecar = open_beton(path), _read_sidecar(Path(path))
    samples = beton.samples
    full = int(sidecar.get("count") or samples["id"][-1] + 1)
    classes = sidecar.get("classes", [str(label) for label in range(int(samples["label"].max()) + 1)])
    if full <= samples["id"][-1] or max(1, len(classes)) <= samples["label"].max():  # unlabelled, all are 0
        raise UsageError(
            f"'{path}' has samples beyond the {full:,} of {len(classes):,} classes in its sidecar: write it again"
        )
    labels, sizes = np.full(full, -1, np.int64), np.zeros((full, 2), np.int32)
    labels[samples["id"]] = samples["label"]
    sizes[samples["id"], 0], sizes[samples["id"], 1] = samples["height"], samples["width"]
    return Listing(
        classes=classes,
        labels=labels,
        ids=samples["id"].copy(),
        sizes=sizes,
        excluded=[(name, reason) for name, reason in sidecar.get("excluded", [])],
        fingerprint=sidecar.get("fingerprint") or hashlib.sha256(samples.tobytes()).hexdigest(),
    )


@dataclass(frozen=True, eq=False)
class Beton:
    """An open FFCV file."""

    path: Path
    data: np.ndarray  # uint8 [bytes], read-only memory map of the whole file
    samples: np.ndarray  # [n] of SAMPLE, sorted by id


SAMPLE = np.dtype(
    [
        ("id", np.int64),
        ("label", np.int64),
        ("start", np.int64),  # of the payload, bytes into the file
        ("nbytes", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("jpeg", np.int64),  # 1: the payload is a JPEG file; 0: uint8 [height, width, 3]
    ]
)


def open_beton(path: str | Path) -> Beton:
    """Map an FFCV file and check that it is whole: its size, its tables, and that every payload lies inside it.

    Fields are found by type and name: the first RGBImageField, the IntField ``label`` (else the first), and the
    IntField ``index`` for the ids (else the position in the file). The payloads themselves are :func:`verify_beton`'s.

    Raises:
        UsageError: see :func:`read_listing`.
    """
    path, ffcv = Path(path), _import_ffcv()
    if not path.is_file():
        raise UsageError(f"there is no FFCV file '{path}': write it with launch/prepare.py")
    size, expected = path.stat().st_size, _read_sidecar(path).get("bytes")
    if expected not in (None, size):
        raise UsageError(f"'{path}' has {size:,} bytes, its sidecar says {expected:,}: write it again or copy it whole")
    try:
        samples = _read_samples(ffcv, path, size)
    except UsageError:
        raise
    except Exception as error:  # FFCV trusts its input: a damaged header surfaces as any error at all
        raise UsageError(f"'{path}' is not a readable FFCV file ({_line(error)}): write it again") from None
    return Beton(path, np.asarray(np.memmap(path, np.uint8, "r")), samples)


def verify_beton(path: str | Path, progress: bool = True) -> None:
    """Hold an FFCV file against the SHA-256 in its sidecar, for a flipped byte inside a JPEG still decodes, to garbage;
    then decode all of it.

    Raises:
        UsageError: no sidecar, another hash, or samples that FFCV's decoder refuses.
    """
    beton = open_beton(path)
    expected = _read_sidecar(Path(path)).get("sha256")
    if expected is None:
        raise UsageError(f"'{path}' has no sidecar '{_sidecar(Path(path)).name}' with its SHA-256: write it again")
    if (found := _sha256(Path(path), progress)) != expected:
        raise UsageError(f"'{path}' is damaged: SHA-256 {found[:16]}…, written as {expected[:16]}…; write it again")
    if bad := _undecodable(beton, progress):
        named = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        raise UsageError(
            f"'{path}': {len(bad):,} of {len(beton.samples):,} samples do not decode with FFCV, or to another size "
            f"than the file's tables say (ids {named}): write it again, from sound images"
        )


def write_beton(
    catalog: Catalog,
    path: str | Path,
    mode: Mode = "jpg",
    max_resolution: int | None = None,
    quality: int = 90,
    jpeg_share: float = 0.5,
    smart_threshold: int = 1 << 16,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a catalogue's usable images as an FFCV file with a sidecar ``<path>.json``, both whole or not there.

    A source JPEG that is to be stored as JPEG, and not to be made smaller, keeps its very bytes if FFCV's decoder takes
    them without a warning; all else (CMYK, PNG) is stored as DALI decodes it. FFCV's ``DatasetWriter`` is not used: it
    waits for ever for a worker that failed, and its file depends on the race between workers; this one's does not.

    Args:
        mode: store ``jpg``; ``raw`` pixels; ``smart``, JPEG where the pixels exceed ``smart_threshold`` bytes; or
            ``proportion``, JPEG for a pseudo-random ``jpeg_share`` of the samples.
        max_resolution: longer side at most, pixels; crop boxes are then drawn on the smaller images.
        quality: of the JPEGs made here, 1 to 100.
        workers: threads; default, one a core.

    Raises:
        UsageError: ffcv is missing, an image does not decode, or the path cannot be written.
    """
    path, ffcv = Path(path), _import_ffcv()
    if catalog.beton is not None:
        raise UsageError(f"'{catalog.beton}' is an FFCV file already: give the images that it was written from")
    choose_jpeg = _choose_jpeg(mode, jpeg_share, smart_threshold)
    encode = functools.partial(_encode_sample, ffcv, catalog, choose_jpeg, max_resolution, quality)
    with _replacing(path) as file:
        _write_samples(ffcv, file, catalog, _map(encode, catalog.indices, workers, progress, f"writing {path.name}"))
        resized = f" longer side <= {max_resolution}" if max_resolution else ""
        description = {
            "split": catalog.split,
            "classes": catalog.classes,
            "count": len(catalog.labels),
            "samples": len(catalog.indices),
            "excluded": catalog.excluded,
            "fingerprint": catalog.fingerprint + resized,
            "mode": mode,
            "max_resolution": max_resolution,
            "quality": quality,
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": _sha256(Path(file.name), progress),
        }
        with _replacing(_sidecar(path)) as sidecar:
            sidecar.write(json.dumps(description, indent=1).encode())
    return path


# Decoding ----------------------------------------------------------------------------------------------------------

_IMDECODE = "fasttrain_ffcv_imdecode"  # a linker symbol, not an address: only so can numba cache its callers on disk
_imdecode = numba.types.ExternalFunction(
    _IMDECODE,
    numba.int32(
        *(numba.uintp, numba.uint64, numba.uint32, numba.uint32, numba.uintp, numba.uint32, numba.uint32),
        *(numba.uint32, numba.uint32, numba.uint32, numba.uint32, numba.boolean, numba.boolean),
    ),
)
jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@jit
def imdecode_rgb(encoded, height, width, pixels):
    """Decode a JPEG file's bytes to uint8 [height * width * 3]; False on an error or a warning of libjpeg-turbo's.

    An image of another size is scaled to fit, in silence: see :func:`has_size`.
    """
    source, target = encoded.ctypes.data, pixels.ctypes.data
    return _imdecode(source, encoded.size, height, width, target, height, width, 0, 0, 1, 1, False, False) == 0


@jit
def has_size(data, sample):
    """Whether a payload has the pixels that the file's tables say: a JPEG by its own header."""
    if not sample.jpeg:
        return True  # the tables were compared when the file was opened
    position, end = sample.start + 2, sample.start + sample.nbytes - 9
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:  # SOF0 to SOF15
            height = np.int64(data[position + 5]) << 8 | data[position + 6]
            width = np.int64(data[position + 7]) << 8 | data[position + 8]
            return height == sample.height and width == sample.width
        if marker == 0xFF:  # a fill byte
            position += 1
        else:
            position += 2 + (np.int64(data[position + 2]) << 8 | data[position + 3])
    return False


@jit
def decode_payload(data, sample, pixels):
    """Whether a sample decodes; then, if it is a JPEG, ``pixels`` begin with it."""
    payload = data[sample.start : sample.start + sample.nbytes]
    return not sample.jpeg or imdecode_rgb(payload, sample.height, sample.width, pixels)


@jit
def decode_samples(data, samples, starts, out):
    """Samples into ``out`` from ``starts`` on; returns for each whether it has its size and decodes."""
    sound = np.zeros(len(samples), np.bool_)
    for n in range(len(samples)):
        nbytes = 3 * samples[n].height * samples[n].width
        pixels = out[starts[n] : starts[n] + nbytes]
        sound[n] = has_size(data, samples[n]) and decode_payload(data, samples[n], pixels)
        if sound[n] and not samples[n].jpeg:
            pixels[:] = data[samples[n].start : samples[n].start + nbytes]
    return sound


@jit
def _is_sound(data, samples, n):
    """Whether sample ``n`` has its size and decodes."""
    if not has_size(data, samples[n]):
        return False
    return decode_payload(data, samples[n], np.empty(3 * samples[n].height * samples[n].width, np.uint8))


# Reading -----------------------------------------------------------------------------------------------------------


@functools.cache
def _import_ffcv() -> ModuleType:
    """FFCV with its decoder made known to numba's linker. Importing it sets torch and numba to one thread: put back."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        import ffcv.fields.rgb_image
        import ffcv.libffcv
        import ffcv.reader
        import ffcv.types
    except (ImportError, OSError) as error:
        raise UsageError(f"FFCV cannot be imported ({_line(error)}); install it with: {INSTALL}") from None
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    llvmlite.binding.add_symbol(_IMDECODE, ctypes.cast(ffcv.libffcv.ctypes_imdecode, ctypes.c_void_p).value)
    return ffcv


def _read_samples(ffcv: ModuleType, path: Path, size: int) -> np.ndarray:
    header = np.fromfile(path, ffcv.types.HeaderType, 1)[0]
    if header["version"] != ffcv.types.CURRENT_VERSION:
        raise UsageError(f"'{path}' is not an FFCV file of version {ffcv.types.CURRENT_VERSION}: write it again")
    if header["num_samples"] == 0 or not 0 < header["alloc_table_ptr"] < size:
        raise UsageError(f"the FFCV file '{path}' is cut off, or was never finished: write it again")
    reader = ffcv.reader.Reader(str(path))
    columns = {
        name: reader.metadata[column]
        for name, column in zip(reader.field_names, reader.metadata.dtype.names, strict=True)
    }
    kinds = {name: type(handler) for name, handler in reader.handlers.items()}
    image = next((columns[name] for name, kind in kinds.items() if kind is ffcv.fields.RGBImageField), None)
    integers = [name for name, kind in kinds.items() if kind is ffcv.fields.IntField]
    label = "label" if "label" in integers else next((name for name in integers if name != "index"), None)
    if image is None or label is None:
        raise UsageError(f"'{path}' has the fields {', '.join(columns)}: an image and an integer label are needed")

    samples = np.zeros(len(reader.metadata), SAMPLE)
    samples["id"] = columns["index"] if "index" in integers else np.arange(len(samples))
    samples["label"] = columns[label]
    samples["height"], samples["width"] = image["height"], image["width"]
    samples["jpeg"] = image["mode"] == ffcv.fields.rgb_image.IMAGE_MODES["jpg"]
    samples["start"] = image["data_ptr"]
    table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
    place = np.minimum(np.searchsorted(table["ptr"], image["data_ptr"]), len(table) - 1)
    samples["nbytes"] = table["size"][place]

    samples = samples[np.argsort(samples["id"], kind="stable")]
    pixels = samples["height"].astype(np.int64) * samples["width"] * 3
    sound = (
        len(samples) == header["num_samples"]
        and (table["ptr"][place] == image["data_ptr"]).all()
        and (samples["start"] + samples["nbytes"] <= size).all()
        and (samples["nbytes"] > 0).all()
        and (pixels > 0).all()
        and ((samples["jpeg"] == 1) | (samples["nbytes"] == pixels)).all()
    )
    if not sound:
        raise UsageError(f"the FFCV file '{path}' is cut off or damaged: write it again")
    if samples["id"][0] < 0 or (np.diff(samples["id"]) == 0).any():
        raise UsageError(f"'{path}' has 'index' values that are negative or occur twice: write it again")
    return samples


def _undecodable(beton: Beton, progress: bool) -> list[int]:
    """The ids of the samples that a loader would find damaged."""
    numbers, what = np.arange(len(beton.samples)), f"decoding {beton.path.name}"
    sound = list(_map(lambda n: _is_sound(beton.data, beton.samples, n), numbers, None, progress, what))
    return beton.samples["id"][~np.array(sound)].tolist()


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_sidecar(path: Path) -> dict:
    sidecar = _sidecar(path)
    try:
        said = dict(json.loads(sidecar.read_text()))
        _check_sidecar(said)
        return said
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read '{sidecar}' ({_line(error)}): remove it, or write the FFCV file again") from None


def _check_sidecar(said: dict) -> None:
    """See that what is there has the types that are written: a file may hold anything.

    Raises:
        ValueError: what has not.
    """
    for key, kind in {"bytes": int, "count": int, "fingerprint": str, "sha256": str}.items():
        if not isinstance(said.get(key), kind | None):
            raise ValueError(f"its {key} is {said[key]!r}"[:200])
    classes, excluded = said.get("classes") or [], said.get("excluded", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    pairs = isinstance(excluded, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in excluded)
    if not pairs or not all(isinstance(text, str) for pair in excluded for text in pair):
        raise ValueError("what it excludes is no list of paths and reasons")


def _sha256(path: Path, progress: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar(path.stat().st_size, f"hashing {path.name}", progress, unit="B") as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# Writing -----------------------------------------------------------------------------------------------------------


def _write_samples(
    ffcv: ModuleType, file: BinaryIO, catalog: Catalog, stored: Iterable[tuple[bool, int, int, np.ndarray]]
) -> None:
    """Header, field descriptors, metadata, pages of payloads, allocation table: the first three are written last."""
    fields = {"image": ffcv.fields.RGBImageField(), "label": ffcv.fields.IntField(), "index": ffcv.fields.IntField()}
    descriptors = _describe_fields(ffcv, fields)
    metadata = np.zeros(len(catalog.indices), ffcv.types.get_metadata_type(list(fields.values())))
    images, labels, ids = (metadata[name] for name in metadata.dtype.names)
    labels[:], ids[:] = catalog.labels[catalog.indices], catalog.indices
    allocations = np.zeros(len(metadata), ffcv.types.ALLOC_TABLE_TYPE)
    allocations["sample_id"] = np.arange(len(metadata))
    header = np.zeros((), ffcv.types.HeaderType)
    header["version"], header["page_size"] = ffcv.types.CURRENT_VERSION, PAGE
    header["num_fields"], header["num_samples"] = len(fields), len(metadata)

    position = -(-(header.nbytes + descriptors.nbytes + metadata.nbytes) // PAGE) * PAGE
    for row, (jpeg, height, width, payload) in enumerate(stored):
        if payload.nbytes > PAGE:
            raise UsageError(
                f"{catalog.path(int(ids[row]))}: {payload.nbytes:,} bytes exceed an FFCV page of {PAGE:,}: "
                f"store JPEG, or set max_resolution"
            )
        if position % PAGE + payload.nbytes > PAGE:
            position = -(-position // PAGE) * PAGE
        file.seek(position)
        file.write(payload)
        images["mode"][row] = ffcv.fields.rgb_image.IMAGE_MODES["jpg" if jpeg else "raw"]
        images["height"][row], images["width"][row], images["data_ptr"][row] = height, width, position
        allocations["ptr"][row], allocations["size"][row] = position, payload.nbytes
        position += payload.nbytes
    file.seek(position)
    file.write(allocations.tobytes())
    header["alloc_table_ptr"] = position
    file.seek(0)
    file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
    file.flush()


def _describe_fields(ffcv: ModuleType, fields: dict[str, object]) -> np.ndarray:
    type_ids = {kind: number for number, kind in ffcv.types.TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(fields), ffcv.types.FieldDescType)
    for descriptor, (name, field) in zip(descriptors, fields.items(), strict=True):
        descriptor["type_id"] = type_ids[type(field)]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return descriptors


def _choose_jpeg(mode: Mode, share: float, threshold: int) -> Callable[[int, int], bool]:
    """(id, bytes of pixels) -> whether to store a JPEG."""
    if mode == "proportion":
        return lambda index, nbytes: np.random.Philox(key=index).random_raw() < share * 2.0**64
    if mode == "smart":
        return lambda index, nbytes: nbytes > threshold
    if mode in ("jpg", "raw"):
        return lambda index, nbytes: mode == "jpg"
    raise UsageError(f"mode='{mode}': give jpg, raw, smart or proportion")


def _encode_sample(
    ffcv: ModuleType,
    catalog: Catalog,
    choose_jpeg: Callable[[int, int], bool],
    max_resolution: int | None,
    quality: int,
    index: int,
) -> tuple[bool, int, int, np.ndarray]:
    """(stored as JPEG, height, width, payload uint8 [bytes]) of one sample."""
    try:
        stored = catalog.read(index)
        height, width = header_size(stored) if catalog.encoded else stored.shape[:2]
        jpeg = choose_jpeg(index, height * width * 3)
        fits = max_resolution is None or max(height, width) <= max_resolution
        if jpeg and fits and catalog.encoded and _decodes(stored, height, width):
            return True, height, width, stored
        pixels = _pixels(stored, (height, width)) if catalog.encoded else stored
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{catalog.path(index)} does not decode ({_line(error)}): run launch/prepare.py to leave it out"
        ) from None

    field = ffcv.fields.RGBImageField("jpg" if jpeg else "raw", max_resolution, jpeg_quality=quality)
    record, payload = np.zeros(1, field.metadata_type), []

    def allocate(nbytes: int) -> tuple[int, np.ndarray]:
        payload.append(np.empty(nbytes, np.uint8))
        return 0, payload[0]

    field.encode(record, np.ascontiguousarray(pixels), allocate)
    return jpeg, int(record["height"][0]), int(record["width"][0]), payload[0]


def _decodes(encoded: np.ndarray, height: int, width: int) -> bool:
    if encoded[:2].tobytes() != b"\xff\xd8":
        return False
    return imdecode_rgb(encoded, height, width, np.empty(height * width * 3, np.uint8))


def _pixels(encoded: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A file's image as DALI's loader sees it, uint8 [height, width, 3].

    Raises:
        ValueError: DALI refuses it.
    """
    from fasttrain.data.decoder import Decoder  # DALI: a second to import

    if not hasattr(_thread, "decoder"):
        _thread.decoder = Decoder()
    (pixels,) = _thread.decoder.decode([encoded])
    if isinstance(pixels, str):
        raise ValueError(f"DALI's decoder refuses it: {pixels}")
    if pixels.shape[:2] != size:
        raise ValueError(
            f"its header says {size[0]} x {size[1]} pixels, but it has {pixels.shape[0]} x {pixels.shape[1]}"
        )
    return pixels


def _map(function: Callable, items: np.ndarray, workers: int | None, progress: bool, what: str) -> Iterator:
    """``function`` of every item, in order, by threads that are never more than a few hundred results ahead."""
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool, _bar(len(items), what, progress, unit=" images") as bar:
        for start in range(0, len(items), 64 * workers):
            for result in pool.map(function, items[start : start + 64 * workers].tolist()):
                yield result
                bar.update()


def _bar(total: int, what: str, progress: bool, unit: str) -> tqdm:
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=not (progress and sys.stderr.isatty()),
        dynamic_ncols=True,
    )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place when the block ends well, and is gone when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


__all__ = [
    "INSTALL",
    "SAMPLE",
    "Beton",
    "Listing",
    "imdecode_rgb",
    "jit",
    "open_beton",
    "read_listing",
    "verify_beton",
    "write_beton",
]
