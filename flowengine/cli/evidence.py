"""`flow evidence`: look at, verify and export what agents and the coordinator recorded."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowengine.cli.groups import Group
from flowengine.cli.policy_options import print_json
from flowengine.errors import Exit
from flowengine.units import format_count

if TYPE_CHECKING:
    from flowengine.evidence.chain import Record

__all__ = ["evidence"]


@click.group(cls=Group)
def evidence() -> None:
    """Evidence: what was decided, done and stopped, and whether anybody changed it.

    WHERE is the folder in which an agent keeps it (STATE/evidence), a file that `flow evidence export` wrote, or
    `coordinator` for the coordinator's own chain.
    """


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)


def _policies_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--policies",
        multiple=True,
        type=click.Path(exists=True, path_type=Path),
        metavar="PATH",
        help=f"{what}: a bundle, or the directory a coordinator ran with.",
    )


def _range_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--to", "until", metavar="B", help="Up to this record's number, day or moment (UTC)."),
        click.option("--from", "since", metavar="A", help="From this record's number, day or moment (UTC)."),
    ):
        command = option(command)
    return command


@evidence.command()
@click.argument("where")
@click.option("--ca", type=click.Path(path_type=Path), help="The federation's CA certificate (PEM).")
@click.option(
    "--against",
    multiple=True,
    metavar="WHERE",
    help="Other chains: their checkpoints of this one are compared.",
)
@click.option("--online", is_flag=True, help="Compare with the checkpoints that the coordinator holds.")
@_policies_option("Policies that records name and that are not with them")
@_range_options
@_json_option
def verify(
    where: str,
    ca: Path | None,
    against: tuple[str, ...],
    online: bool,
    policies: tuple[Path, ...],
    since: str | None,
    until: str | None,
    as_json: bool,
) -> int:
    """Replay a chain: order, hashes, signatures, and each decision by its facts and its bundle.

    WHERE may also be a signed receipt, or `receipts/N` of an exported file; or the name of a site: then the signed heads
    of its chain that the coordinator and other sites hold are compared, for its records stay there. Exit code 6 where
    anything is wrong; 3 where nothing is, and something could not be checked.
    """
    from flowengine.cli.evidence_source import (
        chosen_by,
        find_anchors,
        find_elsewhere,
        given_policies,
        is_site,
        load,
        receipt_in,
    )
    from flowengine.evidence.replay import Replayer
    from flowengine.evidence.verify import verify_chain, verify_proofs

    receipt = receipt_in(where)
    if receipt is not None:
        return _verify_receipt(where, receipt, ca, as_json)
    if is_site(where):
        return _verify_site(where, ca, as_json)
    found = load(where)
    anchors, trusted = find_anchors(found, where, ca)
    bundles = {**given_policies(policies), **found.evidence.bundles}
    replayer = Replayer(bundles, found.evidence.key, found.evidence.kept)
    if found.evidence.proofs:
        verdict = verify_proofs(
            found.evidence.lines, found.evidence.proofs, anchors, replayer, found.evidence.suite
        )
    else:
        verdict = verify_chain(
            found.evidence.lines,
            anchors,
            replayer,
            elsewhere=[*found.evidence.elsewhere, *find_elsewhere(against, online)],
            chosen=chosen_by(since, until),
            agent=found.agent,
            begun=found.begun,
        )
    for document in found.evidence.receipts:
        _count_receipt(document, anchors, verdict)
    said = {"where": where, "whole": not found.evidence.proofs, "ca": trusted, "torn_bytes": found.torn}
    if as_json:
        print_json({**said, **verdict.as_dict(), "ok": not verdict.findings and not verdict.unchecked})
    else:
        _print_verdict(said, verdict.as_dict())
    if verdict.findings:
        return Exit.INTEGRITY
    return Exit.NOT_FOUND if verdict.unchecked else Exit.DONE


def _verify_site(site: str, ca: Path | None, as_json: bool) -> int:
    """Compare what others hold of a site's chain."""
    import base64

    from flowengine.cli.evidence_source import ca_for_receipt, fingerprint
    from flowengine.cli.federation import open_client
    from flowengine.errors import NotFound
    from flowengine.evidence.heads import verify_heads

    anchors = ca_for_receipt(ca)
    with open_client() as client:
        held = [base64.b64decode(one.document) for one in client.checkpoints(site)]
    if not held:
        raise NotFound(
            f"nobody has handed in a head of the evidence of site {site}",
            hint="flow site ls lists sites; one without policies keeps none",
        )
    verdict = verify_heads(f"site:{site}", held, anchors)
    if as_json:
        print_json(
            {"where": site, "ca": fingerprint(anchors), **verdict.as_dict(), "ok": not verdict.findings}
        )
    else:
        click.echo(f"{verdict.agent}: {verdict.heads} heads that the coordinator and other sites hold")
        click.echo(f"  CA          {fingerprint(anchors)}")
        click.echo(f"  signed      up to record {verdict.signed_to}, at {verdict.time}")
        click.echo("  records     stay at the site; there the same command evaluates each decision anew")
        for finding in verdict.findings:
            click.echo(f"  WRONG       {finding.what}: {finding.text}")
        click.echo(
            format_count(len(verdict.findings), "finding") if verdict.findings else "they are of one history"
        )
    return Exit.INTEGRITY if verdict.findings else Exit.DONE


def _count_receipt(document: bytes, anchors: str, verdict: Any) -> None:
    from flowengine.errors import FlowError
    from flowengine.trust.receipt import verify_receipt

    try:
        verify_receipt(document, anchors)
        verdict.receipts += 1
    except FlowError as error:
        verdict.add("receipt", None, f"a receipt is wrong: {error.message}")


def _print_verdict(said: dict[str, Any], verdict: dict[str, Any]) -> None:
    decisions = verdict["decisions"]
    click.echo(f"{verdict['agent'] or said['where']}: {format_count(verdict['records'], 'record')}", nl=False)
    click.echo(f" ({verdict['first']} to {verdict['last']})" if verdict["records"] else "")
    click.echo(f"  CA          {said['ca']}")
    signed = f"up to record {verdict['signed_to']}" if verdict["signed_to"] else "nothing"
    click.echo(f"  signed      {signed}")
    if said["whole"] and verdict["unsigned"]:
        click.echo(f"              {verdict['unsigned']} behind it are chained, and not signed yet")
    if verdict["held_by"]:
        click.echo(f"  compared    with checkpoints held by {', '.join(verdict['held_by'])}")
    elif said["whole"]:
        click.echo(
            "  compared    with nobody's checkpoints: a cut end would not be noticed (--against, --online)"
        )
    click.echo(
        f"  decisions   {decisions['evaluated']} come out the same, {decisions['recorded']} rest on values that are "
        f"kept elsewhere, {decisions['refused']} refusals needed no policy"
    )
    if verdict["obligations"]:
        told = ", ".join(f"{number} {state}" for state, number in verdict["obligations"].items())
        click.echo(f"  duties      {told}")
    if verdict["receipts"] or verdict["deletions"]:
        click.echo(f"  signed by   sites: {verdict['receipts']} receipts, {verdict['deletions']} deletions")
    if said["torn_bytes"]:
        click.echo(f"  at the end  {said['torn_bytes']} bytes of a record that is not whole were left out")
    for finding in verdict["findings"]:
        click.echo(f"  WRONG       {finding['what']}: {finding['text']}")
    for one in verdict["unchecked"]:
        click.echo(f"  NOT CHECKED {one['what']}: {one['text']}")
        click.echo(f"              next: {one['next']}")
    click.echo(
        format_count(len(verdict["findings"]), "finding")
        if verdict["findings"]
        else "nothing is wrong with what could be checked"
        if verdict["unchecked"]
        else "nothing is wrong with what is there"
    )


def _verify_receipt(where: str, document: bytes, ca: Path | None, as_json: bool) -> int:
    from flowengine.cli.evidence_source import ca_for_receipt, fingerprint
    from flowengine.trust.receipt import verify_receipt

    anchors = ca_for_receipt(ca)
    said, facts = verify_receipt(document, anchors)
    shown = {
        "site": said.site, "transfer": said.transfer, "task": said.task, "source": said.source,
        "path": said.path, "version_id": said.version_id.hex(), "state": said.state, "objects": said.objects,
        "size_bytes": said.size_bytes, "objects_failed": said.objects_failed, "landed": said.landed,
        "policy_digest": said.policy_digest.hex(), "decisions": list(said.decisions), "key": facts.key_sha256,
    }  # fmt: skip
    if as_json:
        print_json({"where": where, "ca": fingerprint(anchors), "ok": True, "receipt": shown})
        return Exit.DONE
    from flowengine.evidence.chain import moment_ms

    click.echo(f"site {said.site} signed for {said.objects} objects, {said.size_bytes} bytes, {said.state}")
    click.echo(f"  from        {said.source}")
    click.echo(f"  at          {said.site}:{said.path}")
    click.echo(f"  landed      {moment_ms(said.landed)} by that site's clock")
    click.echo(f"  version id  {said.version_id.hex()}")
    click.echo(f"  transfer    {said.transfer}, task {said.task}")
    click.echo(f"  CA          {fingerprint(anchors)}")
    return Exit.DONE


@evidence.command("ls")
@click.argument("where")
@click.option("--kind", multiple=True, help="Only records of this kind.")
@click.option("--transfer", help="Only records of this transfer.")
@_range_options
@_json_option
def ls(
    where: str,
    kind: tuple[str, ...],
    transfer: str | None,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> int:
    """List records: number, time, kind, and their sentence. Nothing is verified."""
    from flowengine.cli.evidence_source import chosen_by, load, records_of

    chosen = chosen_by(since, until)
    found = [
        record
        for record in records_of(load(where))
        if chosen(record)
        and (not kind or record.kind in kind)
        and (transfer is None or record.get("transfer") == transfer)
    ]
    if as_json:
        print_json({"records": [dict(record.data) for record in found]})
        return Exit.DONE
    for record in found:
        click.echo(f"{record.seq:>7}  {record.time}  {record.kind:<18}  {_sentence(record, 'en')}")
    return Exit.DONE


@evidence.command()
@click.argument("where")
@click.argument("number", metavar="NUMBER|DECISION")
@_json_option
def show(where: str, number: str, as_json: bool) -> int:
    """Show one record, by its number or a decision's id: in English, in Chinese, and field by field."""
    import json

    from flowengine.cli.evidence_source import load, records_of
    from flowengine.errors import NotFound

    for record in records_of(load(where)):
        if str(record.seq) == number or record.get("decision_id") == number:
            break
    else:
        raise NotFound(f"{where} holds no record {number}", hint="flow evidence ls lists them")
    if as_json:
        print_json({"record": dict(record.data)})
        return Exit.DONE
    click.echo(f"record {record.seq} of {record.agent}, {record.kind}, {record.time}")
    for language in ("en", "zh"):
        if text := _sentence(record, language):
            click.echo(f"  {text}")
    click.echo(json.dumps(dict(record.data), ensure_ascii=False, indent=1))
    return Exit.DONE


def _sentence(record: Record, language: str) -> str:
    text = record.get("text")
    if isinstance(text, dict):
        return str(text.get(language, ""))
    return {"en": "A chain of evidence begins.", "zh": "证据链开始。"}[language]


@evidence.command()
@click.argument("where")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--transfer", multiple=True, help="Only records of these transfers, with proofs of each.")
@click.option("--ca", type=click.Path(path_type=Path), help="The federation's CA certificate (PEM).")
@click.option(
    "--against", multiple=True, metavar="WHERE", help="Take in the checkpoints that these chains hold."
)
@click.option("--online", is_flag=True, help="Take in the checkpoints that the coordinator holds.")
@_policies_option("Take in policies that records name and that are not with them")
@_json_option
def export(
    where: str,
    output: Path,
    transfer: tuple[str, ...],
    ca: Path | None,
    against: tuple[str, ...],
    online: bool,
    policies: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Write evidence to one file that verifies offline: records, bundles, certificates, checkpoints, receipts.

    Values that are kept as keyed digests stay where they are.
    """
    from dataclasses import replace

    from flowengine.cli.evidence_source import (
        find_anchors,
        find_elsewhere,
        given_policies,
        load,
        needed_bundles,
        records_of,
    )
    from flowengine.errors import NotFound, UsageError
    from flowengine.evidence.archive import choose, pack
    from flowengine.evidence.suites import DEFAULT_SUITE, find_suite

    found = load(where)
    if found.evidence.proofs:
        raise UsageError(f"{where} holds chosen records already", hint="export from the chain itself")
    anchors, _ = find_anchors(found, where, ca)
    records = records_of(found)
    suite = find_suite(records[0].get("suite") or DEFAULT_SUITE) if records else find_suite(DEFAULT_SUITE)
    evidence = replace(found.evidence, anchors_pem=anchors, suite=suite.name)
    evidence.elsewhere = [*evidence.elsewhere, *find_elsewhere(against, online)]
    wanted = records
    if transfer:
        wanted = [record for record in records if record.get("transfer") in transfer]
        if not wanted:
            raise NotFound(
                f"{where} holds no record of transfer {', '.join(transfer)}",
                hint="flow evidence ls lists them",
            )
        wanted = [*_activations(records, wanted), *wanted]
        evidence.lines = [record.line for record in wanted]
        evidence.proofs = choose(records, wanted, suite, anchors)
        evidence.elsewhere = []
    evidence.bundles = needed_bundles({**given_policies(policies), **evidence.bundles}, wanted)
    about = {"agent": records[0].agent if records else "", "transfers": list(transfer)}
    content = pack(evidence, about)
    # What it tells of data is for auditors and not for all, also where there was a file of that name.
    with open(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), 0o600)
        file.write(content)
    if as_json:
        print_json({"file": str(output), "records": len(evidence.lines), "size_bytes": len(content), **about})
    else:
        click.echo(f"{output}: {len(evidence.lines)} records; flow evidence verify {output}")
    return Exit.DONE


def _activations(records: list[Record], wanted: list[Record]) -> list[Record]:
    """The records that say when the bundles of some decisions came into force."""
    bundles = {record.get("bundle") for record in wanted}
    first: dict[object, Record] = {}
    for record in records:
        if record.kind == "policy.activate" and record.get("bundle") in bundles:
            first.setdefault(record.get("bundle"), record)
    return list(first.values())
