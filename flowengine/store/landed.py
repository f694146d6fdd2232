"""What is kept in the user's state directory about a target directory: what last landed there, and its index."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from blake3 import blake3

from flowengine.store.filesystem import local_error
from flowengine.store.scan_cache import state_directory

__all__ = ["LandedManifest", "index_exists", "index_folder"]


def index_folder(root: bytes, profile_name: str, directory: str | None = None) -> str:
    """Where the chunk index of a target root is kept."""
    name = f"{blake3(os.path.realpath(root)).hexdigest(16)}-{profile_name}"
    return os.path.join(directory or state_directory(), "index", name)


def index_exists(root: bytes, profile_name: str) -> bool:
    """Whether a target root has a chunk index; cheap, without loading what reads one."""
    return os.path.isdir(index_folder(root, profile_name))


class LandedManifest:
    """Where one target's manifest is; written beside and renamed when the transfer is complete.

    Args:
        target: absolute, resolved path of the target directory.
        directory: state directory; the user's where None.
    """

    def __init__(self, target: bytes, directory: str | None = None) -> None:
        folder = os.path.join(directory or state_directory(), "landed")
        self.path = os.path.join(folder, blake3(os.path.realpath(target)).hexdigest(16) + ".flowmanifest")
        with self._errors():
            os.makedirs(folder, mode=0o700, exist_ok=True)
        self._part = f"{self.path}.{os.getpid()}.part"
        self._file: BinaryIO | None = None

    def is_partial(self) -> bool:
        """Whether the version was copied beside other things, so that these are not extra."""
        return os.path.exists(f"{self.path}.beside")

    def begin(self) -> Callable[[bytes], object]:
        """Start writing; gives the sink for the manifest's bytes."""
        with self._errors():
            fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        file = self._file = open(fd, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by commit or abandon

        def write(data: bytes) -> None:
            with self._errors():
                file.write(data)

        return write

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise local_error(error, "cannot keep the manifest in", os.fsencode(self.path)) from error

    def commit(self, *, beside: bool) -> None:
        """The version landed: make its manifest the one to verify against.

        Args:
            beside: it consists of named items, which may stand beside others in the target.
        """
        with self._errors():
            self._commit(beside)

    def _commit(self, beside: bool) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        marker = f"{self.path}.beside"
        if beside:
            with open(marker, "wb"):
                pass
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(marker)
        os.replace(self._part, self.path)

    def abandon(self) -> None:
        """The version did not land whole; the one before stays."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which may be what failed
                self._file.close()
            self._file = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._part)
