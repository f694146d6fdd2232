"""Sealing keys for an operator: which there are, and how another site comes by one.

A key leaves this site wrapped to the opening key of one other site, and only where this site's policies, as they are in
force now, would let the data that it opens land there.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime

import click
import msgspec

from flowengine.errors import AuthenticationError, Denied, Exit, LocalError, NotFound, UsageError
from flowengine.policy.explain import explain
from flowengine.store.grants import GrantLedger
from flowengine.store.keyring import Keyring
from flowengine.store.sealed_open import open_sealed
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.grant import Grant, Party
from flowengine.trust.sealing_keys import KeptKey, unwrap_key, wrap_key
from flowengine.units import format_bytes, format_count, show_path
from flowengine_agent.config import SiteConfig, load_config
from flowengine_agent.gate import Gate
from flowengine_agent.identity import load_identity
from flowengine_agent.logs import open_log
from flowengine_agent.policies import Policies

__all__ = ["keys"]

_MAX_DOCUMENT_BYTES = 1 << 16
_config_option = click.option(
    "--config", "config_path", required=True, metavar="FILE", type=click.Path(), help="The site's site.toml."
)


@click.group()
def keys() -> None:
    """Keys of what this site sealed, or may open."""


def _load(config_path: str) -> SiteConfig:
    """The configuration, where whoever runs this may make files that the agent can read.

    Raises:
        UsageError: the state folder is another account's.
    """
    config = load_config(config_path)
    try:
        owner = os.stat(config.state).st_uid
    except OSError as error:
        raise LocalError(
            f"the state folder {config.state} cannot be looked at: {error.strerror}",
            hint="run this at the site, as the account that runs the agent",
        ) from None
    if owner != os.geteuid():
        raise UsageError(
            f"the state folder {config.state} belongs to uid {owner}, and this runs as uid {os.geteuid()}: the agent "
            "could not read what it would write",
            hint=f"run it as that account: setpriv --reuid={owner} --clear-groups flowengine-agent keys ...",
        )
    return config


def _keyring(config: SiteConfig) -> Keyring:
    return Keyring(os.path.join(config.state, "sealing"))


@keys.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def ls(config_path: str, as_json: bool) -> int:
    """List the keys; none of their secrets."""
    rows = [
        {
            "key": kept.key.id.hex(),
            "site": kept.site,
            "path": kept.path,
            "tenant": kept.tenant,
            "created": datetime.fromtimestamp(kept.created, UTC).isoformat(),
        }
        for kept in _keyring(_load(config_path)).kept()
    ]
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return 0
    for row in rows:
        print(
            f"{row['key']}  {row['site']}:{show_path(os.fsencode(row['path']))}  tenant {row['tenant'] or '-'}  since {row['created']}"
        )
    return 0


@keys.command()
@_config_option
def show(config_path: str) -> int:
    """Print this site's opening key, to which others wrap theirs; it is no secret."""
    print(_keyring(_load(config_path)).opening_key().public)
    return 0


@keys.command()
@click.argument("key")
@_config_option
@click.option("--site", required=True, metavar="SITE", help="Who gets it.")
@click.option(
    "--to", "public", required=True, metavar="HEX", help="What `flowengine-agent keys show` says there."
)
def give(key: str, config_path: str, site: str, public: str) -> int:
    """Wrap a key for another site, where policy lets the data land there; prints the document to send.

    What it prints is no secret, but for that site: send it by any way, and have it taken with `keys take`.
    """
    config = _load(config_path)
    try:
        key_id = bytes.fromhex(key)
    except ValueError:
        raise UsageError(f"{key!r} is no id of a key", hint="flowengine-agent keys ls lists them") from None
    kept = _keyring(config).find(key_id)
    if kept.site != config.site:
        raise Denied(
            f"key {key} is kept by site {kept.site}: only that site may give it away",
            hint=f"ask for it at {kept.site}",
        )
    _check_policy(config, kept, site)
    sys.stdout.write(wrap_key(kept, public).decode())
    return 0


def _check_policy(config: SiteConfig, kept: KeptKey, site: str) -> None:
    """Refuse where this site's policies would not let the data land at a site.

    Raises:
        Denied: they would not, or cannot be used.
    """
    identity = load_identity(os.path.join(config.state, "identity"))
    if identity is None:
        raise LocalError(f"site {config.site!r} has not enrolled yet", reason="not-enrolled")
    policies = Policies(
        os.path.join(config.state, "policy"), config.policy_keys, required=config.policy_required
    )
    bundle = policies.in_force
    pinned = bundle.policies.sites.get(site) if bundle is not None else None
    if bundle is not None and pinned is None:
        raise Denied(
            f"the policies of {config.site} pin nothing of site {site}",
            hint="pin its key and country in sites.toml of the bundle",
            reason="policy-denied",
        )
    now = int(time.time())
    me = identity.for_engine().party
    target = Party(site, pinned.key if pinned is not None else "")
    asked = Grant(
        id=bytes(16), transfer="", task="", fence=1, epoch=1, issued=now, expires=now + 300, source=me,
        target=target, dial="target", route=[me.site, site], source_path=kept.path, target_path="/",
        mode="copy", secret=bytes(32), tenant=kept.tenant,
    )  # fmt: skip
    gate = Gate(
        SiteTrust(identity.for_engine(), identity.grant_keys, GrantLedger(":memory:")),
        policies,
        open_log(config.log, config.site),
    )
    for one in gate.review("release", asked, (me, target), None):
        if not one.decision.permit:
            assert bundle is not None
            raise Denied(
                f"policy at {config.site} does not permit to {one.decision.use} {kept.path} at {one.place.name}: "
                f"{explain(bundle.engine, one.decision)}",
                hint="whoever has the key can read the data: nothing was given",
                reason="policy-denied",
            )


@keys.command(name="open")
@click.argument("folder", type=click.Path())
@click.argument("target", type=click.Path())
@_config_option
def open_folder(folder: str, target: str, config_path: str) -> int:
    """Open a FOLDER of sealed objects on this host into TARGET: for when there is no federation to copy with.

    Uses the keys of this site, and asks no policy: whoever may read its keys can read what they open.
    """
    ring = _keyring(_load(config_path))
    try:
        os.makedirs(target, exist_ok=True)
        found = open_sealed(
            os.fsencode(folder),
            os.fsencode(target),
            lambda key_id: ring.find(key_id).key,
            xattrs=True,
            owner=True,
        )
    except FileNotFoundError:
        raise NotFound(f"there is no folder {folder}") from None
    except OSError as error:
        raise LocalError(f"{folder} cannot be opened into {target}: {error.strerror}") from None
    print(f"opened {format_count(found.objects, 'object')}, {format_bytes(found.size_bytes)}, into {target}")
    for path, reason, message in found.failures:
        print(f"  {show_path(path)}: {message} ({reason})", file=sys.stderr)
    return Exit.SOME_OBJECTS_FAILED if found.failures else Exit.DONE


@keys.command()
@click.argument("document", type=click.Path())
@_config_option
def take(document: str, config_path: str) -> int:
    """Keep a key that another site gave to this one; `-` reads it from standard input."""
    try:
        if document == "-":
            data = sys.stdin.buffer.read(_MAX_DOCUMENT_BYTES)
        else:
            with open(document, "rb") as file:
                data = file.read(_MAX_DOCUMENT_BYTES)
    except FileNotFoundError:
        raise NotFound(f"there is no file {document}") from None
    except OSError as error:
        raise LocalError(f"{document} cannot be read: {error.strerror}") from None
    config = _load(config_path)
    ring = _keyring(config)
    kept = unwrap_key(data, ring.opening_key(), document)
    if kept.site == config.site:
        raise AuthenticationError(
            f"{document} says to hold a key of this site itself", reason="sealing-key-other"
        )
    ring.add(kept)
    shown = f"{kept.site}:{show_path(os.fsencode(kept.path))}"
    print(f"this site opens now what {shown} was sealed to (key {kept.key.id.hex()})")
    return 0
