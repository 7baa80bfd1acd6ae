"""The quarantine: what is caught, why, and what is fine although it looks odd; prepare.py from end to end."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data import manifest
from fasttrain.data.catalog import DataConfig, header_size, open_catalog
from fasttrain.data.verify import inspect, verify
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
    BROKEN[f"progressive cut to {_share:.0%}"] = PROGRESSIVE[: int(len(PROGRESSIVE) * _share)], "does not decode|no image header"
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
    assert "images/s" in done.stdout and not done.stderr  # no terminal, no bar

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
