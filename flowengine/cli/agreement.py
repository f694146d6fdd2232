"""`flow agreement`: what parties have agreed on, in the signed words of who has the authority to say so."""

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
    from flowengine.api.policies import AgreementInfo
    from flowengine.trust.statements import Fact

__all__ = ["agreement"]


@click.group(cls=Group)
def agreement() -> None:
    """Agreements: an authority's signed word on what was agreed for data that go to some sites.

    Facts like agreement.mechanism, agreement.expires and controller.ciio come from here. Who may sign which of them, and for
    whose data, stands in authorities.toml of the policy bundle.
    """


@agreement.command("sign")
@click.argument("agreement_id", metavar="ID")
@click.option(
    "--as", "who", required=True, metavar="NAME", help="The authority, as authorities.toml names it."
)
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    required=True,
    help="The authority's private key (PEM).",
)
@click.option(
    "--number", type=int, required=True, help="Higher than that of the last statement with this id."
)
@click.option(
    "--data",
    "roots",
    multiple=True,
    required=True,
    metavar="SITE:/PATH",
    help="Whose data it covers, with all below; may be repeated; *:/PATH for any site.",
)
@click.option(
    "--to",
    "recipients",
    multiple=True,
    metavar="SITE",
    help="A site that receives them under it; may be repeated. Without: whoever receives, as for controllers.",
)
@click.option(
    "--fact",
    "facts",
    multiple=True,
    metavar="NAME=VALUE",
    help="What was agreed: mechanism=scc-2021, tia_done=true, controller.ciio=false; may be repeated.",
)
@click.option(
    "--expires", metavar="DATE", help="Until when it counts; it is agreement.expires too, if not said."
)
@click.option("--withdraw", is_flag=True, help="It counts no more: what runs under it stops.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The signed agreement to write."
)
@json_option
def sign(
    agreement_id: str,
    who: str,
    key_file: Path,
    number: int,
    roots: tuple[str, ...],
    recipients: tuple[str, ...],
    facts: tuple[str, ...],
    expires: str | None,
    withdraw: bool,
    output: Path,
    as_json: bool,
) -> int:
    """Sign the agreement ID. Needs no coordinator: the key stays where its authority is."""
    import time

    from flowengine.cli.output import print_json
    from flowengine.cli.policy_files import moment, read_private_key
    from flowengine.trust.agreement import AgreementStatement, sign_agreement

    said = AgreementStatement(
        authority=who,
        id=agreement_id,
        number=number,
        issued=int(time.time()),
        roots=[_root(text) for text in roots],
        recipients=sorted(set(recipients)) or ["*"],
        facts=facts_of(facts, _fact),
        expires=None if expires is None else moment(expires),
        withdrawn=withdraw,
    )
    write_statement(output, sign_agreement(said, read_private_key(key_file)))
    if as_json:
        print_json(
            {"agreement": os.fspath(output), "id": agreement_id, "number": number, "facts": said.facts}
        )
    else:
        print(f"{output}: statement {number} of {who} on {agreement_id}")
    return Exit.DONE


def _root(text: str) -> str:
    site, colon, path = text.partition(":")
    if not colon or not path.startswith("/"):
        raise UsageError(f"--data {text!r}: not SITE:/PATH", hint="write it like paris:/data/cohort")
    return f"{site}:{path.rstrip('/') or '/'}"


def _fact(text: str) -> tuple[str, Fact]:
    """One fact from NAME=VALUE, typed as its attribute is; what a bundle declares itself is taken by its looks."""
    from flowengine.policy.vocabulary import ATTRIBUTES

    name, mark, raw = text.partition("=")
    name = name if "." in name else f"agreement.{name}"
    if not mark:
        raise UsageError(f"--fact {text!r}: not NAME=VALUE", hint="write it like mechanism=scc-2021")
    attribute = ATTRIBUTES.get(name)
    if attribute is None:
        if raw in ("true", "false"):
            return name, raw == "true"
        return name, int(raw) if raw.isdecimal() else raw
    if "agreement" not in attribute.by:
        known = ", ".join(sorted(name for name, one in ATTRIBUTES.items() if "agreement" in one.by))
        raise UsageError(f"--fact {text!r}: no agreement says {name}", hint=f"they say {known}")
    return name, typed_fact(text, raw, attribute)


@agreement.command("set")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def set_(file: Path, as_json: bool) -> int:
    """Hand the signed agreement FILE to the coordinator, which hands it to all sites."""
    from flowengine.cli.output import print_json

    document = read_statement(file, "agreement", "flow agreement sign")
    with open_client() as client:
        made = client.set_agreement(document)
    if as_json:
        print_json(plain(made))
    else:
        note(f"{made.id}: {_words(made)} (statement {made.number} of {made.authority})")
    return Exit.DONE


def _words(info: AgreementInfo) -> str:
    if info.withdrawn:
        return "withdrawn"
    return ", ".join(f"{name}={value}" for name, value in sorted(info.facts.items())) or "nothing"


@agreement.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List all agreements, and which sites have not read them yet."""
    with open_client() as client:
        found, sites = client.agreements(), client.sites()
    return print_statements(
        "agreements",
        found,
        sites,
        ("AGREEMENT", "BY", "NUMBER", "DATA", "TO", "SAYS", "UNTIL"),
        lambda one: (
            one.id,
            one.authority,
            str(one.number),
            ", ".join(one.roots),
            ", ".join(one.recipients),
            _words(one),
            until(one.expires),
        ),
        as_json=as_json,
    )
