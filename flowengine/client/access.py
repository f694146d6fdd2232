"""Where the coordinator is, who asks, and whom to trust: from arguments, the environment or the credentials file."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from flowengine.errors import AuthenticationError, LocalError, NotFound, UsageError

__all__ = ["Access", "Credentials", "config_dir", "find_access", "normal_url"]

_FILE: Final = "credentials.toml"
_MOST_BYTES: Final = 1 << 20
_HOST: Final = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%a-z]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """What a client needs to reach one coordinator.

    Attributes:
        url: its address, without a path.
        token: API token; empty: only what needs none can be asked.
        ca_pem: the federation's own CA. Empty: the public CAs of this machine.
        user: whose token it is, as far as known.
    """

    url: str
    token: str = field(default="", repr=False)
    ca_pem: str = field(default="", repr=False)
    user: str = ""


def config_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$FLOW_CONFIG_DIR, else flowengine below $XDG_CONFIG_HOME or ~/.config."""
    if given := environ.get("FLOW_CONFIG_DIR"):
        return Path(given)
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".config"
    )
    return Path(base) / "flowengine"


def normal_url(text: str) -> str:
    """An address as it is compared and stored: https, host, port, no slash at the end.

    >>> normal_url("coordinator.example.org:7440/")
    'https://coordinator.example.org:7440'
    """
    url = text.strip()
    url = url[:-1] if url.endswith("/") else url
    if "://" not in url:
        url = f"https://{url}"
    scheme, _, rest = url.partition("://")
    if scheme.lower() != "https" or _HOST.fullmatch(rest) is None:
        raise UsageError(
            f"{text!r} is not the address of a coordinator", hint="write it like https://HOST:PORT"
        )
    return f"https://{rest}"


class Credentials:
    """The credentials file: one entry per coordinator, the first is the default.

    The file holds API tokens: it is written with mode 0600 and refused when others can read it.
    """

    def __init__(self, path: Path, entries: list[Access]) -> None:
        self.path = path
        self.entries = entries

    @classmethod
    def load(cls, folder: Path | None = None) -> Credentials:
        """What is stored; nothing when there is no file.

        Raises:
            AuthenticationError: others may read it.
            LocalError: it cannot be read or is damaged.
        """
        path = (folder or config_dir()) / _FILE
        try:
            with open(path, "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise AuthenticationError(
                        f"others may read {path} (mode {mode:04o}), which holds API tokens",
                        hint=f"chmod 600 {path}; if others use this machine, make new tokens: flow login",
                    )
                rows = tomllib.loads(file.read(_MOST_BYTES).decode()).get("coordinator", [])
            entries = [
                Access(row["url"], row.get("token", ""), row.get("ca", ""), row.get("user", ""))
                for row in rows
            ]
        except FileNotFoundError:
            return cls(path, [])
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror}", hint="check who owns it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LocalError(
                f"{path} is damaged: {error}", hint="remove it and run flow login again"
            ) from None
        return cls(path, entries)

    def find(self, url: str | None) -> Access | None:
        """The entry of a coordinator; without `url` the default one."""
        return next((entry for entry in self.entries if url is None or entry.url == url), None)

    def put(self, entry: Access) -> None:
        """Add an entry, or replace that of the same coordinator; it becomes the default."""
        self.entries = [entry, *(other for other in self.entries if other.url != entry.url)]

    def remove(self, url: str) -> None:
        """Forget a coordinator."""
        self.entries = [entry for entry in self.entries if entry.url != url]

    def save(self) -> None:
        """Write the file in one step, readable by this account alone."""
        lines = [
            "# Written by flow login. Holds API tokens: keep it to yourself. The first entry is the default.\n"
        ]
        for entry in self.entries:
            fields = {"url": entry.url, "user": entry.user, "token": entry.token, "ca": entry.ca_pem}
            lines.append("\n[[coordinator]]\n")
            # JSON's strings without escaped slashes are TOML's basic strings.
            lines += [f"{name} = {json.dumps(value)}\n" for name, value in fields.items() if value]
        from flowengine.store.secret_files import make_secret_folder, write_secret

        make_secret_folder(os.fspath(self.path.parent))
        write_secret(os.fspath(self.path), "".join(lines).encode())


def find_access(
    url: str | None = None,
    token: str | None = None,
    ca_pem: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Access:
    """Arguments go before the environment (FLOW_COORDINATOR, FLOW_TOKEN, FLOW_TOKEN_FILE, FLOW_CA_FILE), which goes
    before the credentials file.

    A stored token is used only for the coordinator that it belongs to.

    Raises:
        AuthenticationError: no coordinator is known.
    """
    asked = url or environ.get("FLOW_COORDINATOR") or None
    asked = normal_url(asked) if asked else None
    given_token = token if token is not None else _environment_token(environ)
    given_ca = ca_pem
    if given_ca is None and (file := environ.get("FLOW_CA_FILE")):
        given_ca = _read(file, "FLOW_CA_FILE")
    stored = None
    if asked is None or given_token is None or given_ca is None:
        stored = Credentials.load(config_dir(environ)).find(asked)
    if asked is None and stored is None:
        raise AuthenticationError(
            "no coordinator is known here",
            hint="log in with flow login, or set FLOW_COORDINATOR and FLOW_TOKEN_FILE; flow demo starts one to try",
        )
    found = stored or Access(asked or "")
    return replace(
        found,
        token=found.token if given_token is None else given_token,
        ca_pem=found.ca_pem if given_ca is None else given_ca,
        user=found.user if given_token is None else "",
    )


def _environment_token(environ: Mapping[str, str]) -> str | None:
    if text := environ.get("FLOW_TOKEN"):
        return text.strip()
    if file := environ.get("FLOW_TOKEN_FILE"):
        return _read(file, "FLOW_TOKEN_FILE", secret=True).strip()
    return None


def _read(path: str, what: str, *, secret: bool = False) -> str:
    from flowengine.store.secret_files import read_secret

    try:
        if secret:
            return read_secret(path).decode()
        with open(path, encoding="utf-8") as file:
            return file.read(_MOST_BYTES)
    except (FileNotFoundError, NotFound):
        raise NotFound(f"{what} names {path}, which does not exist", hint="correct the variable") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"cannot read {path}, which {what} names: {error}") from None
