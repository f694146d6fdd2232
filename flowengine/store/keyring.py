"""The sealing keys of a site: one file each, readable by the agent's account alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from flowengine.errors import LocalError, NotFound
from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret
from flowengine.trust.sealing_keys import KeptKey, OpeningKey, dump_key, load_key, make_key

__all__ = ["Keyring"]

_SUFFIX: Final = ".key"
_OPENING: Final = "opening.secret"


class Keyring:
    """Keys in a folder. May be used from any thread.

    Args:
        folder: made when the first key is.
    """

    def __init__(
        self,
        folder: str,
        *,
        clock: Callable[[], float] = time.time,
        rng: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.folder = folder
        self._clock = clock
        self._rng = rng
        self._lock = threading.Lock()

    def kept(self) -> list[KeptKey]:
        """All of them, oldest first.

        Raises:
            LocalError: one cannot be read, others can read it, or it is damaged.
        """
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(_SUFFIX))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LocalError(
                f"the folder of sealing keys {self.folder} cannot be read: {error.strerror}",
                hint="give the agent's account the right to read it",
            ) from None
        found = [
            load_key(read_secret(path), path) for path in (os.path.join(self.folder, name) for name in names)
        ]
        return sorted(found, key=lambda kept: (kept.created, kept.key.id))

    def find(self, key_id: bytes) -> KeptKey:
        """The key of an id.

        Raises:
            NotFound: it is not here (reason "sealing-key-missing").
            LocalError: as of `kept`, for this one.
        """
        path = os.path.join(self.folder, key_id.hex() + _SUFFIX)
        try:
            return load_key(read_secret(path), path)
        except NotFound:
            raise NotFound(
                f"sealing key {key_id.hex()} is not in {self.folder}",
                hint="at the site that keeps it: flowengine-agent keys give; then here: flowengine-agent keys take",
                reason="sealing-key-missing",
            ) from None

    def has(self, key_id: bytes) -> bool:
        """Whether there is a file for a key."""
        return os.path.exists(os.path.join(self.folder, key_id.hex() + _SUFFIX))

    def key_for(self, site: str, tenant: str, path: str) -> KeptKey:
        """The key for what leaves a site from a path; made, and durable, where there was none.

        Raises:
            LocalError: as of `kept`; a new key is not made beside one that cannot be read.
        """
        with self._lock:
            for kept in self.kept():
                if (kept.site, kept.tenant, kept.path) == (site, tenant, path):
                    return kept
            made = make_key(site, tenant, path, self._clock(), self._rng)
            self._write(made)
            return made

    def add(self, kept: KeptKey) -> None:
        """Keep a key that another site gave.

        Raises:
            LocalError: it cannot be written.
        """
        with self._lock:
            self._write(kept)

    def _write(self, kept: KeptKey) -> None:
        make_secret_folder(self.folder)
        write_secret(os.path.join(self.folder, kept.key.id.hex() + _SUFFIX), dump_key(kept))

    def opening_key(self) -> OpeningKey:
        """This site's own key, to which others wrap theirs; made where there is none.

        Raises:
            LocalError: it is damaged, or others can read it.
        """
        path = os.path.join(self.folder, _OPENING)
        with self._lock:
            try:
                secret = read_secret(path)
            except NotFound:
                make_secret_folder(self.folder)
                secret = self._rng(32)
                try:
                    write_secret(path, secret, replace=False)
                except LocalError:
                    if not os.path.exists(path):
                        raise
                    secret = read_secret(path)  # another process made it meanwhile
        if len(secret) != 32:
            raise LocalError(
                f"the opening key {path} is damaged: it has {len(secret)} bytes instead of 32",
                hint="restore it from a backup; or remove it and have keys wrapped anew for the new one",
                reason="sealing-key-damaged",
            )
        return OpeningKey(secret)
