"""`flow up`: a whole federation on one machine, from one file."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import note, print_table
from flowengine.errors import Exit

if TYPE_CHECKING:
    from flowengine.cli.local_federation import Running
    from flowengine.cli.processes import Children

__all__ = ["show_running", "up", "wait_for_end"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Folder for databases, keys, logs. [default: FILE without its ending, .state]",
)
@click.option(
    "--once",
    default=None,
    metavar="CMD",
    help="Run this shell command when all is ready, then stop; its exit code is the command's.",
)
def up(file: Path, state: Path | None, once: str | None) -> int:
    """Run the federation that FILE describes: a coordinator and an agent for each site, until Ctrl-C.

    Prints, when all is ready, the line that lets `flow` in other terminals use it. State stays: the same command
    again goes on where this one stopped. When one process fails, all are stopped.
    """
    from flowengine.cli.federation_file import read_federation
    from flowengine.cli.local_federation import run_federation

    federation = read_federation(file)
    folder = (state or file.with_suffix(".state")).resolve()
    with run_federation(federation, folder) as running:
        if once is not None:
            return subprocess.run(once, shell=True, env=running.environment(), check=False).returncode  # noqa: S602
        show_running(running)
        return wait_for_end(running.children)


def show_running(running: Running) -> None:
    """Say what runs and how to use it: the line to evaluate on stdout, the rest is a table on stderr."""
    import contextlib
    import sys

    entry = running.federation.coordinator
    rows = [
        (
            "coordinator",
            running.url,
            f"{'sqlite' if entry.state == 'sqlite' else 'postgresql'}{', policies' if entry.policies else ''}",
        )
    ]
    for site in running.federation.sites:
        roots = " ".join(root.name for root in site.root)
        rows.append((site.name, running.ports[site.name], roots))
    with contextlib.redirect_stdout(sys.stderr):
        print_table(("PROCESS", "ADDRESS", ""), rows)
    note(f"logs and state are in {running.folder}; Ctrl-C stops everything. In another terminal:")
    print(f"export FLOW_CONFIG_DIR={running.config}", flush=True)


def wait_for_end(children: Children) -> int:
    """Until a signal comes (0) or a process ends by itself (its exit code)."""
    with _signals(children):
        news = children.news.get()
    if isinstance(news, int):
        note("stopping")
        return Exit.DONE
    code = news.process.returncode
    note(f"{news.name} ended by itself with exit code {code}; stopping the others\n{news.last_lines()}")
    note(f"  its log is {news.log}")
    return code if code > 0 else Exit.FAILED


@contextmanager
def _signals(children: Children) -> Iterator[None]:
    before = {
        number: signal.signal(number, lambda received, frame: children.news.put(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
