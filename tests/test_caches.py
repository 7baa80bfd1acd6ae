"""Where caches go when nothing can be written at home, and who may be trusted there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fasttrain_kernels import caches

ROOT = Path(__file__).parent.parent


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files of a user whose home is no folder, and none of whose variables are set."""
    (tmp_path / "home").write_text("")
    (tmp_path / "tmp").mkdir()
    for variable in ("XDG_CACHE_HOME", *caches.TOOLS, "RANK"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_without_a_home_all_caches_are_in_one_private_folder_that_stays(nowhere, capfd):
    caches.settle()
    own = nowhere / f"fasttrain-{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700 and os.environ["XDG_CACHE_HOME"] == str(own)
    assert all(os.environ[name].startswith(str(own)) for name in ("TRITON_HOME", "MPLCONFIGDIR"))
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "set XDG_CACHE_HOME to a folder" in said and str(own) in said
    caches.settle()  # as a child process does, which inherits the variables
    os.environ.pop("XDG_CACHE_HOME")
    os.environ["RANK"] = "1"
    caches.settle()  # as the other ranks do, and the next start
    assert os.environ["XDG_CACHE_HOME"] == str(own) and capfd.readouterr().err == ""
    assert [path.name for path in nowhere.iterdir()] == [own.name]


@pytest.mark.parametrize("what", ["readable by others", "a link", "a file"])
def test_a_folder_of_that_name_that_others_may_have_made_is_not_used(nowhere, what):
    own = nowhere / f"fasttrain-{os.getuid()}"
    if what == "a link":
        (nowhere / "theirs").mkdir(mode=0o700)
        own.symlink_to(nowhere / "theirs")
    elif what == "a file":
        own.write_text("")
    else:
        own.mkdir()
        own.chmod(0o755)
    first = caches.private_folder()
    assert Path(first).name.startswith(f"{own.name}-") and stat.S_IMODE(os.stat(first).st_mode) == 0o700
    assert caches.private_folder() == first  # and again at the next start


def test_places_that_can_be_written_are_left_as_they_are(nowhere, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "good"))
    caches.settle()
    assert "XDG_CACHE_HOME" not in os.environ and not any(name in os.environ for name in caches.TOOLS)
    assert not list(nowhere.iterdir()) and capfd.readouterr().err == ""


def test_a_variable_that_names_a_place_that_cannot_be_written_is_named(nowhere, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/numba")
    caches.settle()
    assert os.environ["NUMBA_CACHE_DIR"].startswith(str(tmp_path / "cache"))
    assert "NUMBA_CACHE_DIR=/dev/null/numba cannot be written (Not a directory)" in capfd.readouterr().err


def test_without_any_place_to_write_there_is_one_line(nowhere, capfd, monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(tempfile, "gettempdir", none)
        caches.settle()
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "set XDG_CACHE_HOME and TMPDIR" in said


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user without a name")
def test_a_user_without_a_name_or_a_home_can_import_and_compile():
    """Packages that root installed: nothing of this user's is written beside them."""
    modules = "fasttrain_kernels.augment.cpu, getpass, matplotlib"
    program = f"import {modules}; matplotlib.get_configdir(); print(getpass.getuser())"
    user = {"user": 54321, "group": 54321, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        environment = {"PATH": os.environ["PATH"], "TMPDIR": folder, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}

        def run(code: str) -> subprocess.CompletedProcess:
            arguments = [sys.executable, "-c", code]
            return subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd="/", **user)

        try:
            reachable = run("import torch, fasttrain_kernels.heap").returncode == 0
        except PermissionError:
            reachable = False
        if not reachable:
            pytest.skip("Python or this checkout lies where no other user can read it")
        done = run(program)
        assert (done.returncode, done.stdout) == (0, "54321\n"), done.stderr
        assert done.stderr.count("\n") == 1 and f"{folder}/fasttrain-54321" in done.stderr
