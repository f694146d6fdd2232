#!/usr/bin/env python3
"""Run the code blocks of the documentation, page by page, so that what a page shows is what happens.

    python docs/check_blocks.py [PAGE.md ...]          run README.md and docs/**/*.md, or only the named pages
    python docs/check_blocks.py --list [PAGE.md ...]   say what would run
    python docs/check_blocks.py --print NAME PAGE.md   print the commands of the block marked <!-- ci:NAME -->

Every `console`, `sh`, `bash`, `shell`, `python` and `pycon` block runs.
A marker right before the fence says more:

    <!-- no-run -->        an illustration: it does not run
    <!-- exit: 5 -->       the last command of the block exits with this code
    <!-- output -->        the shown output is compared too; a line `...` stands for any lines
    <!-- ci:NAME -->       the continuous integration runs it by itself, see .ci/run

A page is one session in an empty directory of its own: its blocks run in order, one shell and one Python
namespace for the whole page, so `cd`, variables, background jobs and imports carry on. In a console block the
lines that begin with `$ ` are commands (`> ` continues one), the others are their output. Only the standard
library is used, so the script works before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SHELLS = frozenset({"sh", "bash", "shell"})
RUNNABLE = SHELLS | {"console", "python", "pycon"}
COMMAND_LIMIT_S = 120.0
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)$")
MARKER = re.compile(r"^\s*<!--\s*(?P<text>.*?)\s*-->\s*$")

# What the Python child of a page runs: blocks arrive as a header line (line, kind, length, token) and source.
PYTHON_SESSION = r"""
import doctest, sys, traceback
page, names = sys.argv[1], {"__name__": "__main__"}
def run(line, is_doctest, source):
    if is_doctest:
        test = doctest.DocTestParser().get_doctest(source, names, page, page, line - 1)
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
        names.update(test.globs)
        return 1 if result.failed else 0
    try:
        exec(compile("\n" * (line - 1) + source, page, "exec"), names)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0
with open(int(sys.argv[2]), "rb") as inbox:
    while header := inbox.readline():
        line, is_doctest, length, token = header.split()
        status = run(int(line), is_doctest == b"1", inbox.read(int(length)).decode())
        sys.stdout.flush()
        print(f"\n{token.decode()} {status}", flush=True)
"""


@dataclass
class Block:
    """One fenced block: where its first line of code stands, its language, its markers and its text."""

    page: Path
    line: int
    language: str
    markers: list[str]
    lines: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return (
            self.language in RUNNABLE
            and "no-run" not in self.markers
            and not any(m.startswith("ci:") for m in self.markers)
        )

    @property
    def expected_exit(self) -> int:
        for marker in self.markers:
            if marker.startswith("exit:"):
                return int(marker.removeprefix("exit:"))
        return 0


@dataclass
class Command:
    """One command of a block: its line on the page, its text and the output shown below it."""

    line: int
    text: str
    output: list[str] = field(default_factory=list)


class BlockFailedError(Exception):
    """A block did not do what the page says; the message begins with page and line."""


def parse(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. A fence that is never closed is an error."""
    blocks: list[Block] = []
    markers: list[str] = []
    current: Block | None = None
    closing, indent = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if current is not None:
            if line.strip().startswith(closing) and not line.strip().strip("`"):
                blocks.append(current)
                current = None
            else:
                current.lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
        elif match := FENCE.match(line):
            words = match["info"].split()
            current = Block(page, number + 1, words[0].lower() if words else "", markers)
            closing, indent, markers = match["ticks"], len(match["indent"]), []
        elif match := MARKER.match(line):
            markers = [*markers, match["text"]]
        elif line.strip():
            markers = []
    if current is not None:
        raise BlockFailedError(
            f"{shown(page)}:{current.line - 1}: this fence is never closed; close it with {closing}"
        )
    return blocks


def commands(block: Block) -> list[Command]:
    """The commands of a shell block; a plain script is one command, a console block has one per `$ ` line."""
    if block.language in SHELLS and not any(line.startswith("$ ") for line in block.lines):
        return [Command(block.line, "\n".join(block.lines))]
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.lines, start=block.line):
        if line.startswith("$ "):
            found.append(Command(number, line[2:]))
        elif not found:
            raise BlockFailedError(
                f"{shown(block.page)}:{number}: a console block begins with a `$ ` line; found {line!r}"
            )
        elif goes_on or (line.startswith("> ") and not found[-1].output):
            found[-1].text += "\n" + line.removeprefix("> ")
        else:
            found[-1].output.append(line)
        goes_on = not found[-1].output and line.endswith("\\")
    if not found:
        raise BlockFailedError(f"{shown(block.page)}:{block.line}: this console block holds no `$ ` line")
    return found


def marked(page: Path, name: str) -> str:
    """The commands of the one block that `<!-- ci:NAME -->` precedes, as a script."""
    found = [block for block in parse(page) if f"ci:{name}" in block.markers]
    if len(found) != 1:
        raise BlockFailedError(
            f"{shown(page)}: expected one fenced block directly after <!-- ci:{name} -->, found {len(found)};"
            " put the marker on the line before the fence"
        )
    text = "\n".join(command.text for command in commands(found[0]))
    if not text.strip():
        raise BlockFailedError(f"{shown(page)}:{found[0].line}: the block marked ci:{name} is empty")
    return text


def shown(page: Path) -> str:
    """A page's name as a reader knows it: relative to the project."""
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


class Session:
    """The shell and the Python interpreter of one page, both in its scratch directory."""

    def __init__(self, page: Path, scratch: Path) -> None:
        self._page = page
        self._scratch = scratch
        self._children: list[subprocess.Popen[bytes]] = []
        self._shell: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
        self._python: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None

    def environment(self) -> dict[str, str]:
        """What the commands see: this interpreter's scripts first, and a home of their own."""
        home = self._scratch.parent / "home"
        home.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FLOW_", "XDG_", "PYTEST_"))}
        env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
        env |= {"HOME": str(home), "TERM": "dumb", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
        return env

    def _start(self, argv: list[str], tail: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """Start a child that reads its work from a pipe, so that its standard input stays empty."""
        reader, writer = os.pipe()
        child = subprocess.Popen(
            [*argv, *(word.replace("{fd}", str(reader)) for word in tail)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._scratch,
            env=self.environment(),
            pass_fds=[reader],
            start_new_session=True,
        )
        os.close(reader)
        self._children.append(child)
        return child, os.fdopen(writer, "wb", buffering=0)

    def run_shell(self, script: str, strict: bool) -> tuple[int, str]:
        """Exit code and output of a script in the page's shell; 255 when the shell itself went away."""
        if self._shell is None:
            self._shell = self._start(["bash", "--norc"], ["/dev/fd/{fd}"])
        child, inbox = self._shell
        token = secrets.token_hex(8)
        path = self._scratch.parent / "block.sh"
        path.write_text(script + "\n", encoding="utf-8")
        before, after = ("set -e; ", "; set +e") if strict else ("", "")
        inbox.write(f"{before}. '{path}'; s=$?{after}; printf '\\n%s %s\\n' {token} $s\n".encode())
        return self._answer(child, token)

    def run_python(self, line: int, source: str, is_doctest: bool) -> tuple[int, str]:
        """Exit code (0 or 1) and output of a block in the page's Python namespace."""
        if self._python is None:
            self._python = self._start([sys.executable, "-c", PYTHON_SESSION, shown(self._page)], ["{fd}"])
        child, inbox = self._python
        token = secrets.token_hex(8)
        data = (source + "\n").encode()
        inbox.write(b"%d %d %d %s\n" % (line, is_doctest, len(data), token.encode()) + data)
        return self._answer(child, token)

    @staticmethod
    def _answer(child: subprocess.Popen[bytes], token: str) -> tuple[int, str]:
        """Read the child's output up to the line with the token; the text and the status found there."""
        assert child.stdout is not None
        end = re.compile(rb"\n" + token.encode() + rb" (\d+)\n")
        text = b""
        deadline = time.monotonic() + COMMAND_LIMIT_S
        while not (match := end.search(text)):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return 124, text.decode(
                    errors="replace"
                ) + f"\n(stopped: no end after {COMMAND_LIMIT_S:.0f} s)"
            piece = os.read(child.stdout.fileno(), 1 << 16)
            if not piece:
                return 255, text.decode(errors="replace")
            text += piece
        return int(match[1]), text[: match.start()].decode(errors="replace")

    def close(self) -> None:
        """End both interpreters and whatever they left running in the background."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                pass
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        for started in (self._shell, self._python):
            if started is not None:
                started[1].close()


def same_output(expected: list[str], found: list[str]) -> bool:
    """Whether found lines are the expected ones, where `...` stands for any run of lines."""
    if not expected:
        return not found
    if expected[0].strip() == "...":
        return any(same_output(expected[1:], found[skip:]) for skip in range(len(found) + 1))
    return bool(found) and expected[0].rstrip() == found[0].rstrip() and same_output(expected[1:], found[1:])


def run_block(session: Session, block: Block) -> None:
    """Run one block; raises BlockFailedError with the page, the line and what was seen."""
    where = shown(block.page)
    if block.language in ("python", "pycon"):
        source = "\n".join(block.lines)
        is_doctest = source.lstrip().startswith(">>>")
        code, output = session.run_python(block.line, source, is_doctest)
        if code != 0:
            raise BlockFailedError(f"{where}:{block.line}: the Python block failed:\n{indented(output)}")
        return
    todo = commands(block)
    for command in todo:
        expected = block.expected_exit if command is todo[-1] else 0
        strict = block.language != "console" and expected == 0
        code, output = session.run_shell(command.text, strict)
        if code != expected:
            raise BlockFailedError(
                f"{where}:{command.line}: exit code {code}, expected {expected}:\n"
                f"{indented('$ ' + command.text)}\n{indented(output)}"
            )
        if "output" in block.markers and not same_output(
            strip_blank(command.output), strip_blank(output.splitlines())
        ):
            raise BlockFailedError(
                f"{where}:{command.line}: another output than the page shows:\n"
                f"{indented('$ ' + command.text)}\n{indented(output)}"
            )


def strip_blank(lines: list[str]) -> list[str]:
    return "\n".join(lines).strip("\n").splitlines()


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.strip("\n").splitlines()[-40:])


def run_page(page: Path) -> tuple[int, str | None]:
    """Run all blocks of a page: how many ran, and what failed (the page ends there), if anything."""
    count = 0
    base = Path(tempfile.mkdtemp(prefix="flow-docs-"))
    scratch = base / "page"
    scratch.mkdir()
    session = Session(page, scratch)
    try:
        for block in parse(page):
            if block.runs:
                run_block(session, block)
                count += 1
    except BlockFailedError as error:
        return count, str(error)
    finally:
        session.close()
        shutil.rmtree(base, ignore_errors=True)
    return count, None


def pages_of(named: list[str]) -> list[Path]:
    if named:
        return [Path(name).resolve() for name in named]
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the code blocks of the documentation.")
    parser.add_argument("pages", nargs="*", help="Markdown pages; without any, README.md and docs/**/*.md")
    parser.add_argument("--list", action="store_true", help="say what would run, run nothing")
    parser.add_argument("--print", metavar="NAME", help="print the block marked <!-- ci:NAME -->")
    args = parser.parse_args()
    failures = 0
    try:
        if args.print:
            print(marked(pages_of(args.pages)[0], args.print))
            return 0
        for page in pages_of(args.pages):
            if args.list:
                for block in parse(page):
                    print(f"{shown(page)}:{block.line}: {block.language}: {'runs' if block.runs else 'no'}")
                continue
            started = time.monotonic()
            count, failure = run_page(page)
            print(f"{shown(page)}: {count} blocks ran in {time.monotonic() - started:.1f} s", flush=True)
            if failure:
                failures += 1
                print(f"FAILED {failure}", flush=True)
    except (BlockFailedError, OSError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
