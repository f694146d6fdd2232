"""Ten deliberately broken policy files: each error names file, line, what is wrong and what was meant."""

from __future__ import annotations

import pathlib

import pytest

from flowengine.errors import PolicyInvalid
from flowengine.policy.cases import read_test_file
from flowengine.policy.parse import load
from flowengine.policy.positions import Positions
from flowengine.policy.problems import Problem

BROKEN = pathlib.Path(__file__).parents[1] / "vectors" / "policy-broken"
ROOT = pathlib.Path(__file__).parents[2] / "policies"

EXPECTED: dict[str, list[tuple[int, str, str]]] = {
    "01-unknown-key.toml": [(7, "unknown key 'efective' in [policy]", "did you mean 'effective'?")],
    "02-unknown-attribute.toml": [
        (13, "'site.contry' is not a declared attribute", "did you mean 'site.country'?")
    ],
    "03-unknown-list.toml": [
        (16, "the list @gdpr_adequate_ful does not exist", "did you mean '@gdpr_adequate_full'?")
    ],
    "04-unknown-unit.toml": [(13, "'500 GiBi' has an unknown unit", "did you mean '500 GiB'?")],
    "05-no-country.toml": [
        (13, "'UK' is no ISO 3166-1 country code", "the code of the United Kingdom is 'GB'"),
    ],
    "06-unknown-label.toml": [(13, "the label 'personal.ue' is not declared", "did you mean 'personal.eu'?")],
    "07-unknown-obligation.toml": [(15, "'encrpyt' is no obligation", "did you mean 'encrypt'?")],
    "08-not-toml.toml": [(14, "not TOML: Unclosed array near", "texts stand in quotes")],
    "09-use-and-operator.toml": [
        (12, "'procces' is no use", "did you mean 'process'?"),
        (13, "data.labels is a set, which 'is' cannot compare", "did you mean 'includes'?"),
        (13, "asks whether a fact is known, which a condition cannot do", "an unknown fact already keeps"),
    ],
    "10-many-at-once.toml": [
        (11, "'effect' cannot be 'allow'", "use permit, forbid, require"),
        (13, "'when' is a list of conditions", "write when = ['site.country in @eea']"),
        (16, "rule 'a' is also on line 10", "rename: a-2"),
        (19, "'calender_year' is no window; did you mean 'calendar_year'?", ""),
        (20, "delete_after is a text, not 180", "put it in quotes"),
    ],
}


def good_files() -> dict[str, bytes]:
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in ROOT.rglob("*.toml")}


def test_there_are_ten() -> None:
    assert sorted(path.name for path in BROKEN.glob("*.toml")) == sorted(EXPECTED)
    assert len(EXPECTED) == 10


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_error_names_file_line_fault_and_what_was_meant(name: str) -> None:
    files = {**good_files(), f"broken/{name}": (BROKEN / name).read_bytes()}
    with pytest.raises(PolicyInvalid) as caught:
        load(files)
    problems = caught.value.context["problems"]
    assert isinstance(problems, list)
    found = [(problem["file"], problem["line"]) for problem in problems]
    assert found == [(f"broken/{name}", line) for line, _, _ in EXPECTED[name]]
    for problem, (line, message, hint) in zip(problems, EXPECTED[name], strict=True):
        assert message in problem["message"]
        assert hint in problem["hint"]
        assert f"broken/{name}:{line}: " in str(caught.value)


def test_errors_of_all_files_come_at_once() -> None:
    files = {**good_files(), **{f"broken/{name}": (BROKEN / name).read_bytes() for name in EXPECTED}}
    with pytest.raises(PolicyInvalid) as caught:
        load(files)
    problems = caught.value.context["problems"]
    assert isinstance(problems, list)
    assert {problem["file"] for problem in problems} == {f"broken/{name}" for name in EXPECTED}


def test_a_deny_test_has_to_name_what_decides() -> None:
    policies = load(good_files())
    text = """policies = ["eu-personal"]
now = 2026-03-02

[data.d]
labels = ["personal.eu"]

[site.s]
country = "FR"

[[test]]
name = "x"
ask = {data = "d", site = "s", use = "land"}
expect = "deny"

[[test]]
name = "y"
ask = {data = "dd", site = "s", use = "land"}
expect = "deny"
because = ["eu-personal/eaa"]
"""
    problems: list[Problem] = []
    assert read_test_file("x.test.toml", text.encode(), policies, problems) is None
    assert [(problem.line, problem.message) for problem in problems] == [
        (10, "the deny test 'x' does not name what decides"),
        (17, "data 'dd' is not declared in this file"),
        (19, "there is no rule 'eu-personal/eaa' among the loaded policies"),
    ]
    assert problems[2].hint == "did you mean 'eu-personal/eea'?"


def test_lines_are_found_in_every_kind_of_toml() -> None:
    text = '''a = 1
"b c".d = """
two
lines""" # comment [x]
[t.u]
v = [1, # one
     {k = "]", l = 'q',
      m = [
        2]}]
[[r]]
x = 1
[r.sub]
y = 2
[[r]]
x = '''
    positions = Positions(text + "{ p.q = 3 }\n")
    lines = {
        ("a",): 1, ("b c", "d"): 2, ("t", "u"): 5, ("t", "u", "v", 0): 6, ("t", "u", "v", 1, "l"): 7,
        ("t", "u", "v", 1, "m", 0): 9, ("r", 0, "x"): 11, ("r", 0, "sub", "y"): 13, ("r", 1): 14,
        ("r", 1, "x", "p", "q"): 15, ("r", 1, "absent", "deep"): 14,
    }  # fmt: skip
    assert {path: positions.line(*path) for path in lines} == lines
