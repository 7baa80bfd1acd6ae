"""How large the image of a file is, as its header says: the one place where files are looked at before DALI has them.

Sizes are of the pixels **as stored**: orientation tags (EXIF's in JPEG, PNG and WebP; TIFF's own) are ignored, by DALI
(``adjust_orientation=False``), by FFCV and here. Pillow obeys TIFF's.

Whatever the format, a picture is what DALI makes of it: colours without their alpha, 16 bits scaled to 8, the first
page or frame. What it gets wrong, by the measure of the format's definition, is refused here by name, so that loaders,
launch/prepare.py and the FFCV writer refuse it alike:

=====  ==============================================================================================================
JPEG   other than 8 bits a sample; CMYK without Adobe's marker, which alone says whether its values are inverted
PNM    binary with a maximum other than 255 or 65535, ASCII with one between: too dark
TIFF   numbers that are signed or floating-point (they have no scale); grey with further channels; 16-bit grey where 0
       is white; 16 bits in planes or with a palette; L*a*b*, and all other colour spaces but grey, RGB, palette, CMYK
       and YCbCr
all    no pixel, or more than Pillow's limit: a header that lies could ask for all memory
=====  ==============================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

MOST_PIXELS = 178_956_970  # where Pillow takes an image for a decompression bomb

_PNM_HEADER = re.compile(rb"P([1-6])" + 2 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"(?:(?:\s|#[^\n]*\n)+(\d{1,9}))?")
_TIFF_COLOURS = {0: ("grey", 1), 1: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 5: ("CMYK", 4), 6: ("YCbCr", 3)}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's SOF0 to SOF15
_LONGEST = 4096  # bytes, of a PNM header with its comments


def header_size(encoded: np.ndarray) -> tuple[int, int]:
    """(height, width) of the pixels as stored, from a file's bytes, undecoded. A few microseconds for a JPEG.

    Raises:
        ValueError: no header of a known format, or one of an image that is refused; the message says why.
    """
    data = memoryview(encoded)  # type: ignore[arg-type]
    try:
        height, width = _reader(bytes(data[:16]))(data)
    except (IndexError, KeyError):
        raise ValueError("no image header: it is cut off or damaged") from None
    if not (height and width):
        raise ValueError(f"no image: its header says {height} x {width} pixels")
    if height * width > MOST_PIXELS:
        raise ValueError(f"its header says {height:,} x {width:,} pixels: more than {MOST_PIXELS:,} are not decoded")
    return height, width


def _reader(start: bytes) -> Callable[[memoryview], tuple[int, int]]:
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return _png
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff
    if start[:2] == b"BM":
        return _bmp
    if re.match(rb"P[1-6][\s#]", start):
        return _pnm
    raise ValueError(f"wrong format: begins with {start!r}")


def _jpeg(data: memoryview) -> tuple[int, int]:
    position, adobe = 2, False
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAMES:
            if data[position + 4] != 8:
                raise ValueError(f"a JPEG of {data[position + 4]} bits a sample: only 8 are shown rightly")
            if data[position + 9] == 4 and not adobe:
                raise ValueError("a CMYK JPEG without Adobe's marker: whether its values are inverted is not said")
            return _number(data, position + 5, 2, "big"), _number(data, position + 7, 2, "big")
        if marker in (0xD8, 0xD9, 0xDA):
            break
        if marker == 0xEE:
            adobe |= data[position + 4 : position + 9] == b"Adobe"
        # a fill byte, or a segment with its length
        position += 1 if marker == 0xFF else 2 + (data[position + 2] << 8 | data[position + 3])
    raise ValueError("no image header: a JPEG without a frame before its first scan")


def _png(data: memoryview) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("no image header: a PNG that does not begin with IHDR")
    return _number(data, 20, 4, "big"), _number(data, 16, 4, "big")


def _webp(data: memoryview) -> tuple[int, int]:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        return 1 + _number(data, 27, 3), 1 + _number(data, 24, 3)
    if kind == b"VP8L":
        bits = _number(data, 21, 4)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 ":
        return _number(data, 28, 2) & 0x3FFF, _number(data, 26, 2) & 0x3FFF
    raise ValueError(f"no image header: a WebP that begins with {kind!r}")


def _bmp(data: memoryview) -> tuple[int, int]:
    if _number(data, 14, 4) == 12:  # OS/2's header
        return _number(data, 20, 2), _number(data, 18, 2)
    height = _number(data, 22, 4)
    return min(height, 2**32 - height), _number(data, 18, 4)  # negative: the first row is the top one


def _pnm(data: memoryview) -> tuple[int, int]:
    found = _PNM_HEADER.match(data[:_LONGEST])
    if found is None:
        raise IndexError
    kind, width, height, most = (int(number or 0) for number in found.groups())
    if kind not in (1, 4) and most != 65535 and (most > 255 or (kind > 3 and most < 255)):
        raise ValueError(f"a P{kind} image whose maximum is {most:,}: only 255 and 65,535 are scaled rightly")
    return height, width


def _tiff(data: memoryview) -> tuple[int, int]:
    tags = _tiff_tags(data)
    height, width = tags[257][0], tags[256][0]
    space, channels, bits = tags.get(262, (None,))[0], tags.get(277, (1,))[0], max(tags.get(258, (1,)))
    if any(number != 1 for number in tags.get(339, ())):
        raise ValueError("a TIFF of signed or floating-point numbers: they have no scale of grey levels")
    if space not in _TIFF_COLOURS:
        raise ValueError(f"a TIFF whose PhotometricInterpretation is {space or 'missing'}: not shown rightly")
    colours, needed = _TIFF_COLOURS[space]
    if channels < needed or (channels > 1 and needed == 1):
        raise ValueError(f"a TIFF of {channels} channels in {colours}: not shown rightly")
    in_planes = channels > 1 and tags.get(284) == (2,)
    if bits > 8 and (space in (0, 3) or in_planes):
        how = {0: "where 0 is white", 3: "with a palette"}.get(space, "in planes")
        raise ValueError(f"a TIFF of {bits} bits a sample {how}: not shown rightly")
    return height, width


def _tiff_tags(data: memoryview) -> dict[int, tuple[int, ...]]:
    """The whole-number tags of the first page."""
    order = "little" if data[0] == ord("I") else "big"
    big = ord("+") in data[2:4]  # BigTIFF
    word, head, length = (8, 8, 20) if big else (4, 2, 12)
    page = _number(data, 8 if big else 4, word, order)
    tags = {}
    for entry in range(page + head, page + head + length * _number(data, page, head, order), length):
        tag, kind, count = (_number(data, entry + at, size, order) for at, size in ((0, 2), (2, 2), (4, word)))
        size = {1: 1, 3: 2, 4: 4, 16: 8}.get(kind)
        if size is None or not 0 < count <= 16:  # a text, a fraction; a table
            continue
        at = entry + 4 + word if count * size <= word else _number(data, entry + 4 + word, word, order)
        tags[tag] = tuple(_number(data, at + i * size, size, order) for i in range(count))
    return tags


def _number(data: memoryview, at: int, size: int, order: str = "little") -> int:
    """The unsigned number in ``size`` bytes at ``at``; an IndexError where they are not there."""
    data[at + size - 1]
    return int.from_bytes(data[at : at + size], order)


__all__ = ["MOST_PIXELS", "header_size"]
