"""Which account of this host a requester's transfers are carried by: the rule, and the accounts as the system knows them.

The rule is data of site.toml: the closest key wins, `TENANT/USER` before `USER` before `TENANT/*`. Whoever is not
mapped is refused, or acted for by the agent's own account where `default` says so.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from flowengine.errors import Denied

__all__ = ["MIN_UID", "Account", "AccountRules", "resolve_account"]

MIN_UID: Final = 1000
"""Below it are accounts of the system, on nearly all of them."""
_NOBODY: Final = 65_534
"""Whoever is not known in a user namespace, or over NFS, is this: it is nobody's own."""


@dataclass(frozen=True, order=True)
class Account:
    """One account of this host.

    Attributes:
        name: as the system calls it; its number where it has no name.
        groups: of an account that is given by numbers alone; else the system is asked at each start of a mover.
    """

    uid: int
    gid: int
    name: str
    known: bool = True

    def groups(self) -> list[int]:
        """All groups that it is in now."""
        return os.getgrouplist(self.name, self.gid) if self.known else [self.gid]


@dataclass(frozen=True)
class AccountRules:
    """The table `[accounts]` of site.toml.

    Attributes:
        mapped: account by `TENANT/USER`, `USER` or `TENANT/*`.
        default: what becomes of those who are not mapped.
        own: the agent's own account, where it is started as root.
        state: folder in which each account keeps its caches, in a folder of its own.
        umask: of what is made without a mode of the source's.
        idle_s: how long a mover stays with nothing to do.
    """

    mapped: Mapping[str, Account]
    default: Literal["refuse", "agent"] = "refuse"
    own: Account | None = None
    state: str = "/var/lib/flowengine-accounts"
    umask: int = 0o027
    idle_s: float = 60.0
    min_uid: int = field(default=MIN_UID, compare=False)

    @property
    def accounts(self) -> list[Account]:
        """Every account that may be acted as."""
        return sorted(set(self.mapped.values()))

    def account(self, requester: str, tenant: str) -> Account | None:
        """The account for a requester; None for the agent's own.

        Raises:
            Denied: nobody may act for that requester here (reason "account-unmapped").
        """
        keys = (f"{tenant}/{requester}", requester, f"{tenant}/*") if requester else (f"{tenant}/*",)
        for key in keys:
            if (found := self.mapped.get(key)) is not None:
                return found
        if self.default == "agent":
            return None
        who = f"{requester!r} of tenant {tenant!r}" if tenant else repr(requester)
        raise Denied(
            f"no account of this site is mapped to the requester {who}",
            hint="the site's administrator maps one in [accounts.map] of site.toml",
            reason="account-unmapped",
        )


def resolve_account(value: object, min_uid: int = MIN_UID) -> Account:
    """The account that a name, a user id, or "UID:GID" means.

    Raises:
        ValueError: there is none, or nobody may be acted for by it; the text says why and what to do.
    """
    account = _found(value)
    if account.uid == 0:
        raise ValueError("is root, as whom nobody is ever acted for; map an account of the requester's own")
    if account.gid == 0:
        raise ValueError("has the group of root; give the account another")
    if account.uid == _NOBODY:
        raise ValueError("is the account of nobody in particular; map an account of the requester's own")
    if account.uid < min_uid:
        raise ValueError(
            f"has the user id {account.uid}, below min_uid {min_uid}: an account of the system; map another, or set "
            "min_uid lower in [accounts]"
        )
    return account


def _found(value: object) -> Account:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        try:
            found = pwd.getpwuid(value)
        except (KeyError, OverflowError):
            raise ValueError(
                f"{value} is no user id of this host; make the account, or write 'UID:GID' for one without a name"
            ) from None
        return Account(found.pw_uid, found.pw_gid, found.pw_name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} must be the name of an account, a user id, or 'UID:GID'")
    uid, colon, gid = value.partition(":")
    if colon and uid.isascii() and uid.isdigit() and gid.isascii() and gid.isdigit():
        if max(int(uid), int(gid)) >= 2**32 - 1:
            raise ValueError(f"{value!r} is above the largest user id")
        return Account(int(uid), int(gid), value, known=False)
    try:
        found = pwd.getpwnam(value)
    except KeyError:
        raise ValueError(
            f"{value!r} is no account of this host; make it (useradd), or mend the name"
        ) from None
    return Account(found.pw_uid, found.pw_gid, found.pw_name)
