"""`flow label`: what data is, in its owner's signed words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import json_option, note, open_client, plain
from flowengine.cli.groups import Group
from flowengine.cli.statements import (
    facts_of,
    print_statements,
    read_statement,
    typed_fact,
    until,
    write_statement,
)
from flowengine.errors import Exit, UsageError

if TYPE_CHECKING:
    from flowengine.api.policies import LabelInfo
    from flowengine.trust.statements import Fact

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
        facts=facts_of(facts, _fact),
        expires=None if expires is None else moment(expires),
        withdrawn=withdraw,
    )
    write_statement(output, sign_labels(said, read_private_key(key_file)))
    if as_json:
        print_json({"statement": os.fspath(output), "owner": owner, "number": number, "labels": said.labels})
    else:
        print(f"{output}: statement {number} of {owner} on {at.site}:{said.path}")
    return Exit.DONE


def _fact(text: str) -> tuple[str, Fact]:
    """One fact from NAME=VALUE."""
    from flowengine.policy.labels import FACTS
    from flowengine.policy.vocabulary import ATTRIBUTES

    name, mark, raw = text.partition("=")
    name = name if name.startswith("data.") else f"data.{name}"
    if not mark or name not in FACTS:
        known = ", ".join(sorted(fact.removeprefix("data.") for fact in FACTS))
        raise UsageError(
            f"--fact {text!r}: not NAME=VALUE with one of {known}", hint="write it like persons=1200"
        )
    return name, typed_fact(text, raw, ATTRIBUTES[name])


@label.command("set")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def set_(file: Path, as_json: bool) -> int:
    """Hand the signed statement FILE to the coordinator, which hands it to all sites."""
    from flowengine.cli.output import print_json

    document = read_statement(file, "statement", "flow label sign")
    with open_client() as client:
        made = client.set_label(document)
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
    with open_client() as client:
        found, sites = client.labels(site), client.sites()
    return print_statements(
        "labels",
        found,
        sites,
        ("DATA", "OWNER", "NUMBER", "LABELS", "UNTIL"),
        lambda one: (f"{one.site}:{one.path}", one.owner, str(one.number), _words(one), until(one.expires)),
        as_json=as_json,
    )
