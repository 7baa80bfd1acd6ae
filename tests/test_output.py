"""Where results go: tried before the work, written whole after it."""

from __future__ import annotations

import os

import pytest

from fasttrain.errors import UsageError
from fasttrain.output import try_output, write_output

REMEDY = "choose another place with output=…"


def test_a_folder_is_made_and_the_trial_leaves_and_changes_nothing(tmp_path):
    path = tmp_path / "new/deep/result.json"
    try_output(path, REMEDY)
    assert path.parent.is_dir() and not list(path.parent.iterdir())
    path.write_text("earlier")
    try_output(path, REMEDY)
    assert path.read_text() == "earlier" and list(path.parent.iterdir()) == [path]
    write_output(path, "now", REMEDY)
    assert path.read_text() == "now" and list(path.parent.iterdir()) == [path]


def test_a_folder_and_a_place_below_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file/result.json"):
        with pytest.raises(UsageError, match=rf"'{path}' cannot be written \(.*choose another place with output=…"):
            try_output(path, REMEDY)


def full(tmp_path, monkeypatch):
    def write(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", write)


@pytest.mark.parametrize("use", [try_output, lambda path, remedy: write_output(path, "now", remedy)])
def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path, monkeypatch, use):
    path = tmp_path / "result.json"
    path.write_text("earlier")
    full(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="No space left on device"):
        use(path, REMEDY)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_and_stays_one(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    try_output(path, REMEDY)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_output(path, "now", REMEDY)
    assert os.read(reader, 9) == b"now" and path.is_fifo()
    os.close(reader)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "result.json"
    link.symlink_to(tmp_path / "elsewhere/result.json")
    try_output(link, REMEDY)
    write_output(link, "now", REMEDY)
    assert link.is_symlink() and (tmp_path / "elsewhere/result.json").read_text() == "now"
