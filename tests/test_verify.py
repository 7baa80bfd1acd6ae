"""The quarantine: what is caught, why, and what is fine although it looks odd; prepare.py from end to end."""

import io
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data import manifest
from fasttrain.data.catalog import DataConfig, header_size, open_catalog
from fasttrain.data.verify import _map, examine, inspect, verify
from fasttrain.errors import UsageError

PREPARE = Path(__file__).parents[1] / "launch" / "prepare.py"


def encode(kind="JPEG", mode="RGB", **settings):
    ramp = np.add.outer(np.arange(40) * 3, np.arange(50) * 2)[..., None] + np.array([0, 20, 40])
    pixels = (ramp + np.random.default_rng(0).integers(0, 20, ramp.shape)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **settings)
    return stream.getvalue()


JPEG, PROGRESSIVE, PNG = encode(), encode(progressive=True), encode("PNG")
SOUND = {
    "plain": JPEG,
    "progressive": PROGRESSIVE,
    "grey": encode(mode="L"),
    "cmyk": encode(mode="CMYK"),
    "png": PNG,
    "transparent png": encode("PNG", "RGBA"),
    "palette png": encode("PNG", "P"),
    "one-bit png": encode("PNG", "1"),
    "webp": encode("WEBP"),
    "bmp": encode("BMP"),
    "tiff": encode("TIFF"),
    "ppm": encode("PPM"),
    "jpeg with a tail": JPEG + b"junk" * 9,
}
BROKEN = {
    "empty": (b"", "empty file"),
    "html": (b"<!DOCTYPE html><html></html>", r"wrong format: begins with b'<!DOCTYPE html"),
    "gif": (encode("GIF", "P"), "wrong format: begins with b'GIF8"),
    "noise": (bytes(range(256)) * 8, "wrong format"),
    "jpeg's first bytes": (b"\xff\xd8\xff\xe0" + bytes(300), "no image header: a JPEG without a frame"),
    "zeros within": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "does not decode"),
    "png, pixel data changed": (PNG[:90] + bytes(16) + PNG[106:], "does not decode"),
    "png without its end": (PNG[:-12], "does not decode"),
    "png, checksum changed": (PNG.replace(b"IEND\xaeB`\x82", b"IEND\xaeB`\x83"), "does not decode"),
}
for _share in (0.05, 0.3, 0.6, 0.9, 0.98):
    BROKEN[f"jpeg cut to {_share:.0%}"] = JPEG[: int(len(JPEG) * _share)], "does not decode|no image header"
    BROKEN[f"progressive cut to {_share:.0%}"] = (
        PROGRESSIVE[: int(len(PROGRESSIVE) * _share)],
        "does not decode|no image header",
    )
    BROKEN[f"png cut to {_share:.0%}"] = PNG[: int(len(PNG) * _share)], "does not decode"
for _missing in (1, 2, 3, 8):
    BROKEN[f"jpeg, last {_missing} missing"] = JPEG[:-_missing], "does not decode"
    BROKEN[f"png, last {_missing} missing"] = PNG[:-_missing], "does not decode"


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_called_jpg_pass_with_their_size(tmp_path, name):
    path = tmp_path / "image.jpg"
    path.write_bytes(SOUND[name])
    assert inspect(str(path)) == (40, 50) == header_size(np.frombuffer(SOUND[name], np.uint8))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_caught_with_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    finding = inspect(str(path))
    assert isinstance(finding, str), "accepted"
    assert re.match(reason, finding), finding
    assert "\n" not in finding


def test_a_file_that_cannot_be_read(tmp_path):
    assert inspect(str(tmp_path / "gone.jpg")) == "cannot be read: No such file or directory"
    (tmp_path / "folder.jpg").mkdir()
    assert inspect(str(tmp_path / "folder.jpg")) == "cannot be read: Is a directory"


def corrupted(content, rng):
    """Cut, overwritten with noise, or with zeros to the end, at a random place."""
    at = int(rng.integers(2, len(content)))
    noise = rng.integers(0, 256, 12, np.uint8).tobytes()
    return [content[:at], content[:at] + noise + content[at + 12 :], content[:at] + bytes(len(content) - at)]


def test_whatever_dali_dies_of_is_caught(tmp_path):
    """The second opinion: a decoder that takes the whole run down when it fails."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline, types

    def decodes(content):
        with Pipeline(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True) as pipeline:
            source = fn.external_source(source=lambda: [np.frombuffer(content, np.uint8)], dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(source, output_type=types.RGB, adjust_orientation=False))
        try:
            return tuple(pipeline.run()[0].as_cpu().at(0).shape) == (40, 50, 3)
        except RuntimeError:
            return False

    assert [name for name, content in SOUND.items() if not decodes(content)] == []
    rng, path = np.random.default_rng(1), tmp_path / "image.jpg"
    caught = 0
    for content in [bad for _ in range(8) for good in (JPEG, PROGRESSIVE, PNG) for bad in corrupted(good, rng)]:
        path.write_bytes(content)
        finding = inspect(str(path))
        caught += isinstance(finding, str)
        assert isinstance(finding, str) or decodes(content), f"accepted: {content[:8]} of {len(content)} bytes"
    assert caught > 30


# Sizes and pixels, whatever the format ------------------------------------------------------------------------------

GREY = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
RAMP = np.linspace(0, 255, 50).astype(np.uint8)[None].repeat(40, 0)


def save(image, kind, **settings):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **settings)
    return stream.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return {
        "jpeg": save(RGB, "JPEG", quality=97, subsampling=0, exif=exif),
        "png": save(RGB, "PNG", exif=exif),
        "webp": save(RGB, "WEBP", lossless=True, exif=exif),
        "tiff": save(RGB, "TIFF", tiffinfo={274: orientation}),
        "tiff, compressed": save(RGB, "TIFF", tiffinfo={274: orientation}, compression="tiff_lzw"),
    }


def pnm(kind, most, pixels):
    """A P``kind`` file of values up to ``most``."""
    height, width = pixels.shape[:2]
    scaled = np.rint(pixels.astype(float) * (most or 1) / 255).astype(int)
    if kind in (1, 4):
        scaled = 1 - scaled
    if kind < 4:
        body = (" ".join(map(str, scaled.ravel())) + "\n").encode()
    elif kind == 4:
        body = np.packbits(scaled, axis=1).tobytes()
    else:
        body = scaled.astype(np.uint8 if most < 256 else ">u2").tobytes()
    return b"P%d\n# made here\n%d %d\n" % (kind, width, height) + (b"%d\n" % most if most else b"") + body


def tiff(pixels, space, **tags):
    """One strip, little-endian: ``space`` is the PhotometricInterpretation, ``tags`` are others, _number=value."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    bits, data = 8 * pixels.itemsize, np.ascontiguousarray(pixels).tobytes()
    entries = {256: pixels.shape[1], 257: pixels.shape[0], 258: bits, 262: space, 273: 8, 277: channels, 279: len(data)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    kinds = dict.fromkeys((256, 257, 273, 279), 4)  # LONG, the rest SHORT
    return head + b"".join(struct.pack("<HHII", n, kinds.get(n, 3), 1, entries[n]) for n in sorted(entries)) + bytes(4)


def without_adobe(jpeg):
    at = jpeg.find(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def decoded(content):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fasttrain.data.decoder import Decoder

    (pixels,) = Decoder().decode([np.frombuffer(content, np.uint8)])
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_pixels_are_as_stored_whatever_the_orientation(orientation):
    files = oriented(orientation)
    contents = [np.frombuffer(content, np.uint8) for content in files.values()]
    assert [header_size(content) for content in contents] == examine(contents) == [(40, 50)] * len(files)
    for name, content in files.items():
        pixels = decoded(content).astype(int)
        assert pixels.shape == RGB.shape and abs(pixels - RGB).max() <= (8 if name == "jpeg" else 0), name


TOP_DOWN = bytearray(save(RGB[::-1], "BMP"))
TOP_DOWN[22:26] = struct.pack("<i", -40)
SIXTEEN = GREY.astype(np.uint16) * 257
RGBA = np.dstack([RGB, RAMP])
RIGHT = {  # file's bytes, its picture
    "bmp, first row at the top": (bytes(TOP_DOWN), RGB),
    "png of 16 bits": (save(SIXTEEN, "PNG"), GREY),
    "png with alpha": (save(RGBA, "PNG"), RGB),
    "grey png with alpha": (save(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(RAMP)]), "PNG"), GREY),
    "png palette with transparency": (save(Image.fromarray(GREY).convert("P"), "PNG", transparency=7), GREY),
    "animated png": (save(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), RGB),
    "webp with alpha": (save(RGBA, "WEBP", lossless=True, exact=True), RGB),
    "animated webp": (save(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(RGB[::-1])]), RGB),
    "cmyk jpeg of Adobe's": (save(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=97), RGB),
    "progressive jpeg": (save(RGB, "JPEG", quality=97, progressive=True, subsampling=0), RGB),
    "tiff of several pages": (save(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(RGB[:9, :9])]), RGB),
    "tiff of 16 bits": (tiff(SIXTEEN, 1), GREY),
    "tiff of 16 bits, big-endian": (save(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"), GREY),
    "tiff with alpha": (tiff(RGBA, 2, _338=2), RGB),
    "cmyk tiff": (save(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "tiff, white is 0": (tiff(255 - GREY, 0), GREY),
    "tiff whose kind of numbers is only said to be whole": (tiff(GREY, 1, _339=1), GREY),
    "bigtiff": (save(RGB, "TIFF", big_tiff=True), RGB),
    "P1": (pnm(1, 0, GREY // 128 * 255), GREY // 128 * 255),
    "P4": (pnm(4, 0, GREY // 128 * 255), GREY // 128 * 255),
    **{f"P{kind} of {most}": (pnm(kind, most, GREY), GREY) for kind in (2, 5) for most in (255, 65535)},
    **{f"P{kind} of {most}": (pnm(kind, most, RGB), RGB) for kind in (3, 6) for most in (255, 65535)},
    "P2 of 100": (pnm(2, 100, GREY), GREY),
    "one pixel": (save(RGB[:1, :1], "PNG"), RGB[:1, :1]),
    "one column": (save(RGB[:, :1], "WEBP", lossless=True), RGB[:, :1]),
    "one row": (save(RGB[:1], "TIFF"), RGB[:1]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_taken_is_shown_rightly(name):
    content, picture = RIGHT[name]
    picture = picture if picture.ndim == 3 else picture[..., None].repeat(3, 2)
    assert examine([np.frombuffer(content, np.uint8)]) == [picture.shape[:2]]
    error = abs(decoded(content).astype(int) - picture)
    assert error.mean() < 2 and error.max() <= (12 if "jpeg" in name else 2)


HUGE = bytearray(PNG)
HUGE[16:24] = struct.pack(">II", 70_000, 70_000)
NOTHING = bytearray(PNG)
NOTHING[16:20] = bytes(4)
TWELVE = bytearray(JPEG)
TWELVE[JPEG.find(b"\xff\xc0") + 4] = 12
TORN = save(np.random.default_rng(0).integers(0, 256, RGB.shape, np.uint8), "TIFF", compression="tiff_lzw")
TORN = TORN[:900] + bytes(90) + TORN[990:]
REFUSED = {
    **{f"P{k} of {most}": (pnm(k, most, GREY), f"a P{k} image whose maximum is") for k, most in [(5, 15), (2, 1023)]},
    **{f"P{k} of {most}": (pnm(k, most, RGB), f"a P{k} image whose maximum is") for k, most in [(6, 15), (6, 1023)]},
    "floating-point tiff": (tiff((GREY / 255).astype(np.float32), 1, _339=3), "a TIFF of signed or floating-point"),
    "tiff of signed 32 bits": (save(GREY.astype(np.int32), "TIFF"), "a TIFF of signed or floating-point"),
    "grey tiff with alpha": (tiff(np.dstack([GREY, RAMP]), 1, _338=2), "a TIFF of 2 channels in grey"),
    "three channels that are said to be grey": (tiff(RGB, 1), "a TIFF of 3 channels in grey"),
    "L*a*b* tiff": (tiff(RGB, 8), "a TIFF whose PhotometricInterpretation is 8"),
    "tiff of 16 bits, white is 0": (tiff(65535 - SIXTEEN, 0), "a TIFF of 16 bits a sample where 0 is white"),
    "cmyk jpeg of nobody's": (without_adobe(encode(mode="CMYK")), "a CMYK JPEG without Adobe's marker"),
    "jpeg of 12 bits": (bytes(TWELVE), "a JPEG of 12 bits a sample"),
    "a header that asks for all memory": (bytes(HUGE), "its header says 70,000 x 70,000 pixels"),
    "no pixel": (bytes(NOTHING), "no image: its header says 40 x 0 pixels"),
    "of one bit, which the tiff leaves unsaid": (
        save(Image.fromarray(GREY).convert("1"), "TIFF"),
        "does not decode: DALI",
    ),
    "damaged within, which DALI takes in silence": (TORN, "does not decode: decoder error"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_shown_wrongly_or_not_at_all_is_refused_by_name(name):
    content, reason = REFUSED[name]
    content = np.frombuffer(content, np.uint8)
    (finding,) = examine([content])
    assert isinstance(finding, str) and finding.startswith(reason), finding
    if not reason.startswith("does not decode"):  # the loaders and the FFCV writer hear it too
        with pytest.raises(ValueError, match=re.escape(reason)):
            header_size(content)


def test_a_damaged_header_is_a_value_error(tmp_path):
    rng = np.random.default_rng(3)
    for content, _ in itertools.chain(RIGHT.values(), REFUSED.values()):
        for _ in range(20):
            damaged = np.frombuffer(content, np.uint8)[: rng.integers(0, 200)].copy()
            damaged[rng.integers(0, max(1, len(damaged)), min(4, len(damaged)))] = rng.integers(0, 256)
            try:
                height, width = header_size(damaged)
                assert height > 0 < width
            except ValueError as error:
                assert "\n" not in str(error)


def _dies_of_evil(paths):
    if any("evil" in path for path in paths):
        os.kill(os.getpid(), signal.SIGSEGV)
    return [((1, 1), len(path)) for path in paths]


def test_a_file_that_kills_the_decoder_is_found_and_costs_no_other():
    paths = [f"{n:02d}" for n in range(12)]
    paths[5] = "evil"
    chunks = [paths[:4], paths[4:8], paths[8:]]
    found = list(itertools.chain.from_iterable(_map(_dies_of_evil, chunks, 2)))
    assert [finding for finding, _ in found] == [(1, 1)] * 5 + ["does not decode: the decoder's process dies of it"] + [
        (1, 1)
    ] * 6


def test_where_every_file_kills_the_decoder_it_is_not_the_files(monkeypatch):
    monkeypatch.setattr("fasttrain.data.verify._MOST_KILLERS", 2)
    with pytest.raises(UsageError, match="decoding was killed at 3 files, perhaps for want of memory: lower workers"):
        list(_map(_dies_of_evil, [["evil"]] * 4, 1))


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(3):
                (root / split / label / f"{number}.jpg").write_bytes(JPEG)
    (root / "train/a/1.jpg").write_bytes(JPEG[:-100])
    (root / "train/b/0.jpg").write_bytes(b"<html>")
    (root / "train/b/1.jpg").write_bytes(b"")
    (root / "train/b/2.jpg").write_bytes(PNG)
    return root


def test_prepare_verifies_writes_and_tells(data):
    """The command itself: quarantine, summary, manifest, then a run that uses them."""
    done = subprocess.run(
        [sys.executable, PREPARE, f"data.root={data}", f"data.cache={data.parent / 'cache'}", "workers=2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "train: 3 images of 2 classes" in done.stdout and "left out: 3" in done.stdout
    assert "val: 6 images of 2 classes" in done.stdout and f"{data}/val/{manifest.NAME}" in done.stdout
    assert re.search(r"decoded by DALI \d.*images/s", done.stdout) and not done.stderr  # no terminal, no bar

    catalog = open_catalog(DataConfig(root=str(data)), "train")
    assert catalog.indices.tolist() == [0, 2, 5]
    assert catalog.sizes.tolist() == [[40, 50], [0, 0], [40, 50], [0, 0], [0, 0], [40, 50]]
    reasons = {Path(path).name + Path(path).parent.name: reason for path, reason in catalog.excluded}
    assert reasons["1.jpga"].startswith("does not decode: image file is truncated")
    assert reasons["0.jpgb"].startswith("wrong format: begins with b'<html>'")
    assert reasons["1.jpgb"] == "empty file"


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr("fasttrain.data.verify._map", lambda function, items, workers: map(function, items))


def open_unverified(data):
    return open_catalog(DataConfig(root=str(data)), "train", use_manifest=False)


def test_verifying_again_takes_mended_files_back(data, tmp_path, in_process):
    verify(open_unverified(data), tmp_path / "cache")
    before = open_catalog(DataConfig(root=str(data)), "train")
    (data / "train/a/1.jpg").write_bytes(JPEG)
    verify(open_unverified(data), tmp_path / "cache")
    after = open_catalog(DataConfig(root=str(data)), "train")
    assert set(after.indices) - set(before.indices) == {1} and after.fingerprint != before.fingerprint


def test_a_class_without_one_image_that_decodes_is_a_mistake(data, tmp_path, in_process):
    (data / "train/b/2.jpg").write_bytes(PNG[:-30])  # begins like an image, so that opening alone does not notice
    with pytest.raises(UsageError, match=r"class folder '.*/train/b' has no readable image"):
        verify(open_unverified(data), tmp_path / "cache")
    with pytest.raises(UsageError, match="no readable image"):
        open_catalog(DataConfig(root=str(data)), "train")
    (data / "train/b/2.jpg").write_bytes(PNG)
    assert "train: 3 images" in verify(open_unverified(data), tmp_path / "cache")


def test_an_interrupted_verification_leaves_the_old_manifest(data, tmp_path, in_process, monkeypatch):
    verify(open_unverified(data), tmp_path / "cache")
    content = (data / "train" / manifest.NAME).read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        verify(open_unverified(data), tmp_path / "cache")
    assert [path.read_bytes() for path in (data / "train").glob(".*")] == [content]


def test_no_place_for_the_manifest(data, in_process, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(manifest, "_write", refuse)
    with pytest.raises(UsageError, match=r"cannot write a manifest to .* nor to .*: Read-only file system"):
        verify(open_unverified(data), data.parent / "cache")
