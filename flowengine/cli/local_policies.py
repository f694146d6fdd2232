"""Policies of a federation on this machine: signed with two keys of its own, with every site pinned, and handed out.

Elsewhere two people hold these keys. Here they make the way that bundles go the same as in a real federation: each
agent decides by what both roles signed, and not by what the coordinator says.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flowengine.cli.federation_file import Federation, SiteEntry
from flowengine.errors import NotFound, TemporaryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from flowengine.client import Client
    from flowengine.policy.model import PolicySet

__all__ = ["coordinator_options", "hand_out", "site_lines"]

ROLES: Final = {"policy-owner": "policy_owner", "security": "security"}
VALID_S: Final = 365 * 86_400
_RENEW_S: Final = 60 * 86_400
_TAKEN_S: Final = 20.0


def _key_file(folder: Path, role: str) -> Path:
    return folder / "policy-keys" / f"{role}.key"


def _key(folder: Path, role: str) -> Ed25519PrivateKey:
    """The role's key, made where there is none; the public one lies beside it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret

    file = _key_file(folder, role)
    make_secret_folder(os.fspath(file.parent))
    try:
        key = Ed25519PrivateKey.from_private_bytes(read_secret(os.fspath(file)))
    except NotFound:
        key = Ed25519PrivateKey.generate()
        write_secret(os.fspath(file), key.private_bytes_raw(), replace=False)
    file.with_suffix(".pub").write_text(key.public_key().public_bytes_raw().hex() + "\n", encoding="ascii")
    return key


def coordinator_options(federation: Federation, folder: Path) -> list[str]:
    """What the coordinator is started with: the policies to begin with, and whose signatures count."""
    if not federation.coordinator.policies:
        return []
    options = ["--policies", federation.coordinator.policies]
    for role in ROLES:
        _key(folder, role)
        options += [f"--{role}-key", str(_key_file(folder, role).with_suffix(".pub"))]
    return options


def site_lines(federation: Federation, folder: Path) -> list[str]:
    """The [policy] table of an agent's site.toml."""
    if not federation.coordinator.policies:
        return []
    lines = ["[policy]", "required = true"]
    for role, key in ROLES.items():
        public = _key(folder, role).public_key().public_bytes_raw().hex()
        lines.append(f'{key} = ["{public}"]')
    return lines


def hand_out(federation: Federation, folder: Path, client: Client) -> None:
    """Sign the policies with every site pinned, put them in force where they changed, wait until all sites have them.

    Raises:
        PolicyInvalid: something in them is wrong.
        TemporaryError: a site does not take them.
    """
    if not federation.coordinator.policies:
        return
    from flowengine.policy.bundle import build, open_bundle, sign

    files = _files(federation, client)
    newest = max((found.version for found in client.bundles()), default=0)
    if newest:
        there = open_bundle(client.bundle(newest).content)
        if there.files == files and there.not_after > time.time() + _RENEW_S:
            _wait_taken(federation, client, newest)
            return
    content = build(files, newest + 1, int(time.time()) + VALID_S)
    for role in ROLES:
        content = sign(content, role, _key(folder, role))
    client.activate_bundle(content)
    _wait_taken(federation, client, newest + 1)


def _files(federation: Federation, client: Client) -> dict[str, bytes]:
    from flowengine.cli.policy_files import read_files
    from flowengine.policy.parse import load

    files = {
        name: content
        for name, content in read_files(Path(federation.coordinator.policies)).items()
        if name != "datasets.toml"
    }
    policies = load(files)
    keys = {site.name: site.certificate.key_sha256 for site in client.sites() if site.certificate is not None}
    files["sites.toml"] = _pins(files.get("sites.toml", b""), federation.sites, keys, policies)
    return files


def _pins(given: bytes, entries: list[SiteEntry], keys: Mapping[str, str], policies: PolicySet) -> bytes:
    """The policies' own sites.toml, where they have one, with the sites of this federation and their keys."""
    document: dict[str, Any] = tomllib.loads(given.decode("utf-8-sig"))
    sites = document.setdefault("site", {})
    for entry in entries:
        pins = sites.setdefault(entry.name, {})
        for name, value in entry.facts.items():
            short = name.removeprefix("site.")
            attribute = policies.attributes.get(f"site.{short}")
            if attribute is not None:
                as_set = attribute.type == "set" and not isinstance(value, list)
                pins.setdefault(short, [value] if as_set else value)
        if entry.name in keys:
            pins.setdefault("key", keys[entry.name])
    lines = []
    for name, pins in sites.items():
        lines += [f"[site.{_toml(name)}]", *(f"{_toml(key)} = {_toml(value)}" for key, value in pins.items())]
    for link in document.get("link", []):
        lines += ["[[link]]", *(f"{_toml(key)} = {_toml(value)}" for key, value in link.items())]
    return ("\n".join(lines) + "\n").encode()


def _toml(value: object) -> str:
    """A value of a table of facts as TOML.

    >>> _toml({"a": ["b"], "c": True})
    '{"a" = ["b"], "c" = true}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, date):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)  # JSON's texts, numbers and flags are TOML's


def _wait_taken(federation: Federation, client: Client, version: int) -> None:
    names = {site.name for site in federation.sites}
    deadline = time.monotonic() + _TAKEN_S
    while True:
        behind = [site for site in client.sites() if site.name in names and site.policy.version != version]
        if not behind:
            return
        problems = [f"{site.name}: {site.policy.problem}" for site in behind if site.policy.problem]
        if problems or time.monotonic() > deadline:
            raise TemporaryError(
                f"not every site decides by the policies of version {version}: "
                + ("; ".join(problems) or ", ".join(site.name for site in behind)),
                hint="flow policy bundle status; the logs in the state folder tell more",
            )
        time.sleep(0.02)
