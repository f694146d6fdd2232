"""Reading policy directories, bundles and facts given on the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from flowengine.errors import NotFound, PolicyInvalid, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from flowengine.policy.cases import TestFile
    from flowengine.policy.evaluate import Engine
    from flowengine.policy.model import PolicySet, Value
    from flowengine.policy.problems import Problem

__all__ = [
    "data_facts",
    "engine_of",
    "given_facts",
    "load_policies",
    "moment",
    "read_files",
    "read_private_key",
    "read_tests",
    "site_of",
]

_MAX_FILES = 10_000


def moment(text: str | None) -> int:
    """Seconds since 1970 of `--at`; now, where it is not given."""
    from flowengine.policy.conditions import instant

    if text is None:
        return int(time.time())
    try:
        return instant(text)
    except (ValueError, TypeError):
        raise UsageError(
            f"{text!r} is no date", hint="write it like 2026-12-31 or 2026-12-31T08:00:00Z"
        ) from None


def read_files(path: Path) -> dict[str, bytes]:
    """The TOML files of a directory by relative path, or the files of a bundle (whose signatures nobody checks here)."""
    if path.is_file():
        from flowengine.policy.bundle import open_bundle

        return dict(open_bundle(path.read_bytes()).files)
    if not path.is_dir():
        raise NotFound(
            f"there is no policy directory or bundle at {path}",
            hint="name one with --policies DIR, or run where it is",
        )
    files: dict[str, bytes] = {}
    for found in sorted(path.rglob("*.toml")):
        relative = found.relative_to(path)
        if found.is_file() and not any(part.startswith(".") for part in relative.parts):
            files[relative.as_posix()] = found.read_bytes()
        if len(files) > _MAX_FILES:
            raise UsageError(
                f"{path} holds more than {_MAX_FILES} files", hint="name the policy directory itself"
            )
    if not files:
        raise NotFound(f"{path} holds no .toml file", hint="name the directory that holds the policies")
    return files


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file.

    Raises:
        NotFound: there is none.
        LocalError: others can read it, or it cannot be read.
        UsageError: it is no such key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from flowengine.store.secret_files import read_secret

    try:
        pem = read_secret(str(file))
    except NotFound:
        raise NotFound(f"there is no key {file}", hint="flow policy bundle keygen makes one") from None
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"{file} is no Ed25519 private key", hint="make one with `flow policy bundle keygen`"
        )
    return key


def load_policies(path: Path, sites: Path | None = None, datasets: Path | None = None) -> PolicySet:
    """The policies of a directory or bundle, with other sites and data sets where files are given."""
    from flowengine.policy.parse import load

    files = read_files(path)
    for name, other in (("sites.toml", sites), ("datasets.toml", datasets)):
        if other is not None:
            if not other.is_file():
                raise NotFound(f"there is no file {other}", hint=f"it takes the place of {name}")
            files[name] = other.read_bytes()
    policies = load(files)
    if not policies.policies:
        raise NotFound(f"{path} holds no policy", hint="a policy is a .toml file with [policy] and [[rule]]")
    return policies


def read_tests(policies: PolicySet, only: Sequence[str] = ()) -> tuple[list[TestFile], list[Problem]]:
    """The test files, or those whose path ends with one of `only`; and what is wrong with them."""
    from flowengine.policy.cases import read_test_file

    problems: list[Problem] = []
    files = []
    for path, content in policies.tests.items():
        if only and not any(path == name or Path(name).as_posix().endswith(path) for name in only):
            continue
        found = read_test_file(path, content, policies, problems)
        if found is not None:
            files.append(found)
    if only and not files and not problems:
        known = ", ".join(policies.tests) or "none"
        raise NotFound(f"no test file is called {', '.join(only)}", hint=f"test files: {known}")
    return files, problems


def refuse_tests(problems: list[Problem]) -> None:
    """Raise what is wrong with test files, all at once."""
    if problems:
        text = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise PolicyInvalid(
            f"the test files hold {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{text}",
            hint="mend the lines named above",
            problems=[problem.as_dict() for problem in problems],
        )


def engine_of(policies: PolicySet, also: Sequence[str] = ()) -> Engine:
    """The policies in force; those named by `--with` count too, whatever their mode."""
    from flowengine.policy.evaluate import Engine
    from flowengine.policy.problems import closest

    known = [policy.id for policy in policies.policies]
    for name in also:
        if name not in known:
            raise NotFound(
                f"there is no policy {name!r}", hint=closest(name, known) or "policies: " + ", ".join(known)
            )
    if not also:
        return Engine(policies)
    enforced = [policy.id for policy in policies.policies if policy.mode == "enforce"]
    return Engine(policies, enforce=[*enforced, *also])


def data_facts(policies: PolicySet, dataset: str | None, labels: Sequence[str]) -> dict[str, Value]:
    """Facts of a data set; or of data that carries just these labels and is under no contract."""
    from flowengine.policy.cases import close_labels
    from flowengine.policy.problems import closest

    if (dataset is None) == (not labels):
        raise UsageError(
            "name a data set or at least one --label", hint="flow policy where --label personal.eu"
        )
    if dataset is not None:
        if dataset not in policies.data:
            hint = closest(dataset, policies.data) or "data sets: " + ", ".join(policies.data)
            raise NotFound(f"no data set is called {dataset!r} in datasets.toml", hint=hint)
        return close_labels(policies, dict(policies.data[dataset]))
    wanted = [part for label in labels for part in label.split(",")]
    for label in wanted:
        if policies.labels and label not in policies.labels:
            hint = closest(label, policies.labels) or "labels: " + ", ".join(policies.labels)
            raise NotFound(f"the label {label!r} is not declared in labels.toml", hint=hint)
    facts: dict[str, Value] = {"data.labels": frozenset(wanted), "data.contracts": frozenset()}
    return close_labels(policies, facts)


def site_of(policies: PolicySet, name: str) -> str:
    """A site's name, if it is one."""
    from flowengine.policy.problems import closest

    if name not in policies.sites:
        hint = closest(name, policies.sites) or "sites: " + (
            ", ".join(policies.sites) or "none; see sites.toml"
        )
        raise NotFound(f"no site is called {name!r} in sites.toml", hint=hint)
    return name


def given_facts(policies: PolicySet, pairs: Sequence[str]) -> dict[str, Value]:
    """Facts of `--fact NAME=VALUE`; a set's members are separated by commas."""
    from flowengine.policy.cases import counter_names
    from flowengine.policy.conditions import LineError
    from flowengine.policy.problems import closest
    from flowengine.policy.reader import fact_value

    counters = counter_names(list(policies.policies))
    facts: dict[str, Value] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        attribute = policies.attributes.get(name)
        keys = counters.get(name.replace(" ", ""))
        if not equals or (attribute is None and keys is None):
            known = [*policies.attributes, *counters]
            raise UsageError(
                f"--fact {pair!r} is not NAME=VALUE with a declared attribute",
                hint=closest(name, known) or "flow policy vocabulary lists them",
            )
        try:
            if attribute is None:
                facts |= dict.fromkeys(keys or [], int(text.strip().replace("_", "")))
                continue
            raw: object = text.strip()
            if attribute.type == "set":
                raw = [item.strip() for item in text.split(",") if item.strip()]
            elif attribute.type == "flag":
                raw = {"true": True, "yes": True, "false": False, "no": False}.get(text.strip().lower(), text)
            facts[name] = fact_value(attribute, raw)
        except LineError as error:
            raise UsageError(f"--fact {pair!r}: {error.message}", hint=error.hint) from None
        except ValueError:
            raise UsageError(f"--fact {pair!r}: a counter is a number", hint="write it like 5000") from None
    return facts
