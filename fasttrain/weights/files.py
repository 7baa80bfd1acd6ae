"""What a file is, by its content, and the plain values in it; nothing that a file holds is ever run."""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch

from fasttrain.errors import UsageError

TORCH_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"How torch.save began its files before they were zip archives."
UNPACK = "an archive: unpack it and give the weights in it"
ELSEWHERE = "convert it with the library that wrote it"
SIGNS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the file: run git lfs pull where it comes from"),
    (0, b"\x93NUMPY", "an array of NumPy's, without names"),
    (0, b"\x89HDF\r\n\x1a\n", f"HDF5, as of Keras: {ELSEWHERE}"),
    (0, b"GGUF", f"GGUF: {ELSEWHERE}"),
    (4, b"TFL3", f"TensorFlow Lite: {ELSEWHERE}"),
    (0, b"\x1f\x8b", UNPACK),
    (0, b"BZh", UNPACK),
    (0, b"\xfd7zXZ\0", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", UNPACK),
    (0, b"Rar!", UNPACK),
    (257, b"ustar", UNPACK),
    (0, b"\x89PNG", "an image"),
    (0, b"\xff\xd8\xff", "an image"),
    (0, b"%PDF", "a PDF"),
)
"Position, bytes there, and what a file that has them is."
WANTED = "give a file of torch.save(model.state_dict(), …) or a .safetensors"


class Inert:
    """What stands for an object of a class that is no tensor's: it keeps nothing and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __new__(cls, *_: Any) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def read(path: Path) -> Any:
    """The tensors, numbers, texts, lists and mappings in a file of PyTorch's or of safetensors, whatever its ending.

    PyTorch's are read by its own reader of weights, for which every class that a file names beyond tensors (settings,
    loggers, whole modules) is :class:`Inert`.

    Raises:
        UsageError: it is no such file, or damaged; it says what it is.
    """
    try:
        if not path.is_file():
            raise UsageError(f"'{path}' is neither a file nor a folder: {WANTED}")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error.strerror})") from None
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length + 8 <= size:
        # load_file would refuse a name that is not UTF-8
        return _guarded(path, lambda: safetensors.torch.load(path.read_bytes()))
    zipped = head.startswith(b"PK\x03\x04")
    what = _of_zip(path) if zipped else _what_it_is(path, head)
    if what is not None:
        raise UsageError(f"'{path}' holds no weights that can be read: it is {what}; {WANTED}")
    return _guarded(path, lambda: _read_torch(path, zipped))


def _what_it_is(path: Path, head: bytes) -> str | None:
    """What a file that is no zip archive is, where that is not PyTorch's format."""
    if not head:
        return "empty (0 bytes)"
    if head.startswith(TORCH_BEFORE_ZIP):
        return None
    for position, sign, what in SIGNS:
        if head[position:].startswith(sign):
            return what
    if head[8:10] == b'{"':
        return "a .safetensors that was cut short"
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        return "a web page, as a download leaves it that needs a login or has moved"
    if re.search(r"\.(index|meta|data-\d+-of-\d+)$", path.name):
        return f"a part of a TensorFlow checkpoint: {ELSEWHERE}"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle of Python's own, which is code: it is not opened"
    if head[0] == 0x08 and head[2:3] in (b"\x12", b"\x1a", b""):
        return f"a protocol buffer, as of ONNX and TensorFlow: {ELSEWHERE}"
    try:
        text = head.decode() if len(head) < 512 else head[:-4].decode()
    except UnicodeDecodeError:
        return f"of no known format (it begins with {head[:8]!r})"
    return f"text (it begins with {text[:30]!r})" if text.isprintable() or "\n" in text else "of no known format"


def _of_zip(path: Path) -> str | None:
    """What a zip archive is, where that is not PyTorch's format."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged directory makes it raise many kinds
        return "cut short or damaged: copy or download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, not weights: torch.save(torch.jit.load(…).state_dict(), …) makes them"
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return f"arrays of NumPy's (.npz): {ELSEWHERE}"
    if any(name.endswith("model.weights.h5") for name in names):
        return f"a model of Keras: {ELSEWHERE}"
    return UNPACK


def _guarded(path: Path, work) -> Any:
    try:
        return work()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error})") from None
    except pickle.UnpicklingError as error:
        # PyTorch's own text proposes what cannot be done here, and would not be safe
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{named[1]}, which runs code" if named else "objects of Python's that are not plain"
        raise UsageError(f"'{path}' holds {what}, and is not loaded: {WANTED}") from None
    except Exception as error:  # what a damaged file makes the readers raise is of many kinds
        detail = " ".join(str(error).split())[:120]
        raise UsageError(f"'{path}' is damaged or cut short ({detail}): copy or download it again") from None


def _read_torch(path: Path, zipped: bool) -> Any:
    named = _zip_globals(path) if zipped else _old_globals(path)
    mappings: set[str] = set()
    while True:
        classes = [_stand_in(name, name in mappings) for name in named]
        try:
            # opened here, since of a path PyTorch would go by its ending
            with path.open("rb") as file, torch.serialization.safe_globals(classes):
                return torch.load(file, "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            mapping = re.search(r"Can only SETITEMS? for .* got <class '([^']+)'>", str(error))
            if mapping is None or mapping[1] in mappings:
                raise
            mappings.add(mapping[1])


def _stand_in(name: str, is_mapping: bool) -> type:
    """A class of that full name that is :class:`Inert`, or makes plain mappings."""
    module, _, own = name.rpartition(".")
    made = {"__new__": lambda cls, *_: OrderedDict()} if is_mapping else {}
    return type(own, (Inert,), {"__module__": module, **made})


def _zip_globals(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        with archive.open(name) as file:
            return set(_globals(file))


def _old_globals(path: Path) -> set[str]:
    with path.open("rb") as file:  # the magic number, the version, the machine, and the values
        return {name for _ in range(4) for name in _globals(file)}


def _globals(file: IO[bytes]) -> Iterator[str]:
    """Full names of all classes and functions that a pickle names, by Python 3's names; it is not unpickled."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


__all__ = ["Inert", "read"]
