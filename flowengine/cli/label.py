"""`flow label`: what data is, in its owner's signed words."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import json_option, note, open_client, plain, print_table
from flowengine.cli.groups import Group
from flowengine.errors import Exit, NotFound, UsageError

if TYPE_CHECKING:
    from flowengine.api.policies import LabelInfo

__all__ = ["label"]


@click.group(cls=Group)
def label() -> None:
    """Label statements: a data owner's signed word on what lies below a root of a site.

    Who owns what stands in owners.toml of the policy bundle. Data below an owned root without a valid statement has
    unknown labels, and policies that need them deny.
    """


@label.command("sign")
@click.argument("place", metavar="SITE:/PATH")
@click.option(
    "--owner", required=True, metavar="NAME", help="The owner, as owners.toml of the bundle names it."
)
@click.option(
    "--key", "key_file", type=click.Path(path_type=Path), required=True, help="The owner's private key (PEM)."
)
@click.option(
    "--number", type=int, required=True, help="Higher than that of the last statement on this root."
)
@click.option("--label", "labels", multiple=True, metavar="LABEL", help="A label of the data; all of them.")
@click.option(
    "--contract", "contracts", multiple=True, metavar="ID", help="A contract that it is under; all of them."
)
@click.option(
    "--fact",
    "facts",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another fact of the data: persons=1200, collected_in=FR,DE, controller=…; may be repeated.",
)
@click.option("--expires", metavar="DATE", help="Until when it counts; without: until a later one.")
@click.option(
    "--withdraw", is_flag=True, help="Take everything back: the data is unlabelled until the next statement."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The signed statement to write."
)
@json_option
def sign(
    place: str,
    owner: str,
    key_file: Path,
    number: int,
    labels: tuple[str, ...],
    contracts: tuple[str, ...],
    facts: tuple[str, ...],
    expires: str | None,
    withdraw: bool,
    output: Path,
    as_json: bool,
) -> int:
    """Sign a statement on SITE:/PATH and all below it. Needs no coordinator: the key stays where its owner is."""
    import time

    from flowengine.cli.output import print_json
    from flowengine.cli.policy_files import moment, read_private_key
    from flowengine.client.requests import parse_place
    from flowengine.trust.labels import LabelStatement, sign_labels

    at = parse_place(place)
    if not labels and not withdraw:
        note("no label: whoever copies these data is bound by policies for unlabelled data only")
    said = LabelStatement(
        owner=owner,
        site=at.site,
        path=at.path.rstrip("/") or "/",
        number=number,
        issued=int(time.time()),
        labels=sorted(set(labels)),
        contracts=sorted(set(contracts)),
        facts=dict(_fact(text) for text in facts),
        expires=None if expires is None else moment(expires),
        withdrawn=withdraw,
    )
    output.write_bytes(sign_labels(said, read_private_key(key_file)))
    if as_json:
        print_json({"statement": os.fspath(output), "owner": owner, "number": number, "labels": said.labels})
    else:
        print(f"{output}: statement {number} of {owner} on {at.site}:{said.path}")
    return Exit.DONE


def _fact(text: str) -> tuple[str, bool | int | str | list[str]]:
    """One fact from NAME=VALUE, typed as its attribute is."""
    from flowengine.policy.conditions import LineError
    from flowengine.policy.labels import FACTS
    from flowengine.policy.reader import fact_value
    from flowengine.policy.vocabulary import ATTRIBUTES

    name, mark, raw = text.partition("=")
    name = name if name.startswith("data.") else f"data.{name}"
    if not mark or name not in FACTS:
        known = ", ".join(sorted(fact.removeprefix("data.") for fact in FACTS))
        raise UsageError(
            f"--fact {text!r}: not NAME=VALUE with one of {known}", hint="write it like persons=1200"
        )
    attribute = ATTRIBUTES[name]
    try:
        value = fact_value(
            attribute, [word for word in raw.split(",") if word] if attribute.type == "set" else raw
        )
    except LineError as error:
        raise UsageError(f"--fact {text!r}: {error.message}", hint=error.hint) from None
    return name, sorted(value) if isinstance(value, frozenset) else value


@label.command("set")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def set_(file: Path, as_json: bool) -> int:
    """Hand the signed statement FILE to the coordinator, which hands it to all sites."""
    from flowengine.cli.output import print_json

    if not file.is_file():
        raise NotFound(f"there is no statement {file}", hint="flow label sign makes one")
    with open_client() as client:
        made = client.set_label(file.read_bytes())
    if as_json:
        print_json(plain(made))
    else:
        note(f"{made.site}:{made.path}: {_words(made)} (statement {made.number} of {made.owner})")
    return Exit.DONE


def _words(info: LabelInfo) -> str:
    if info.withdrawn:
        return "withdrawn"
    words = [*info.labels, *(f"under {contract}" for contract in info.contracts)]
    return ", ".join(words) or "no label"


@label.command("ls")
@click.option("--site", metavar="SITE", help="Only statements on this site's data.")
@json_option
def ls(site: str | None, as_json: bool) -> int:
    """List all label statements, and which sites have not read them yet."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        statements, sites = client.labels(site), client.sites()
    last = max((one.serial for one in statements), default=0)
    behind = [
        one.name for one in sites if one.policy.takes and one.state != "revoked" and one.policy.labels < last
    ]
    if as_json:
        print_json({"labels": plain(statements), "behind": behind})
        return Exit.DONE
    rows = [
        (
            f"{one.site}:{one.path}",
            one.owner,
            str(one.number),
            _words(one),
            f"{one.expires:%Y-%m-%d}" if one.expires else "-",
        )
        for one in statements
    ]
    print_table(("DATA", "OWNER", "NUMBER", "LABELS", "UNTIL"), rows)
    if behind:
        print(f"not everything has arrived yet at: {', '.join(behind)}", file=sys.stderr)
    return Exit.DONE
