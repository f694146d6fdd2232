"""What is wrong with policy files: every problem with its file, line and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from flowengine.errors import PolicyInvalid

__all__ = ["Problem", "closest", "refuse"]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, or, at level `warning`, that somebody should look at."""

    file: str
    line: int
    message: str
    hint: str = ""
    level: str = "error"
    code: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def as_dict(self) -> dict[str, object]:
        """The problem as JSON-able data."""
        return {
            "file": self.file,
            "line": self.line,
            "level": self.level,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
        }


def closest(word: str, known: Iterable[str]) -> str:
    """A suggestion like `did you mean 'site.country'?`, empty where nothing is near.

    >>> closest("efect", ["effect", "unless"])
    "did you mean 'effect'?"
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, 5, 0.6)
    swapped = [name for name in near if sorted(name) == sorted(word)]
    near = swapped or near
    if not near:
        near = difflib.get_close_matches(word.lower(), [name.lower() for name in known], 1, 0.6)
        near = [name for name in known if near and name.lower() == near[0]]
    return f"did you mean {near[0]!r}?" if near else ""


def refuse(problems: list[Problem]) -> None:
    """Raise `PolicyInvalid` with every problem at once; nothing where there is none."""
    errors = sorted(
        dict.fromkeys(problem for problem in problems if problem.level == "error"),
        key=lambda problem: (problem.file, problem.line),
    )
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise PolicyInvalid(
            f"the policy files hold {count}, so none of them is loaded:\n"
            + "\n".join(f"  {problem}" for problem in errors),
            hint="mend the lines named above, then run `flow policy check` again",
            problems=[problem.as_dict() for problem in errors],
        )
