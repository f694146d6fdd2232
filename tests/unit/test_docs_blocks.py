"""The checker of the documentation finds what is wrong on a page, and says where."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKER = Path(__file__).resolve().parents[2] / "docs" / "check_blocks.py"


def check(page: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    page.write_text(text, encoding="utf-8")
    return subprocess.run(
        [sys.executable, CHECKER, *options, page], capture_output=True, text=True, check=False
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def test_a_page_is_one_session(page: Path) -> None:
    done = check(
        page,
        "```console\n$ mkdir sub && cd sub\n$ x=5\n```\n```sh\necho $x > five\n```\n"
        "```python\nimport pathlib\n```\n"
        "```python\nassert pathlib.Path('sub/five').read_text() == '5\\n'\n```\n"
        "```pycon\n>>> pathlib.Path('sub').is_dir()\nTrue\n```\n",
    )
    assert done.stdout.startswith(f"{page}: 5 blocks ran")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x\n```console\n$ true\n$ false\n```\n", 4),
        ("```sh\nfalse\ntrue\n```\n", 2),
        ("```sh\nexit 0\n```\n```sh\necho after\n```\n", 2),
        ("```python\n1 / 0\n```\n", 2),
        ("```python\nraise SystemExit(0)\n```\n", 2),
        ("\n```pycon\n>>> 1 + 1\n3\n```\n", 3),
        ("<!-- exit: 5 -->\n```console\n$ true\n```\n", 3),
        ("<!-- output -->\n```console\n$ echo one\ntwo\n```\n", 3),
        ("```console\nno prompt\n```\n", 2),
        ("```console\n$ true\n", 1),
    ],
)
def test_a_failure_names_page_and_line(page: Path, text: str, line: int) -> None:
    done = check(page, text)
    assert done.returncode == 1
    assert f"FAILED {page}:{line}:" in done.stdout + done.stderr


def test_markers_are_obeyed(page: Path) -> None:
    done = check(
        page,
        "<!-- no-run -->\n```console\n$ false\n```\n<!-- exit: 3 -->\n```console\n$ (exit 3)\n```\n"
        "<!-- ci:run -->\n```sh\nfalse\n```\n```json\n{}\n```\n"
        "<!-- output -->\n```console\n$ printf 'a\\nb\\nc\\n'\na\n...\nc\n```\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{page}: 2 blocks ran")


def test_the_marked_command_is_printed(page: Path) -> None:
    text = "<!-- ci:run -->\n```console\n$ one \\\n    two\nshown\n$ three\n```\n"
    assert check(page, text, "--print", "run").stdout == "one \\\n    two\nthree\n"


@pytest.mark.parametrize(
    "text", ["", "<!-- ci:run -->\ntext\n```sh\nx\n```\n", "<!-- ci:run -->\n```sh\n```\n"]
)
def test_a_missing_or_empty_marked_block_is_an_error(page: Path, text: str) -> None:
    done = check(page, text, "--print", "run")
    assert done.returncode == 1
    assert "ci:run" in done.stderr
