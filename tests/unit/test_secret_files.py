"""Files for secrets: whole or not at all, and for one account alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flowengine.errors import LocalError, NotFound
from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_secret_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    before = os.umask(0)
    try:
        write_secret(os.fspath(path), b"one")
    finally:
        os.umask(before)
    assert (mode(path), read_secret(os.fspath(path))) == (0o600, b"one")
    write_secret(os.fspath(path), b"two")
    assert read_secret(os.fspath(path)) == b"two"
    with pytest.raises(LocalError):
        write_secret(os.fspath(path), b"three", replace=False)
    assert read_secret(os.fspath(path)) == b"two"
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644])
def test_what_others_can_read_or_change_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "secret"
    write_secret(os.fspath(path), b"one")
    path.chmod(bits)
    with pytest.raises(LocalError, match=f"{bits:04o}") as raised:
        read_secret(os.fspath(path))
    assert "chmod 600" in raised.value.hint


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_secret(os.fspath(tmp_path / "none"))
    with pytest.raises(LocalError):
        read_secret(os.fspath(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(LocalError, match="nothing came by it"):  # and does not wait for a writer
        read_secret(os.fspath(tmp_path / "pipe"))
    with pytest.raises(LocalError, match="no file"):
        read_secret("/dev/null")
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "large").chmod(0o600)
    with pytest.raises(LocalError, match="too large"):
        read_secret(os.fspath(tmp_path / "large"))
    with pytest.raises(LocalError):
        write_secret(os.fspath(tmp_path / "no folder/secret"), b"")


def test_a_secret_comes_by_a_pipe_as_a_shell_makes_them(tmp_path: Path) -> None:
    script = (
        "import sys; from flowengine.store.secret_files import read_secret; print(read_secret(sys.argv[1]))"
    )
    command = f'"{sys.executable}" -c "{script}" <(printf one; printf " secret")'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "b'one secret'\n"


def test_a_pipe_that_others_can_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "pipe").chmod(0o640)
    with pytest.raises(LocalError, match="0640"):
        read_secret(os.fspath(tmp_path / "pipe"))


def test_a_name_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "secret").symlink_to("other")
    write_secret(os.fspath(tmp_path / "secret"), b"one")
    assert (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "secret").is_symlink()


def test_a_folder_that_others_can_write_into_is_refused(tmp_path: Path) -> None:
    make_secret_folder(os.fspath(tmp_path / "a/b"))
    assert mode(tmp_path / "a/b") == 0o700
    make_secret_folder(os.fspath(tmp_path / "a/b"))
    (tmp_path / "a/b").chmod(0o730)
    with pytest.raises(LocalError, match="write into"):
        make_secret_folder(os.fspath(tmp_path / "a/b"))
