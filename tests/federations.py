"""Federations for tests: a real coordinator and real agents as processes, from one file, as `flow up` runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flowengine
from flowengine.cli.federation_file import read_federation
from flowengine.cli.local_federation import Running, run_federation
from flowengine.client import Client
from flowengine.client.access import find_access

__all__ = ["Local", "local_federation"]


@dataclass
class Local:
    """A federation that runs, and where its sites' data lies.

    Attributes:
        base: folder; SITE below it is what the site offers as /data.
    """

    base: Path
    running: Running

    @property
    def environment(self) -> dict[str, str]:
        return self.running.environment()

    def access(self) -> flowengine.client.access.Access:
        """The admin's."""
        return find_access(environ={"FLOW_CONFIG_DIR": str(self.running.config)})

    def client(self, **settings: float) -> Client:
        """A new client for the admin; use it by `with` or `async with`."""
        return Client(self.access(), **settings)  # type: ignore[arg-type]

    def data(self, site: str) -> Path:
        """The folder behind SITE:/data."""
        return self.base / site


@contextlib.contextmanager
def local_federation(
    base: Path, sites: dict[str, str], *, state: str = "sqlite", extra: str = "", coordinator: str = ""
) -> Iterator[Local]:
    """Run a federation of `sites` (name to what its table says besides name and root) below `base`."""
    lines = ["[coordinator]", f'state = "{state}"', coordinator]
    for name, rest in sites.items():
        lines += ["[[site]]", f'name = "{name}"', f'root = [{{ path = "{name}", name = "/data" }}]', rest]
    path = base / "federation.toml"
    path.write_text("\n".join([*lines, extra]), encoding="utf-8")
    with run_federation(read_federation(path), base / "state") as running:
        yield Local(base, running)
