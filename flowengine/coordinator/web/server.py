"""The HTTP server: finds the route, checks who asks, decodes strictly, answers; every error as a problem.

aiohttp's low-level server is used and not its application: routing is the table's, and so even what is no HTTP at all
is answered as the table says.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import unquote

import msgspec
from aiohttp import web
from aiohttp.web_exceptions import HTTPRequestEntityTooLarge
from aiohttp.web_protocol import RequestHandler

from flowengine.api.schema import in_words
from flowengine.coordinator.routes import ROUTES
from flowengine.coordinator.routes.queries import PATH_TYPES
from flowengine.coordinator.routes.route import MAX_BODY_BYTES, Route
from flowengine.coordinator.web.calls import AgentWho, Call, UserWho, log, problem
from flowengine.errors import AuthenticationError, Denied, FlowError, NotFound, TemporaryError, UsageError

__all__ = ["MAX_BODY_BYTES", "Authenticate", "Handler", "HttpServer"]

_LARGE_S: Final = 300.0
"""How long a large body may take to come: others wait for it."""
_KEY: Final = re.compile(r"[!-~]{1,200}")
Handler = Callable[[Call], Awaitable[object]]


class Authenticate(Protocol):
    """Who asks; raises AuthenticationError."""

    async def __call__(self, request: web.BaseRequest, route: Route) -> UserWho | AgentWho | None:
        """Who asks."""


class _Connection(RequestHandler):
    """One client's connection; tells parser errors as problems too."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            log.error("request failed", exc_info=exc)
            answer = problem(_failed())
        else:
            answer = problem(UsageError("this is no HTTP request that can be understood", reason="usage"))
        answer.force_close()
        return answer


def _failed() -> FlowError:
    return FlowError(
        "the coordinator failed at this request; what happened is in its log", hint="tell its operator"
    )


class HttpServer(web.Server):
    """The server of the table.

    Args:
        handlers: by route name; each route has one.
        authenticate: who asks.
    """

    def __init__(self, handlers: Mapping[str, Handler], authenticate: Authenticate, **options: Any) -> None:
        super().__init__(self._serve, request_factory=self._request, access_log=None, **options)
        missing = {route.name for route in ROUTES} ^ set(handlers)
        assert not missing, f"routes and handlers differ: {missing}"
        self._handlers = handlers
        self._authenticate = authenticate
        self._tree = _tree()
        self._large = asyncio.Semaphore(1)
        self._queries = {route.name: msgspec.structs.fields(route.query) for route in ROUTES}
        self._bodies: dict[str, msgspec.json.Decoder[Any]] = {
            route.name: msgspec.json.Decoder(route.request) for route in ROUTES if route.request is not None
        }

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=MAX_BODY_BYTES
        )

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            answer = await self._answer(request)
        except FlowError as error:
            answer = problem(error, request.rel_url.raw_path)
            if error.reason == "wrong-method":
                answer.headers["Allow"] = str(error.context.get("allow", ""))
        except Exception:
            log.exception("%s %s failed", request.method, request.rel_url.raw_path)
            answer = problem(_failed(), request.rel_url.raw_path)
        return answer

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        route, path = self._find(request.method, request.rel_url.raw_path)
        who = await self._authenticate(request, route)
        if isinstance(route.who, frozenset):
            if not isinstance(who, UserWho):
                raise AuthenticationError("this needs an API token", hint="flow login")
            if who.role not in route.who:
                raise Denied(
                    f"the role {who.role} may not do this",
                    hint="it is for " + ", ".join(sorted(route.who)) + "; an admin gives roles",
                )
        elif route.who == "agent" and not isinstance(who, AgentWho):
            raise AuthenticationError(
                "this needs a site's client certificate", hint="join first: POST /v1/agent/join"
            )
        for name, value in path.items():
            _check_path(name, value)
        again = partial(self._authenticate, request, route)
        call = Call(route, request, path, self._query(route, request), who=who, again=again)
        if route.creates:
            call.key = _idempotency_key(request)
        if route.max_body_bytes <= MAX_BODY_BYTES:
            return await self._handle(call)
        async with self._large:  # so that what is in memory at once is bounded
            return await self._handle(call)

    async def _handle(self, call: Call) -> web.StreamResponse:
        route = call.route
        if route.request is not None:
            call.raw = await _read_body(call.request, route.max_body_bytes)
            call.body = self._body(route, call.raw)
        result = await self._handlers[route.name](call)
        if isinstance(result, web.StreamResponse):
            return result
        return _response(route, result)

    def _find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
        node: dict[str, Any] = self._tree
        values = []
        for part in raw_path.split("/")[1:]:
            if part in node:
                node = node[part]
            elif "{}" in node and part:
                node = node["{}"]
                values.append(unquote(part, errors="surrogateescape"))
            else:
                raise NotFound(f"there is nothing at {raw_path[:200]}", hint="GET /v1/openapi.json lists all")
        methods: dict[str, Route] = node.get("", {})
        if not methods:
            raise NotFound(f"there is nothing at {raw_path[:200]}", hint="GET /v1/openapi.json lists all")
        route = methods.get(method)
        if route is None:
            allow = ", ".join(sorted(methods))
            raise UsageError(
                f"{method[:20]} cannot be used here", hint=f"use {allow}", reason="wrong-method", allow=allow
            )
        return route, dict(zip(route.parameters, values, strict=True))

    def _query(self, route: Route, request: web.BaseRequest) -> Any:
        values: dict[str, str] = {}
        for name, value in request.query.items():
            if name in values:
                raise UsageError(f"the parameter {name[:60]!r} is given twice", hint="give it once")
            values[name] = value
        try:
            return msgspec.convert(values, route.query, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(field.encode_name for field in self._queries[route.name]) or "none"
            raise UsageError(
                f"parameters: {in_words(error)}", hint=f"this takes the parameters {known}"
            ) from None

    def _body(self, route: Route, raw: bytes) -> Any:
        try:
            return self._bodies[route.name].decode(raw)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"the body is not as it must be: {in_words(error)}", hint="GET /v1/openapi.json describes it"
            ) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise UsageError(f"the body is no JSON: {error}", hint="send UTF-8 JSON") from None


def _tree() -> dict[str, Any]:
    """Path components → next node; under "" the routes by method."""
    root: dict[str, Any] = {}
    for route in ROUTES:
        node = root
        for part in route.path.split("/")[1:]:
            node = node.setdefault("{}" if part.startswith("{") else part, {})
        node.setdefault("", {})[route.method] = route
    return root


_NAMES: Final = "names have lower-case letters, digits and dashes, 63 at most"
_WRITTEN: Final = {
    **dict.fromkeys(("site", "source", "target", "user", "tenant"), _NAMES),
    "transfer": "it begins with t-: flow transfer ls lists them",
    "plan": "it begins with p-: flow plan show prints it",
    "token": "it has eight hexadecimal digits: flow token ls lists them",
    "handle": "it begins with ap-: flow approval ls lists them",
    "maintenance": "it begins with m-: flow maintain ls lists them",
}
"""What to do about a name in a path that is none, by the kind of name."""


def _check_path(name: str, value: str) -> None:
    try:
        msgspec.convert(value, PATH_TYPES[name])
    except msgspec.ValidationError:
        hint = _WRITTEN.get(name, "look at how it is written; GET /v1/openapi.json has the pattern")
        raise UsageError(f"{value[:100]!r} is not how a {name} is written", hint=hint) from None


def _idempotency_key(request: web.BaseRequest) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if key and _KEY.fullmatch(key) is None:
        raise UsageError(
            "the Idempotency-Key is not 1 to 200 visible ASCII characters", hint="use a random UUID"
        )
    return key


async def _read_body(request: web.BaseRequest, most: int) -> bytes:
    if request.content_type != "application/json":
        raise UsageError(
            f"the body is {request.content_type[:60]!r}, not application/json",
            hint="set Content-Type: application/json",
            reason="wrong-media-type",
        )
    too_large = UsageError(
        f"the body is larger than {most} bytes", hint="send less at once", reason="too-large"
    )
    if request.content_length is not None and request.content_length > most:
        raise too_large
    try:
        if most == MAX_BODY_BYTES:
            return await request.read()
        found = bytearray()
        async with asyncio.timeout(_LARGE_S):
            async for part in request.content.iter_any():
                found += part
                if len(found) > most:
                    raise too_large
        return bytes(found)
    except HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise TemporaryError(
            f"the body did not come within {_LARGE_S:.0f} s",
            hint="send it over a faster link",
            reason="timeout",
        ) from None
    except (web.RequestPayloadError, ValueError) as error:
        raise UsageError(f"the body cannot be read: {error}") from None
    except ConnectionError:
        raise TemporaryError("the client left in the middle of its request") from None  # nobody hears it


def _response(route: Route, result: object) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    if route.response is None:
        return web.Response(status=route.status, headers=headers)
    if isinstance(result, bytes):
        return web.Response(
            status=route.status, body=result, content_type="application/json", headers=headers
        )
    if route.response is str:
        assert isinstance(result, str)
        return web.Response(text=result, content_type=route.media, headers=headers)
    return web.Response(
        status=route.status,
        body=msgspec.json.encode(result),
        content_type="application/json",
        headers=headers,
    )
