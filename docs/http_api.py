"""Makes docs/reference/http-api.md from the coordinator's table of routes: `python docs/http_api.py > docs/reference/http-api.md`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from flowengine.api.problems import STATUSES, TITLES
from flowengine.coordinator.routes import ROUTES
from flowengine.coordinator.routes.route import Route, statuses

HEAD = """\
# HTTP interface

<!-- Made by docs/http_api.py from the table of routes; do not edit. -->

The coordinator answers HTTP/1.1 over TLS 1.3 below `/v1`. `GET /v1/openapi.json` is the same as an OpenAPI 3.1 document, with
every schema. Bodies are JSON (`Content-Type: application/json`, at most 1 MiB, for a bundle 16 MiB before base64) and decoded strictly: an unknown field is
refused. Answers may gain fields.

**Who.** Users send `Authorization: Bearer flowt_…`; agents show their TLS client certificate. Roles: *admin* may do all;
*operator* looks after sites, links, limits and all transfers; *user* asks for and sees transfers of the own tenant; *auditor*
sees everything and changes nothing.

**Pages.** Listings take `limit` and `after` and answer `{"items": [...], "next": "..."}`: `next` is the `after` of the next page,
empty on the last. A page with a `next` holds at least one item, and `next` differs from the `after` that was asked with: a client
refuses anything else, for it would ask for ever.

**Once.** What creates something takes `Idempotency-Key` (1 to 200 visible ASCII characters). For 24 hours the same key with the
same body is answered the same; with another body it is a `conflict`. Answers with secrets are kept sealed.

**Errors** are `application/problem+json` (RFC 9457): `title`, `status`, `reason` (stable), `detail` (what, where, why), `hint`
(what next), `retryable`, `context`. A status of 500 is a bug; none is documented.

**Streams.** `GET /v1/agent/events` is a stream of server-sent events, and so is `GET /v1/events` with
`Accept: text/event-stream`: `id` is the event's `seq`, `Last-Event-ID` goes on behind it, a comment comes at least every 15 s.
[Events](events.md) lists the types.
"""


def _who(route: Route) -> str:
    if isinstance(route.who, str):
        return {"any": "anybody", "agent": "agents"}[route.who]
    return ", ".join(role for role in ("admin", "operator", "user", "auditor") if role in route.who)


def _name(kind: object) -> str:
    return (
        ""
        if kind is None
        else "text"
        if kind is str
        else "JSON"
        if kind is dict
        else getattr(kind, "__name__", "")
    )


def _route(route: Route) -> Iterator[str]:
    yield f"### {route.method} {route.path}"
    yield ""
    yield f"{route.summary}. For {_who(route)}."
    answer = f"Page of {_name(route.items)}" if route.items else _name(route.response)
    parts = [f"answers {route.status}" + (f" `{answer}`" if answer else "")]
    if route.request is not None:
        parts.insert(0, f"takes `{_name(route.request)}`")
    yield ""
    text = "; ".join(parts)
    yield text[0].upper() + text[1:] + (". Takes `Idempotency-Key`." if route.creates else ".")
    fields = msgspec.structs.fields(route.query)
    if fields:
        yield ""
        yield "| parameter | default | meaning |"
        yield "| --- | --- | --- |"
        for field in fields:
            (schema,), _ = msgspec.json.schema_components([field.type])
            default = "required" if field.required else "–" if field.default in (None, "") else field.default
            yield f"| `{field.encode_name}` | {default} | {schema.get('description', _described(schema))} |"
    found = [f"{status} `{'`, `'.join(reasons)}`" for status, reasons in statuses(route).items()]
    yield ""
    yield "Errors: " + "; ".join(found) + "."
    yield ""


def _described(schema: dict[str, object]) -> str:
    parts = schema.get("anyOf", [])
    assert isinstance(parts, list)
    return next((part["description"] for part in parts if "description" in part), "")


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Reasons", "", "| reason | status | meaning of the status |", "| --- | --- | --- |"]
    lines += [
        f"| `{reason}` | {status} | {TITLES[status]} |"
        for reason, status in STATUSES.items()
        if status != 500
    ]
    for title, prefix in (("Users", ""), ("Agents", "/v1/agent/")):
        lines += ["", f"## {title}", ""]
        for route in ROUTES:
            if route.path.startswith("/v1/agent/") == bool(prefix):
                lines += _route(route)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
