"""What the reference pages say is what the code has: commands, options, exit codes, reasons, JSON fields, messages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

import flowengine.cli.main as main_module
from flowengine.api.events import EVENT_TYPES
from flowengine.cli.output import Progress
from flowengine.errors import EXIT_CODES, Exit
from flowengine.transfer.session import Counters
from flowengine.wire import messages

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below `command` that does something itself, by its full name."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for sub in command.list_commands(ctx):
            found = command.get_command(ctx, sub)
            assert found is not None
            yield from _walk(found, f"{name} {sub}")
    else:
        yield name, command


def _commands() -> dict[str, click.Command]:
    group = main_module._flow
    ctx = click.Context(group)
    found: dict[str, click.Command] = {}
    for name, (module, _) in main_module._COMMANDS.items():
        if importlib.util.find_spec(module.partition(":")[0]) is not None:
            command = group.get_command(ctx, name)
            assert command is not None
            found.update(_walk(command, f"flow {name}"))
    return found


def _sections() -> dict[str, str]:
    """The text below each `## flow …` heading of docs/reference/cli*.md, up to the next heading of that level."""
    found: dict[str, str] = {}
    for page in sorted((DOCS / "reference").glob("cli*.md")):
        for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            title, _, text = part.partition("\n")
            if title.startswith("flow "):
                assert title not in found, f"{title} stands twice in docs/reference/cli*.md"
                found[title] = text
    return found


COMMANDS = _commands()
SECTIONS = _sections()


def _rows(text: str) -> dict[frozenset[str], list[str]]:
    """Option names → the cells of their row."""
    rows: dict[frozenset[str], list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `-"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[frozenset(re.findall(r"`(--?[a-z][a-z-]*)", cells[0]))] = cells
    return rows


def _example_row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    return f"| {names} | {option.default or '–'} | {option.help or ''} |"


def test_every_command_has_a_section_and_no_other() -> None:
    assert set(SECTIONS) == set(COMMANDS), "add (or remove) `## flow …` sections in docs/reference/cli*.md"


@pytest.mark.parametrize("name", sorted(set(COMMANDS) & set(SECTIONS)))
def test_the_usage_line_is_clicks_own(name: str) -> None:
    command = COMMANDS[name]
    pieces = command.collect_usage_pieces(click.Context(command, info_name=name))
    assert f"```text\n{name} {' '.join(pieces)}\n```" in SECTIONS[name]


@pytest.mark.parametrize("name", sorted(set(COMMANDS) & set(SECTIONS)))
def test_the_options_of_a_command_are_those_of_its_table(name: str) -> None:
    options = {
        frozenset(option.opts + option.secondary_opts): option
        for option in COMMANDS[name].params
        if isinstance(option, click.Option)
    }
    rows = _rows(SECTIONS[name])
    missing = [_example_row(option) for names, option in options.items() if names not in rows]
    assert not missing, f"docs/reference says nothing of these options of {name}:\n" + "\n".join(missing)
    gone = [sorted(names) for names in rows if names not in options]
    assert not gone, f"docs/reference names options that {name} does not have: {gone}"
    for names, option in options.items():
        cells = rows[names]
        if isinstance(option.type, click.Choice):
            choices = "\\|".join(option.type.choices)
            assert f" {choices}`" in cells[0], f"the choices of {sorted(names)} in {name} are {choices}"
        if option.show_default is True and option.default is not None:
            assert cells[1] in (str(option.default), f"`{option.default}`"), (
                f"default of {sorted(names)} in {name} is {option.default}"
            )


def test_every_exit_code_has_its_row() -> None:
    text = (DOCS / "reference/exit-codes.md").read_text(encoding="utf-8")
    found = {int(code): name for code, name in re.findall(r"^\| (\d+) \| ([a-z-]+) \|", text, re.MULTILINE)}
    assert found == {int(code): code.name.lower().replace("_", "-") for code in Exit}


def test_every_reason_has_its_exit_code() -> None:
    text = (DOCS / "reference/errors.md").read_text(encoding="utf-8")
    table = text.partition("## What fails one object")[0]
    found = {
        reason: int(code) for reason, code in re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", table, re.MULTILINE)
    }
    assert {reason: int(code) for reason, code in EXIT_CODES.items()}.items() <= found.items()
    others = {reason: code for reason, code in found.items() if reason not in EXIT_CODES}
    assert others == {"permission": int(Exit.FAILED)}  # what the table does not name is FAILED


def test_the_table_of_transfer_messages_is_the_code() -> None:
    text = (DOCS / "spec/wire.md").read_text(encoding="utf-8").partition("## Transfer messages")[2]
    rows = re.findall(r"^\| (\d+) \| (\w+) \| [^|]+ \| (.*) \|$", text, re.MULTILINE)
    found = {name: (int(tag), len(_top_level(fields))) for tag, name, fields in rows}
    expected = {}
    for kind in messages.Message.__args__:
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        expected[kind.__name__] = (info.tag, len(info.fields))
    assert found == expected


def _top_level(fields: str) -> list[str]:
    """Fields separated by commas that stand in no bracket."""
    while (flat := re.sub(r"\([^()]*\)", "", fields)) != fields:
        fields = flat
    return fields.split(",")


def _fields(title: str) -> set[str]:
    """The first column of the table below a heading of json.md; for `entries[].x` only the first part."""
    text = (DOCS / "reference/json.md").read_text(encoding="utf-8")
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    names: set[str] = set()
    for line in part.splitlines():
        if line.startswith("| `"):
            names.update(re.findall(r"`([a-z_]+)[^`]*`", line.split("|")[1]))
    return names


@pytest.mark.slow
def test_json_output_has_the_documented_fields(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").write_bytes(bytes(1000))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"FLOW_STATE_DIR": str(tmp_path / "state")}
        words = [sys.executable, "-m", "flowengine.cli.main", *args]
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    def keys(*args: str) -> set[str]:
        return set(json.loads(run(*args, "--json").stdout))

    assert keys("cp", "data/", "copy") == _fields("flow cp, flow sync")
    assert keys("verify", "copy") == _fields("flow verify")
    assert keys("manifest", "copy") == _fields("flow manifest")
    assert keys("diff", "data", "copy") == _fields("flow diff")
    assert keys("ls", "copy") == _fields("flow ls")


def test_progress_lines_have_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("json", "moving")
    progress.update(Counters())
    progress.note("something")
    row, note = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert set(row) == _fields("Progress")
    assert set(note) == {"event", "message"}


def test_every_type_of_event_is_in_the_table() -> None:
    rows = re.findall(
        r"^\| (`[a-z]+\..*?) \|", (DOCS / "reference/events.md").read_text("utf-8"), re.MULTILINE
    )
    told = [kind for row in rows for kind in re.findall(r"`([a-z.-]+)`", row)]
    assert sorted(told) == sorted(EVENT_TYPES)


def test_the_tests_that_invariants_name_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "design/invariants.md").read_text(encoding="utf-8")))
    tests = Path(__file__).resolve().parents[1]
    there = {
        name
        for page in tests.rglob("test_*.py")
        for name in re.findall(
            r"^(?:async )?def (test_\w+)\(", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert named
    assert not named - there, "docs/design/invariants.md names tests that are not there"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [
        *DOCS.rglob("*.md"),
        *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
    broken = []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            other = (page.parent / path).resolve() if path else page
            if not other.exists() or (anchor and anchor not in _anchors(other)):
                broken.append(f"{page.relative_to(DOCS.parent)}: {target}")
    assert not broken, "\n".join(broken)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)) for title in titles]
    return {title.strip().lower().replace(" ", "-") for title in plain}
