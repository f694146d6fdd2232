"""`flow policy bundle`: build, sign and verify what agents load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowengine.cli.groups import Group
from flowengine.cli.policy_options import at_option, directory_option, json_option, print_json
from flowengine.errors import Exit

if TYPE_CHECKING:
    from flowengine.api.sites import SitePolicy

__all__ = ["bundle"]


@click.group(cls=Group)
def bundle() -> None:
    """Signed bundles: what agents load."""


@bundle.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option("--version", "version", type=int, required=True, help="Larger than that of any bundle before.")
@click.option(
    "--not-after", required=True, metavar="DATE", help="After this, agents start no transfer under it."
)
@click.option(
    "--allow-overdue", is_flag=True, help="Build though reviews are overdue; the bundle names them."
)
@at_option
@json_option
@directory_option
def build(
    directory: Path,
    as_json: bool,
    at: str | None,
    allow_overdue: bool,
    not_after: str,
    version: int,
    output: Path,
) -> int:
    """Build a bundle: policies, lists, declarations, sites and tests, with a lock of their digests.

    Everything has to load, every test has to pass, and no review may be overdue.
    """
    from flowengine.cli.policy_files import load_policies, moment, read_files, read_tests, refuse_tests
    from flowengine.errors import FlowError, UsageError
    from flowengine.policy.bundle import build as make
    from flowengine.policy.bundle import open_bundle
    from flowengine.policy.lint import overdue
    from flowengine.policy.runner import run

    policies = load_policies(directory)
    found, problems = read_tests(policies)
    refuse_tests(problems)
    report = run(policies, found)
    if report.failed:
        names = ", ".join(f"{item.name!r} in {item.file}" for item in report.failed[:5])
        raise FlowError(f"{len(report.failed)} tests fail: {names}", hint="see `flow policy test`")
    now, end = moment(at), moment(not_after)
    if end <= now:
        raise UsageError(
            f"--not-after {not_after} is in the past", hint="name a day on which the next bundle is there"
        )
    late = overdue(policies, now)
    if late and not allow_overdue:
        raise FlowError(
            f"reviews are overdue: {', '.join(late)}",
            hint="review them and set review_by, or build with --allow-overdue, which the bundle records",
        )
    files = {name: content for name, content in read_files(directory).items() if name != "datasets.toml"}
    content = make(files, version, end, late)
    output.write_bytes(content)
    opened = open_bundle(content)
    if as_json:
        print_json({"bundle": str(output), "digest": opened.digest, "version": version, "overdue": late})
    else:
        click.echo(f"{opened.digest}  {output}: version {version}, {len(files)} files, not signed yet")
    return Exit.DONE


@bundle.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def keygen(file: Path, as_json: bool) -> int:
    """Make an Ed25519 key: FILE is the private key, FILE.pub the public one."""
    import os

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from flowengine.errors import UsageError
    from flowengine.policy.bundle import key_id
    from flowengine.store.secret_files import write_secret

    public = file.with_name(file.name + ".pub")
    if file.exists() or public.exists():
        raise UsageError(
            f"{file} or {public} exists already", hint="choose another name; keys are not overwritten"
        )
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(os.fspath(file), secret, replace=False)
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    name, raw = key_id(key.public_key()), key.public_key().public_bytes_raw().hex()
    if as_json:
        print_json({"key": name, "private": str(file), "public": str(public), "raw": raw})
    else:
        click.echo(f"{name}  {public}")
        click.echo(f"in owners.toml or site.toml: {raw}")
    return Exit.DONE


@bundle.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--role", type=click.Choice(["policy-owner", "security"]), required=True)
@click.option("--key", "key_file", type=click.Path(path_type=Path), required=True, help="Private key (PEM).")
@json_option
def sign(file: Path, role: str, key_file: Path, as_json: bool) -> int:
    """Add a signature to a bundle, in place. Two roles have to sign, each with a key of its own."""
    import os

    from flowengine.cli.policy_files import read_private_key
    from flowengine.policy.bundle import key_id, open_bundle
    from flowengine.policy.bundle import sign as add

    content, key = _read(file), read_private_key(key_file)
    signed = add(content, role, key)
    part = file.with_name(file.name + ".part")
    part.write_bytes(signed)
    os.replace(part, file)
    roles = [name for name, _, _ in open_bundle(signed).signatures]
    if as_json:
        print_json({"bundle": str(file), "role": role, "key": key_id(key.public_key()), "signed_by": roles})
    else:
        click.echo(f"{file}: signed by {', '.join(roles)}")
    return Exit.DONE


@bundle.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trust",
    multiple=True,
    required=True,
    metavar="ROLE=FILE.pub",
    help="A key trusted for a role; repeat it.",
)
@click.option("--newer-than", type=int, default=0, metavar="VERSION", help="The version in force.")
@at_option
@json_option
def verify(file: Path, trust: tuple[str, ...], newer_than: int, at: str | None, as_json: bool) -> int:
    """Check a bundle as an agent does: intact, signed by both roles, newer, not expired, and loadable."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from flowengine.cli.policy_files import moment
    from flowengine.errors import UsageError
    from flowengine.policy.bundle import ROLES, read_public_key
    from flowengine.policy.bundle import verify as judge
    from flowengine.policy.parse import load
    from flowengine.policy.phrases import moment_text

    trusted: dict[str, list[Ed25519PublicKey]] = {}
    for pair in trust:
        role, _, name = pair.partition("=")
        if role not in ROLES or not name:
            raise UsageError(f"--trust {pair!r} is not ROLE=FILE", hint="roles: " + ", ".join(ROLES))
        trusted.setdefault(role, []).append(read_public_key(_read(Path(name))))
    opened = judge(_read(file), trusted, moment(at), newer_than)
    policies = load(opened.files)
    row = {
        "bundle": str(file), "digest": opened.digest, "version": opened.version,
        "not_after": moment_text(opened.not_after), "policies": [item.id for item in policies.policies],
        "signed_by": [{"role": role, "key": owner} for role, owner, _ in opened.signatures],
        "overdue": list(opened.overdue),
    }  # fmt: skip
    if as_json:
        print_json(row)
    else:
        click.echo(f"{opened.digest}  version {opened.version}, until {moment_text(opened.not_after)}, signed by "
                   + " and ".join(f"{role} ({owner})" for role, owner, _ in opened.signatures))  # fmt: skip
        if opened.overdue:
            click.echo("built with overdue reviews: " + ", ".join(opened.overdue))
    return Exit.DONE


@bundle.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def push(file: Path, as_json: bool) -> int:
    """Put the signed bundle FILE in force: at the coordinator now, at each agent as soon as it has checked it.

    It must be signed by both roles, and newer than any before. `flow policy bundle status` shows who has it.
    """
    from flowengine.cli.federation import open_client, plain
    from flowengine.policy.phrases import moment_text

    content = _read(file)
    with open_client() as client:
        made = client.activate_bundle(content)
    if as_json:
        print_json(plain(made))
    else:
        until = moment_text(int(made.not_after.timestamp()))
        click.echo(f"version {made.version} is in force until {until}: {', '.join(made.policies)}")
    return Exit.DONE


@bundle.command()
@json_option
def status(as_json: bool) -> int:
    """Show which bundle is in force, and which one each site's agent decides by.

    Exit code 1 where a site that takes bundles does not have the one in force.
    """
    from flowengine.cli.federation import open_client, plain, print_table, show_time

    with open_client() as client:
        bundles, sites = client.bundles(), client.sites()
    in_force = next((found for found in bundles if found.in_force), None)
    version = in_force.version if in_force is not None else 0
    sites = [site for site in sites if site.state != "revoked"]
    behind = [site.name for site in sites if site.policy.takes and site.policy.version != version]
    if as_json:
        print_json(
            {
                "bundles": plain(bundles),
                "in_force": version,
                "sites": {site.name: plain(site.policy) for site in sites},
                "behind": behind,
            }
        )
    else:
        if in_force is None:
            click.echo("no bundle is in force")
        else:
            click.echo(
                f"version {version} {in_force.digest} until {show_time(in_force.not_after)}, activated by "
                f"{in_force.activated_by}: {', '.join(in_force.policies)}"
            )
        rows = [(site.name, _has(site.policy, version), site.policy.problem or "-") for site in sites]
        print_table(("SITE", "DECIDES BY", "PROBLEM"), rows)
    return Exit.FAILED if behind else Exit.DONE


def _has(policy: SitePolicy, version: int) -> str:
    if not policy.takes:
        return "no policies: it trusts nobody to sign them"
    if not policy.version:
        return "none yet" + (": nothing moves" if policy.required else ": everything passes")
    return f"version {policy.version}" + ("" if policy.version == version else " (not the one in force)")


def _read(file: Path) -> bytes:
    from flowengine.errors import NotFound

    if not file.is_file():
        raise NotFound(f"there is no file {file}", hint="check the name")
    return file.read_bytes()
