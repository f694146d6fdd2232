"""`flow approval`, `flow approve`: what people have to approve before it may move."""

from __future__ import annotations

from pathlib import Path

import click

from flowengine.cli.federation import ago, json_option, note, open_client, plain, print_table
from flowengine.cli.groups import Group
from flowengine.errors import Exit, NotFound, UsageError

__all__ = ["approval", "approve"]


@click.group(cls=Group)
def approval() -> None:
    """Approvals: which requests wait for people, and who said yes.

    Who may approve, with which key and for which groups, stands in approvers.toml of the policy bundle.
    """


@approval.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List requests for approval, the newest first."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        found = client.approvals()
    if as_json:
        print_json({"approvals": plain(found)})
        return Exit.DONE
    rows = [
        (
            one.handle,
            f"{one.source}:{one.path} -> {one.recipient}",
            one.purpose or "-",
            one.requester,
            ago(one.created),
            f"{one.people or ''} of {', '.join(one.groups)}".strip(),
            ", ".join(given.who for given in one.given) or "nobody",
        )
        for one in found
    ]
    print_table(("HANDLE", "WHAT", "FOR", "ASKED BY", "ASKED", "NEEDS", "APPROVED BY"), rows)
    return Exit.DONE


@approval.command("withdraw")
@click.argument("handle", metavar="HANDLE")
@click.argument("who", metavar="NAME")
def withdraw(handle: str, who: str) -> int:
    """Take the yes of NAME back; what runs on it is stopped."""
    with open_client() as client:
        client.withdraw_approval(handle, who)
    note(f"{handle}: the approval of {who} was taken back")
    return Exit.DONE


@click.command()
@click.argument("handle", metavar="HANDLE")
@click.option(
    "--as", "who", required=True, metavar="NAME", help="Who approves, as approvers.toml names them."
)
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    required=True,
    help="The approver's private key (PEM).",
)
@click.option("--valid", default="14d", show_default=True, metavar="TIME", help="How long the yes holds.")
@json_option
def approve(handle: str, who: str, key_file: Path, valid: str, as_json: bool) -> int:
    """Sign a yes to exactly what HANDLE asks: these data, this recipient, purpose and duties.

    The key stays here; what is sent is the signed approval.
    """
    import time

    from flowengine.cli.output import print_json
    from flowengine.cli.policy_files import read_private_key
    from flowengine.trust.approval import Yes, sign_approval
    from flowengine.units import parse_duration_s

    seconds = parse_duration_s(valid)
    if seconds <= 0:
        raise UsageError(f"--valid {valid!r} is no time to come", hint="write it like 14d")
    with open_client() as client:
        asked = next((one for one in client.approvals() if one.handle == handle), None)
        if asked is None:
            raise NotFound(f"there is no request for approval {handle}", hint="flow approval ls lists them")
        now = int(time.time())
        said = Yes(
            who=who,
            dataset=asked.dataset,
            recipient=asked.recipient,
            purpose=asked.purpose,
            duties=asked.duties_digest,
            requester=asked.requester,
            given=now,
            until=now + int(seconds),
        )
        made = client.approve(handle, sign_approval(said, read_private_key(key_file)))
    if as_json:
        print_json(plain(made))
        return Exit.DONE
    note(f"{who} approved {made.source}:{made.path} to {made.recipient}, asked for by {made.requester}")
    for duty in made.duties:
        note(f"  under {duty}")
    return Exit.DONE
