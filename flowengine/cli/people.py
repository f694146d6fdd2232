"""`flow user`, `flow token`, `flow tenant`: who may ask for what, and for how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowengine.cli.federation import json_option, note, open_client, plain, print_table, show_time
from flowengine.cli.groups import Group
from flowengine.cli.secret_output import check_new, give_out, output_option
from flowengine.errors import Exit, NotFound
from flowengine.units import format_bytes

if TYPE_CHECKING:
    from flowengine.api.people import Token
    from flowengine.client import Client

__all__ = ["tenant", "token", "user"]

_ROLES = ("admin", "operator", "user", "auditor")


@click.group(cls=Group)
def user() -> None:
    """Who may come in, and as what."""


@user.command("ls")
@json_option
def user_ls(as_json: bool) -> int:
    """List users."""
    with open_client() as client:
        users = client.users()
    rows = [(one.name, one.role, one.tenant, "disabled" if one.disabled else "active") for one in users]
    return _listed("users", users, ("USER", "ROLE", "TENANT", "STATE"), rows, as_json)


@user.command("add")
@click.argument("name")
@click.option(
    "--role", type=click.Choice(_ROLES), default="user", show_default=True, help="What the user may do."
)
@click.option(
    "--tenant",
    default="default",
    show_default=True,
    metavar="TENANT",
    help="The party whose share the user's transfers use.",
)
@click.option(
    "--valid",
    default="90d",
    show_default=True,
    metavar="DURATION",
    help="How long the first login string is good for.",
)
@output_option("login string")
def user_add(name: str, role: Any, tenant: str, valid: str, output: Path | None) -> int:
    """Enter user NAME and print a login string: the user gives it to `flow login`."""
    from flowengine.api.people import UserRequest

    check_new(output)
    with open_client() as client:
        client.add_user(UserRequest(name=name, role=role, tenant=tenant))
        give_out(_login_string(client, _new_token(client, name, valid, "first login")), output)
    how = "runs flow login and pastes this line" if output is None else f"runs flow login {output.name}"
    note(f"{name} {how}; it is good for {valid}")
    return Exit.DONE


@user.command("set")
@click.argument("name")
@click.option("--role", type=click.Choice(_ROLES), default=None, help="What the user may do.")
@click.option(
    "--tenant", default=None, metavar="TENANT", help="The party whose share the user's transfers use."
)
@click.option("--disable/--enable", "disabled", default=None, help="Whether the user may come in.")
def user_set(name: str, role: Any, tenant: str | None, disabled: bool | None) -> int:
    """Change what is given; the rest stays."""
    from flowengine.api.people import UserRequest

    with open_client() as client:
        found = next((one for one in client.users() if one.name == name), None)
        if found is None:
            raise NotFound(f"there is no user {name}", hint="flow user ls lists them")
        request = UserRequest(
            role=role or found.role,
            tenant=tenant or found.tenant,
            disabled=found.disabled if disabled is None else disabled,
        )
        changed = client.change_user(name, request)
    note(f"{changed.name}: {changed.role}, tenant {changed.tenant}{', disabled' if changed.disabled else ''}")
    return Exit.DONE


@click.group(cls=Group)
def token() -> None:
    """API tokens: for scripts, and for more machines."""


@token.command("ls")
@json_option
def token_ls(as_json: bool) -> int:
    """List tokens; what they consist of is stored nowhere."""
    with open_client() as client:
        tokens = client.tokens()
    rows = [
        (one.id, one.user, show_time(one.expires), show_time(one.last_used), one.comment or "-")
        for one in tokens
    ]
    return _listed("tokens", tokens, ("TOKEN", "USER", "EXPIRES", "LAST USED", "COMMENT"), rows, as_json)


@token.command("add")
@click.option("--user", "name", default=None, metavar="USER", help="For whom. [default: you]")
@click.option(
    "--valid", default="90d", show_default=True, metavar="DURATION", help="How long it is good for."
)
@click.option("--comment", default="", metavar="TEXT", help="What it is for.")
@click.option(
    "--login",
    "as_login",
    is_flag=True,
    help="Make it a login string, which also holds address and fingerprint.",
)
@output_option("token")
def token_add(name: str | None, valid: str, comment: str, as_login: bool, output: Path | None) -> int:
    """Make a token and print it; it cannot be shown again."""
    check_new(output)
    with open_client() as client:
        made = _new_token(client, name, valid, comment)
        give_out(_login_string(client, made) if as_login else made.secret, output)
    note(f"token {made.id} of {made.user}, good until {show_time(made.expires)}")
    return Exit.DONE


@token.command("rm")
@click.argument("token_id", metavar="ID")
def token_rm(token_id: str) -> int:
    """Make a token worthless at once."""
    with open_client() as client:
        client.remove_token(token_id)
    note(f"token {token_id} is worthless")
    return Exit.DONE


def _new_token(client: Client, name: str | None, valid: str, comment: str) -> Token:
    from flowengine.api.people import TokenRequest
    from flowengine.units import parse_duration_s

    return client.add_token(TokenRequest(user=name, valid_s=round(parse_duration_s(valid)), comment=comment))


def _login_string(client: Client, made: Token) -> str:
    """Address, the CA's fingerprint as this client knows it, and the token."""
    import ssl
    from hashlib import sha256

    from flowengine.client.access import find_access
    from flowengine.trust.tokens import Login, UserToken

    ca_pem = find_access().ca_pem
    if not ca_pem:
        raise NotFound(
            "the CA of this coordinator is not known here",
            hint="set FLOW_CA_FILE, or give out the plain token",
        )
    fingerprint = sha256(ssl.PEM_cert_to_DER_cert(ca_pem.strip() + "\n")).digest()
    return Login(client.url, fingerprint, UserToken.parse(made.secret)).format_secret()


@click.group(cls=Group)
def tenant() -> None:
    """Parties with a share of the federation: weights, bounds, what they use."""


@tenant.command("ls")
@json_option
def tenant_ls(as_json: bool) -> int:
    """List tenants and what they use now."""
    with open_client() as client:
        tenants = client.tenants()
    rows = [
        (
            one.name,
            f"{one.weight:g}",
            f"{one.running} of {one.max_running or 'any'}",
            f"{one.queued} of {one.max_queued or 'any'}",
            f"{format_bytes(one.bytes_today)} of {'any' if one.max_bytes_per_day is None else format_bytes(one.max_bytes_per_day)}",
        )
        for one in tenants
    ]
    return _listed("tenants", tenants, ("TENANT", "WEIGHT", "RUNNING", "QUEUED", "TODAY"), rows, as_json)


@tenant.command("set")
@click.argument("name")
@click.option(
    "--weight",
    type=click.FloatRange(0, 1000, min_open=True),
    default=None,
    help="Share in the queue, beside the others' weights.",
)
@click.option("--max-running", type=click.IntRange(1), default=None, help="Tasks at a time.")
@click.option("--max-queued", type=click.IntRange(1), default=None, help="Transfers that wait.")
@click.option("--max-per-day", default=None, metavar="SIZE", help="Bytes a day.")
@json_option
def tenant_set(
    name: str,
    weight: float | None,
    max_running: int | None,
    max_queued: int | None,
    max_per_day: str | None,
    as_json: bool,
) -> int:
    """Change a tenant's share and bounds; a new one is entered. What is not given stays."""
    from flowengine.api.people import TenantRequest
    from flowengine.cli.output import print_json
    from flowengine.units import parse_bytes

    per_day = None if max_per_day is None else parse_bytes(max_per_day)
    with open_client() as client:
        found = next((one for one in client.tenants() if one.name == name), None)
        request = TenantRequest(
            weight=weight or (found.weight if found else 1.0),
            max_running=max_running or (found.max_running if found else None),
            max_queued=max_queued or (found.max_queued if found else None),
            max_bytes_per_day=found.max_bytes_per_day if per_day is None and found else per_day,
        )
        if found is None:
            request.name = name
            made = client.add_tenant(request)
        else:
            made = client.change_tenant(name, request)
    if as_json:
        print_json(plain(made))
    else:
        note(f"tenant {made.name}: weight {made.weight:g}")
    return Exit.DONE


def _listed(
    key: str, items: object, heads: tuple[str, ...], rows: Sequence[Sequence[str]], as_json: bool
) -> int:
    from flowengine.cli.output import print_json

    if as_json:
        print_json({key: plain(items)})
    else:
        print_table(heads, rows)
    return Exit.DONE
