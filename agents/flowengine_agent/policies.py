"""The policies that this agent decides by: the bundle in force, label statements, what copies here inherited.

Goal
    An agent decides by what two roles have signed, and nobody, not even who restores a backup, brings it back to
    older policies or labels.
Plan
    POLICY/bundle      the bundle in force, replaced in one step
    POLICY/memory.sqlite  highest version and highest number of each statement ever taken, the statements, and with which
                       labels something landed here
Invariants
    - Nothing is in force that both roles have not signed with keys of this site's own configuration.
    - Versions and numbers never fall: the mark is durable before what it belongs to is used.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flowengine.api.sites import SitePolicy
from flowengine.errors import AuthenticationError, Denied, FlowError, LocalError, NotFound
from flowengine.policy import Engine, PolicySet, Statement, load
from flowengine.policy.agreements import Agreement, agreement_statements
from flowengine.policy.asking import Place
from flowengine.policy.bundle import Bundle, authentic, verify
from flowengine.policy.labels import Inherited, Labelling, overlaps, relevant
from flowengine.policy.model import Authority
from flowengine.store.secret_files import make_secret_folder
from flowengine.store.state_file import StateFile
from flowengine.trust.agreement import AGREEMENT_DOMAIN, verify_agreement
from flowengine.trust.envelope import document_domain
from flowengine.trust.labels import verify_labels

__all__ = ["InForce", "Policies"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS mark (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS label (
    owner TEXT NOT NULL, site TEXT NOT NULL, path TEXT NOT NULL, number INTEGER NOT NULL, document BLOB NOT NULL,
    PRIMARY KEY (owner, site, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS agreement (
    authority TEXT NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL, document BLOB NOT NULL,
    PRIMARY KEY (authority, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS inherited (
    path TEXT NOT NULL, labels TEXT NOT NULL, contracts TEXT NOT NULL, PRIMARY KEY (path, labels, contracts)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class InForce:
    """A bundle that this agent decides by, compiled; `content` is the archive as it came."""

    bundle: Bundle
    engine: Engine
    content: bytes

    @property
    def policies(self) -> PolicySet:
        """What its files say."""
        return self.engine.policies

    def is_expired(self, now: float) -> bool:
        """Whether no transfer may start under it any more."""
        return self.bundle.not_after <= now


class Policies:
    """Bundle, labels and inheritance of a site; safe to use from any thread.

    Args:
        folder: where they are kept; None keeps nothing (for a site without policies).
        trusted: keys by role; empty: no bundle is ever taken.
        required: whether a site without a bundle denies everything.
    """

    def __init__(
        self,
        folder: str | None,
        trusted: Mapping[str, Sequence[Ed25519PublicKey]] | None = None,
        *,
        required: bool = False,
    ) -> None:
        self.trusted = dict(trusted or {})
        self.required = required
        self.in_force: InForce | None = None
        self.problem = ""
        """Why the bundle that is here cannot be used; empty where nothing is wrong."""
        self.max_offline_s: float | None = None
        """What the site's own configuration says of it; None: as the bundle does."""
        self._folder = folder
        self._lock = threading.Lock()
        self._labellings: dict[tuple[str, str, str], Labelling] = {}
        self._agreements: dict[tuple[str, str], Agreement] = {}
        self.labels_heard = 0
        """Up to which of the coordinator's serials statements were read in this life, under this bundle."""
        if folder is not None and self.trusted:
            make_secret_folder(folder)
        self._memory = StateFile(
            os.path.join(folder, "memory.sqlite") if folder is not None and self.trusted else ":memory:",
            "the memory of policies and labels",
            _SCHEMA,
            if_unusable="restore it; an empty one would take older policies and labels than this site has had",
        )
        self._load()

    def close(self) -> None:
        """Close the memory."""
        self._memory.close()

    @property
    def takes_bundles(self) -> bool:
        """Whether this site trusts anybody to sign policies."""
        return bool(self.trusted)

    def described(self) -> SitePolicy:
        """What the coordinator is told of them."""
        found = self.in_force
        return SitePolicy(
            version=found.bundle.version if found is not None else 0,
            digest=found.bundle.digest if found is not None else "",
            takes=self.takes_bundles,
            problem=self.problem[:1000],
            labels=self.labels_heard,
            required=self.required,
            max_offline_s=self.max_offline_s,
        )

    @property
    def version(self) -> int:
        """The highest version ever in force here."""
        return self._mark("bundle")

    def _mark(self, name: str) -> int:
        rows = self._memory.rows("SELECT value FROM mark WHERE name = ?", name)
        return int(rows[0][0]) if rows else 0

    def _raise_mark(self, name: str, value: int) -> None:
        with self._memory.write() as db:
            db.execute(
                "INSERT INTO mark VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
                (name, value),
            )

    # --- bundles ------------------------------------------------------------------------------------------------

    @property
    def _bundle_file(self) -> str:
        assert self._folder is not None
        return os.path.join(self._folder, "bundle")

    def _load(self) -> None:
        """What an earlier life left; a file that is not what it was is not used, and said."""
        if self._folder is None or not self.trusted:
            return
        try:
            with open(self._bundle_file, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            if self.version:
                self.problem = f"the bundle in force, version {self.version}, is gone from {self._folder}"
            return
        try:
            opened = authentic(content, self.trusted)
            if opened.version < self.version:
                raise Denied(f"it has version {opened.version}; {self.version} was in force here")
            self._raise_mark("bundle", opened.version)  # died between the file and the mark
            self._use(opened, load(opened.files), content)
        except FlowError as error:
            self.problem = f"the bundle in {self._folder} is not used: {error.message}"

    def take(self, content: bytes, now: float) -> InForce:
        """Put a bundle in force.

        Raises:
            FlowError: it is damaged, not signed by both roles, not newer than any before, expired, or its policies
                cannot be read.
        """
        with self._lock:
            newest = self.version if self.in_force is not None else max(0, self.version - 1)
            opened = verify(content, self.trusted, int(now), newest)
            policies = load(opened.files)
            if not policies.policies:
                raise NotFound("the bundle holds no policy", hint="build it from the policies' folder")
            self._write(content)
            self._raise_mark("bundle", opened.version)
            self.problem = ""
            return self._use(opened, policies, content)

    def _write(self, content: bytes) -> None:
        part = self._bundle_file + ".part"
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._bundle_file)
            fd = os.open(os.path.dirname(self._bundle_file), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise LocalError(
                f"cannot keep the policy bundle in {self._folder}: {error.strerror or error}",
                hint="without it the old one stays in force; make room",
            ) from None

    def _use(self, opened: Bundle, policies: PolicySet, content: bytes) -> InForce:
        self.in_force = InForce(opened, Engine(policies), content)
        self._believe()
        self.labels_heard = (
            0  # among what was passed over there may be statements of owners that are known now
        )
        return self.in_force

    # --- labels -------------------------------------------------------------------------------------------------

    def _owners(self) -> dict[str, bytes]:
        if self.in_force is None:
            return {}
        return {name: owner.key for name, owner in self.in_force.policies.owners.items()}

    def _authorities(self) -> Mapping[str, Authority]:
        return {} if self.in_force is None else self.in_force.policies.authorities

    def _believe(self) -> None:
        """Check all statements against the owners and authorities of the bundle in force."""
        owners = self._owners()
        found = {}
        for (document,) in self._memory.rows("SELECT document FROM label"):
            try:
                one = verify_labels(document, owners)
            except AuthenticationError:
                continue  # of an owner that is none any more: its number stays, its word does not count
            found[one.owner, one.site, one.path] = one
        self._labellings = found
        agreed = {}
        for (document,) in self._memory.rows("SELECT document FROM agreement"):
            with contextlib.suppress(AuthenticationError):  # as above
                said = verify_agreement(document, self._authorities())
                agreed[said.authority, said.id] = said
        self._agreements = agreed

    def take_statements(self, documents: Iterable[tuple[int, bytes]]) -> list[FlowError]:
        """Take label statements and agreements with the coordinator's serials, in order; gives what is wrong with some."""
        problems: list[FlowError] = []
        with self._lock:
            owners, believed = self._owners(), dict(self._labellings)
            authorities, agreed = self._authorities(), dict(self._agreements)
            for serial, document in documents:
                try:
                    if document_domain(document) == AGREEMENT_DOMAIN:
                        said = verify_agreement(document, authorities)
                        if self._keep_agreement(said, document):
                            agreed[said.authority, said.id] = said
                    else:
                        one = verify_labels(document, owners)
                        if self._keep_label(one, document):
                            believed[one.owner, one.site, one.path] = one
                except AuthenticationError as error:
                    problems.append(error)
                self.labels_heard = serial
            self._labellings, self._agreements = believed, agreed
        return problems

    def _keep_agreement(self, one: Agreement, document: bytes) -> bool:
        """Keep an agreement, durably; False where one with its number or a higher one was here."""
        with self._memory.write() as db:
            taken = db.execute(
                "INSERT INTO agreement VALUES (?, ?, ?, ?) ON CONFLICT (authority, id) DO UPDATE"
                " SET number = excluded.number, document = excluded.document WHERE excluded.number > number",
                (one.authority, one.id, one.number, document),
            )
            return taken.rowcount > 0

    def agreed(self, source: tuple[str, str], recipient: Place, now: float) -> list[Statement]:
        """What agreements say of data at a path of a site that move to a recipient."""
        if self.in_force is None:
            return []
        return agreement_statements(
            self.in_force.policies, self._agreements.values(), source, recipient, int(now)
        )

    def _keep_label(self, one: Labelling, document: bytes) -> bool:
        """Keep a statement, durably; False where one with its number or a higher one was here."""
        with self._memory.write() as db:
            taken = db.execute(
                "INSERT INTO label VALUES (?, ?, ?, ?, ?) ON CONFLICT (owner, site, path) DO UPDATE"
                " SET number = excluded.number, document = excluded.document WHERE excluded.number > number",
                (one.owner, one.site, one.path, one.number, document),
            )
            return taken.rowcount > 0

    def labellings(self, site: str, path: str, now: float) -> list[Labelling]:
        """The valid statements on a path of a site."""
        if self.in_force is None:
            return []
        return relevant(self.in_force.policies, self._labellings.values(), site, path, int(now))

    # --- inheritance --------------------------------------------------------------------------------------------

    def inherit(self, path: str, labels: Iterable[str], contracts: Iterable[str]) -> None:
        """Remember, durably, with which labels something is about to land below a path here."""
        row = [msgspec.json.encode(sorted(set(words))).decode() for words in (labels, contracts)]
        with self._memory.write() as db:
            db.execute("INSERT OR IGNORE INTO inherited VALUES (?, ?, ?)", (path.rstrip("/") or "/", *row))

    def inherited(self, path: str) -> list[Inherited]:
        """What data at a path here has from where it came from."""
        rows = self._memory.rows("SELECT path, labels, contracts FROM inherited")
        return [
            Inherited(frozenset(msgspec.json.decode(labels)), frozenset(msgspec.json.decode(contracts)))
            for root, labels, contracts in rows
            if overlaps(root, path)
        ]
