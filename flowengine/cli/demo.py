"""`flow demo`: three sites, data and a policy on this machine; moves, edits, moves again, and is refused once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from flowengine.cli.federation import note
from flowengine.errors import Exit, FlowError, LocalError
from flowengine.units import format_bytes

if TYPE_CHECKING:
    from flowengine.cli.local_federation import Running

__all__ = ["demo"]

WEATHER: Final = ("hpc-a:/data/weather/", "cloud-b:/data/weather", "edge-c:/data/weather")


@click.command()
@click.option("--keep", is_flag=True, help="Leave it running at the end, until Ctrl-C, and keep the folder.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Put everything in this new folder and keep it. [default: a temporary one]",
)
@click.option(
    "--postgresql",
    default=None,
    metavar="URL",
    help="Keep the coordinator's state in this PostgreSQL database (postgresql://…) instead of SQLite.",
)
def demo(keep: bool, folder: Path | None, postgresql: str | None) -> int:
    """Show a federation: three sites on this machine, in about half a minute.

    Copies tables and logs from one site to the two others, changes some and copies again (only what changed
    travels), and asks for something that the policy forbids. All commands are shown; what they do is real.
    """
    with _place(folder, keep) as base:
        return _run(base, keep, postgresql)


@contextmanager
def _place(folder: Path | None, keep: bool) -> Iterator[Path]:
    """The demo's folder; a temporary one that nobody asked to keep is removed."""
    if folder is not None:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise LocalError(
                f"{folder} is there already",
                hint=f"name a new folder; flow up {folder / 'federation.toml'} runs one that was kept",
            ) from None
        except OSError as error:
            raise LocalError(
                f"cannot make {folder}: {error.strerror}", hint="choose another folder"
            ) from None
        yield folder.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="flow-demo-"))
    try:
        yield made
    finally:
        if not keep:
            shutil.rmtree(made, ignore_errors=True)


def _run(base: Path, keep: bool, postgresql: str | None) -> int:
    from flowengine.cli import demo_data
    from flowengine.cli.federation_file import read_federation
    from flowengine.cli.local_federation import run_federation
    from flowengine.cli.up import show_running, wait_for_end

    began = time.monotonic()
    _title("Three sites, their data and a policy: federation.toml")
    path = base / "federation.toml"
    path.write_text(demo_data.FEDERATION.format(state=postgresql or "sqlite"), encoding="utf-8")
    demo_data.write_policies(base / "policies", datetime.now(UTC).date())
    demo_data.make_weather(base / "hpc-a" / "weather")
    demo_data.make_cohort(base / "hpc-a" / "cohort")
    if not demo_data.has_parquet():
        note(
            "pyarrow is not installed: the tables are CSV (pip install 'flowengine-transfer[demo]' brings Parquet)"
        )
    with run_federation(read_federation(path), base / "federation.state") as running:
        _show(running, base)
        print(
            f"\nThat was the demo: {time.monotonic() - began:.0f} seconds, every object verified and durable.",
            flush=True,
        )
        if not keep:
            print("`flow demo --keep` leaves it running, so that you can go on.", flush=True)
            return Exit.DONE
        show_running(running)
        return wait_for_end(running.children)


def _show(running: Running, base: Path) -> None:
    from flowengine.cli import demo_data

    flow = _Commands(running)
    flow("site", "ls")

    _title("1. One command, two targets: bytes go straight from site to site")
    flow("cp", *WEATHER)

    _title("2. Next day: " + demo_data.next_day(base / "hpc-a" / "weather"))
    flow("sync", WEATHER[0], WEATHER[1])
    _reuse(flow.last_record())

    _title("3. The cohort is labelled `patients`, and policies/cohort.toml says where such data may be")
    flow("cp", "--label", "patients", "hpc-a:/data/cohort/", "cloud-b:/data/cohort")
    flow("cp", "--label", "patients", "hpc-a:/data/cohort/", "edge-c:/data/cohort", code=Exit.DENIED)

    _title("4. Both sites read every byte and compare")
    flow("verify", WEATHER[1], "--against", WEATHER[0])
    flow("transfer", "ls")


def _title(text: str) -> None:
    print(f"\n# {text}", flush=True)


def _reuse(record: dict[str, Any]) -> None:
    counters = record["counters"]
    size, sent = counters["size_bytes"], counters["bytes_sent"]
    there = max(0, size - sent)
    print(
        f"# {format_bytes(sent)} of {format_bytes(size)} travelled; {format_bytes(there)}"
        f" ({there / size:.0%}) were at cloud-b already, in other files or the same",
        flush=True,
    )


class _Commands:
    """Runs `flow` as somebody in another terminal would, and shows the command and what it says."""

    def __init__(self, running: Running) -> None:
        self._environment = running.environment()

    def __call__(self, *words: str, code: int = Exit.DONE) -> None:
        print(f"$ flow {' '.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "flowengine.cli.main", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stderr=sys.stdout,
            check=False,
        )
        if done.returncode != code:
            raise FlowError(
                f"`flow {' '.join(words)}` ended with exit code {done.returncode}, expected {int(code)}",
                hint="run it again with --keep --dir DIR and look into DIR/federation.state/log",
            )

    def last_record(self) -> dict[str, Any]:
        """The newest transfer."""
        done = subprocess.run(
            [sys.executable, "-m", "flowengine.cli.main", "transfer", "ls", "--limit", "1", "--json"],
            env=self._environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        record: dict[str, Any] = json.loads(done.stdout)["transfers"][0]
        return record
