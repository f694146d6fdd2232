"""site.toml as typed values: what a site is called, whom it obeys, what it offers.

Everything that is wrong with a file is told at once, by file and key, with what was probably meant.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from flowengine.errors import NotFound, UsageError
from flowengine.units import parse_bytes, parse_duration_s, parse_rate_bits_per_s
from flowengine_agent.accounts import MIN_UID, Account, AccountRules, resolve_account

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["Access", "OfferedFolder", "SiteConfig", "load_config", "split_address"]

Access: TypeAlias = Literal["read", "write", "read-write"]

MAX_ROOTS: Final = 64
MAX_TASKS: Final = 1000
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_EXAMPLE: Final = "agents/deploy/site.example.toml shows every key"


@dataclass(frozen=True)
class OfferedFolder:
    """A folder that the site offers.

    Attributes:
        path: where it lies here; absolute.
        name: what it is called in paths of transfers, as "/data".
        access: what may be done below it.
        budget_bytes: how much flowengine may fill it with; None: as much as the disk holds.
    """

    path: str
    name: str
    access: Access = "read"
    budget_bytes: int | None = None


@dataclass(frozen=True)
class SiteConfig:
    """What the agent is told at its start.

    Attributes:
        site: the site's name.
        coordinators: addresses of the coordinator ("https://host:port"); empty: the one that enrolled it.
        state: folder for key, certificate, journal and caches.
        listen: host and port of the data port; None: this site only dials out.
        advertise: addresses by which other sites reach the data port.
        max_tasks: tasks that are driven at once.
        roots: what is offered.
        site_limit_bits_per_s: what may leave the site; None: no limit.
        drain_s: how long a stop may take.
        threads: threads that read one large object; 0 chooses.
        join_token_file: where the one-time token lies until the site has enrolled.
        allow_root: whether it may run as root.
        log: "json" for machines, "console" for people.
        relay_enabled: whether other sites' sealed streams may pass through this one.
        relay_max_streams: how many at once.
        relay_max_bits_per_s: how much of them together; None: no limit.
        policy_keys: keys whose signatures count on policy bundles, by role; without them no bundle is taken.
        policy_required: whether nothing moves without a bundle.
        policy_purge_after_s: how long what policy stopped stays in quarantine before it is destroyed.
        accounts: by which accounts of this host it acts for whom; None: by its own for everybody.
        policy_max_offline_s: how long transfers go on without a word from the coordinator; None: as the bundle says.
    """

    site: str
    state: str
    roots: tuple[OfferedFolder, ...]
    coordinators: tuple[str, ...] = ()
    listen: tuple[str, int] | None = None
    advertise: tuple[str, ...] = ()
    max_tasks: int = 4
    site_limit_bits_per_s: int | None = None
    drain_s: float = 20.0
    threads: int = 0
    join_token_file: str = ""
    allow_root: bool = False
    log: Literal["json", "console"] = "console"
    relay_enabled: bool = False
    relay_max_streams: int = 256
    relay_max_bits_per_s: int | None = None
    policy_keys: Mapping[str, tuple[Ed25519PublicKey, ...]] = field(default_factory=dict, compare=False)
    policy_required: bool = False
    policy_max_offline_s: float | None = None
    policy_purge_after_s: float = 3600.0
    accounts: AccountRules | None = None
    source: str = field(default="", compare=False)


class _Wrong(Exception):
    """One value is not what it should be; the text continues the key's name."""


_Check: TypeAlias = Callable[[Any], Any]


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port"; IPv6 addresses stand in brackets.

    Raises:
        ValueError: it is not of that form.

    >>> split_address("[::1]:7443"), split_address("data.example.org:7443")
    (('::1', 7443), ('data.example.org', 7443))
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isdigit() or int(port) > 65535 or (":" in bare) != host.startswith("["):
        raise ValueError(text)
    return bare, int(port)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Wrong("must be text")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _Wrong(
            f"{value!r} is no site name: small letters, digits and hyphens, as in a host name (it would be "
            f"{_as_name(str(value))!r})"
        )
    return value


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63] or "site-1"


def _folder(value: Any) -> str:
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        raise _Wrong(f"{value!r} is no absolute path")
    return os.path.normpath(value)


def _root_name(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise _Wrong(f"{value!r} must begin with a slash, as in '/data'")
    parts = value.strip("/").split("/") if value != "/" else []
    if any(part in ("", ".", "..") for part in parts) or "\0" in value:
        raise _Wrong(f"{value!r} must consist of plain names between slashes")
    return "/" + "/".join(parts)


def _access(value: Any) -> str:
    if value not in ("read", "write", "read-write"):
        raise _Wrong(f"{value!r} is none of 'read', 'write', 'read-write'")
    return str(value)


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        return parse_bytes(value)
    raise _Wrong(f"{value!r} is no size; write it like '2TB'")


def _rate(value: Any) -> int:
    if not isinstance(value, str):
        raise _Wrong(f"{value!r} is no rate; write it like '10Gbit/s'")
    return round(parse_rate_bits_per_s(value))


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    if isinstance(value, str):
        return parse_duration_s(value)
    raise _Wrong(f"{value!r} is no duration; write it like '20s'")


def _number(least: int, most: int) -> _Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _Wrong(f"{value!r} must be a whole number from {least} to {most}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"{value!r} must be true or false")
    return value


def _coordinators(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise _Wrong(f"{value!r} must be an address like 'https://host:7400', or a list of them")
    for item in items:
        rest = item.removeprefix("https://") if isinstance(item, str) else ""
        if not rest or rest == item or "/" in rest.rstrip("/"):
            raise _Wrong(f"{item!r} must be an address like 'https://host:7400'")
    return tuple(item.rstrip("/") for item in items)


def _listen(value: Any) -> tuple[str, int] | None:
    if value == "":
        return None
    try:
        return split_address(_text(value))
    except ValueError:
        raise _Wrong(f"{value!r} is not HOST:PORT, as in '0.0.0.0:7443'; '' only dials out") from None


def _advertise(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise _Wrong("must be a list of HOST:PORT")
    for item in items:
        try:
            split_address(_text(item))
        except ValueError:
            raise _Wrong(f"{item!r} is not HOST:PORT") from None
    return tuple(items)


def _role_keys(value: Any) -> tuple[Ed25519PublicKey, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise _Wrong("must be a list of keys: 64 hexadecimal digits, or the file of a public key")
    return tuple(_role_key(item) for item in items)


def _role_key(item: object) -> Ed25519PublicKey:
    from flowengine.policy.bundle import read_public_key

    if isinstance(item, str) and re.fullmatch(r"[0-9a-f]{64}", item):
        return read_public_key(item.encode())
    if not isinstance(item, str) or not os.path.isabs(item):
        raise _Wrong(f"{item!r} is neither 64 hexadecimal digits nor the absolute path of a public key")
    try:
        with open(item, "rb") as file:
            return read_public_key(file.read(65536))
    except OSError as error:
        raise _Wrong(f"{item!r} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise _Wrong(f"{item!r}: {error.message}; {error.hint}") from None


def _log(value: Any) -> str:
    if value not in ("json", "console"):
        raise _Wrong(f"{value!r} is neither 'json' nor 'console'")
    return str(value)


_SITE: Final[dict[str, _Check]] = {
    "site": _name,
    "coordinator": _coordinators,
    "state": _folder,
    "listen": _listen,
    "advertise": _advertise,
    "max_tasks": _number(1, MAX_TASKS),
    "drain": _seconds,
    "threads": _number(0, 256),
    "join_token_file": _folder,
    "allow_root": _flag,
    "log": _log,
}
_ROOT: Final[dict[str, _Check]] = {"path": _folder, "name": _root_name, "access": _access, "budget": _size}
_LIMITS: Final[dict[str, _Check]] = {"site": _rate}
_RELAY: Final[dict[str, _Check]] = {"enabled": _flag, "max_streams": _number(1, 4096), "max_rate": _rate}
_POLICY: Final[dict[str, _Check]] = {
    "required": _flag,
    "max_offline": _seconds,
    "purge_after": _seconds,
    "policy_owner": _role_keys,
    "security": _role_keys,
}


def _default(value: Any) -> str:
    if value not in ("refuse", "agent"):
        raise _Wrong(f"{value!r} is neither 'refuse' nor 'agent'")
    return str(value)


def _umask(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise _Wrong(f"{value!r} is no umask; write it like '0027'")
    return int(value, 8)


_ACCOUNTS: Final[dict[str, _Check]] = {
    "default": _default,
    "account": lambda value: value,
    "min_uid": _number(1, 2**31),
    "state": _folder,
    "umask": _umask,
    "idle": _seconds,
}


class _Reader:
    """Takes tables apart and gathers what is wrong with them."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.problems: list[str] = []

    def wrong(self, key: str, text: str) -> None:
        self.problems.append(f"{self._file}: {key} {text}")

    def table(
        self, data: object, where: str, checks: Mapping[str, _Check], *, also: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.wrong(where or "the file", "must be a table")
            return {}
        prefix = f"{where}." if where else ""
        found: dict[str, Any] = {}
        for key, value in data.items():
            if key in also:
                continue
            if key not in checks:
                close = difflib.get_close_matches(key, [*checks, *also], n=1)
                self.wrong(
                    prefix + key,
                    f"is no key here; did you mean {close[0]!r}?"
                    if close
                    else f"is no key here; known are {', '.join([*checks, *also])}",
                )
                continue
            try:
                found[key] = checks[key](value)
            except _Wrong as error:
                self.wrong(prefix + key, str(error))
            except UsageError as error:
                self.wrong(prefix + key, f"{error.message}; {error.hint}")
        return found

    def roots(self, data: object, *, needed: bool) -> tuple[OfferedFolder, ...]:
        if data is None and not needed:
            return ()
        if not isinstance(data, list) or not data:
            self.wrong("root", "is missing: offer at least one folder by [[root]] with path and name")
            return ()
        if len(data) > MAX_ROOTS:
            self.wrong("root", f"has {len(data)} entries; {MAX_ROOTS} are the most")
        roots: list[OfferedFolder] = []
        for number, item in enumerate(data, 1):
            where = f"root {number}"
            found = self.table(item, where, _ROOT)
            if isinstance(item, dict) and "path" not in item:
                self.wrong(f"{where}.path", "is missing: the folder that is offered")
            if "path" in found:
                name = found.get("name", found["path"])
                if name in [root.name for root in roots]:
                    self.wrong(f"{where}.name", f"{name!r} is taken by another root")
                roots.append(
                    OfferedFolder(found["path"], name, found.get("access", "read"), found.get("budget"))
                )
        return tuple(roots)

    def accounts(self, data: object, text: str) -> AccountRules | None:
        """The table `[accounts]`; what is wrong in it is told with its line."""
        if data is None:
            return None
        found = self.table(data, "accounts", _ACCOUNTS, also=("map",))
        mapped: dict[str, Account] = {}
        own: Account | None = None
        least = found.get("min_uid", MIN_UID)
        table = data.get("map", {}) if isinstance(data, dict) else {}
        if not isinstance(table, dict) or not (table or found.get("default") == "agent"):
            self.wrong("accounts.map", "must be a table of requester = account, with one at least")
            table = {}
        for key, value in table.items():
            shown = f"(line {_line_of(text, key)}) accounts.map.{key!r}"
            if key == "*" or key.startswith("*/") or "*" in key.removesuffix("/*"):
                self.wrong(
                    shown,
                    "is no requester: write 'USER', 'TENANT/USER', or 'TENANT/*'; for all others set default",
                )
                continue
            try:
                mapped[key] = resolve_account(value, least)
            except ValueError as error:
                self.wrong(shown, str(error))
        if "account" in found:
            try:
                own = resolve_account(found["account"], 1)
            except ValueError as error:
                self.wrong(f"(line {_line_of(text, 'account')}) accounts.account", str(error))
        return AccountRules(
            mapped,
            default=found.get("default", "refuse"),
            own=own,
            state=found.get("state", AccountRules.state),
            umask=found.get("umask", AccountRules.umask),
            idle_s=found.get("idle", AccountRules.idle_s),
            min_uid=least,
        )


def _line_of(text: str, key: str) -> int:
    """The line on which a key stands, for messages; the parser does not tell."""
    wanted = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    lines = text.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.strip().startswith("[accounts")), 0)
    return next(
        (number for number, line in enumerate(lines[begin:], begin + 1) if wanted.match(line)), begin + 1
    )


def load_config(path: str, *, overrides: Mapping[str, object] | None = None) -> SiteConfig:
    """The configuration in a file.

    Args:
        overrides: top-level keys that take the place of the file's.

    Raises:
        NotFound: there is no such file.
        UsageError: it holds something that cannot be meant; the message lists all of it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise NotFound(f"there is no configuration {path}", hint=_EXAMPLE) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}", hint=_EXAMPLE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="check its owner and permissions") from None
    return _parse(path, data | dict(overrides or {}), text)


def _check_folders(
    reader: _Reader, state: str | None, roots: Sequence[OfferedFolder], accounts: AccountRules | None
) -> None:
    """Folders with secrets lie outside of what is offered, and of each other."""
    for root in roots:
        if state is not None and _lies_in(state, root.path):
            reader.wrong(
                "state", f"{state!r} lies in the offered folder {root.path!r}: its key could be read"
            )
    if accounts is None:
        return
    for root in roots:
        if _lies_in(accounts.state, root.path):
            reader.wrong("accounts.state", f"{accounts.state!r} lies in the offered folder {root.path!r}")
    if state is not None and _lies_in(accounts.state, state):
        reader.wrong("accounts.state", "lies in the agent's own state folder, which no account may look into")


def _lies_in(path: str, folder: str) -> bool:
    return (path + "/").startswith(folder.rstrip("/") + "/")


def _parse(path: str, data: dict[str, Any], text: str) -> SiteConfig:
    reader = _Reader(path)
    top = reader.table(data, "", _SITE, also=("root", "limits", "relay", "policy", "accounts"))
    limits = reader.table(data.get("limits", {}), "limits", _LIMITS)
    relay = reader.table(data.get("relay", {}), "relay", _RELAY)
    policy = reader.table(data.get("policy", {}), "policy", _POLICY)
    accounts = reader.accounts(data.get("accounts"), text)
    # A site that relays may do that alone.
    roots = reader.roots(data.get("root"), needed=not relay.get("enabled"))
    for key, what in (("site", "the site's name"), ("state", "the folder for key, journal and caches")):
        if key not in data:
            reader.wrong(key, f"is missing: {what}")
    _check_folders(reader, top.get("state"), roots, accounts)
    keys = {
        role: policy[name]
        for name, role in (("policy_owner", "policy-owner"), ("security", "security"))
        if name in policy
    }
    if len(keys) == 1:
        reader.wrong("policy", "needs both policy_owner and security: two roles sign a bundle")
    if "listen" in data and top.get("listen") is None and data.get("advertise"):
        reader.wrong("advertise", "makes no sense without listen: nothing answers there")
    if relay.get("enabled") and top.get("listen") is None:
        reader.wrong("relay.enabled", "needs listen: a relay is dialled by its neighbours")
    if reader.problems:
        count = len(reader.problems)
        raise UsageError(
            "\n  ".join(
                [f"the configuration holds {count} problem{'s' if count > 1 else ''}:", *reader.problems]
            ),
            hint=_EXAMPLE,
            problems=reader.problems,
        )
    return SiteConfig(
        site=top["site"],
        state=top["state"],
        roots=roots,
        coordinators=top.get("coordinator", ()),
        listen=top.get("listen"),
        advertise=top.get("advertise", ()),
        max_tasks=top.get("max_tasks", 4),
        site_limit_bits_per_s=limits.get("site"),
        drain_s=top.get("drain", 20.0),
        threads=top.get("threads", 0),
        join_token_file=top.get("join_token_file", ""),
        allow_root=top.get("allow_root", False),
        log=top.get("log", "console"),
        relay_enabled=relay.get("enabled", False),
        relay_max_streams=relay.get("max_streams", 256),
        relay_max_bits_per_s=relay.get("max_rate"),
        policy_keys=keys,
        policy_required=policy.get("required", False),
        policy_max_offline_s=policy.get("max_offline"),
        policy_purge_after_s=policy.get("purge_after", 3600.0),
        accounts=accounts,
        source=path,
    )
