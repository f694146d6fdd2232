"""HTTP /v1 towards the coordinator: one request with its retries, event streams that reconnect, errors as `FlowError`.

Runs under asyncio and trio. The one place of the client that retries: it asks only whether an error is `retryable`
and whether the request may be sent twice.
"""

from __future__ import annotations

import math
import random
import ssl
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx2
import msgspec

import flowengine
from flowengine.api.schema import Page, Problem
from flowengine.client.access import Access
from flowengine.client.tls import client_context
from flowengine.errors import (
    AuthenticationError,
    Denied,
    FlowError,
    NotFound,
    PeerError,
    ProtocolError,
    TemporaryError,
    UsageError,
)

__all__ = ["EventStream", "Transport", "error_of"]

T = TypeVar("T")

REQUEST_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 45.0
"""An event stream that says nothing for so long is dead: the coordinator sends a comment every 15 s."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
MOST_EVENT_BYTES: Final = 4 << 20

_BY_STATUS: Final[dict[int, type[FlowError]]] = {
    400: UsageError,
    401: AuthenticationError,
    403: Denied,
    404: NotFound,
    422: UsageError,
    429: TemporaryError,
    502: TemporaryError,
    503: TemporaryError,
    504: TemporaryError,
}


def error_of(status: int, body: bytes, what: str) -> FlowError:
    """The error that an answer stands for: its reason, hint and context are kept.

    >>> error_of(404, b'{"title": "", "status": 404, "reason": "not-found", "detail": "no site x"}', "").message
    'no site x'
    """
    kind = _BY_STATUS.get(status, TemporaryError if status >= 502 else FlowError)
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        return kind(f"{what}: the coordinator answered with status {status} and no explanation")
    error = kind(problem.detail or problem.title, hint=problem.hint, reason=problem.reason)
    error.retryable = problem.retryable
    error.context = dict(problem.context)
    return error


def _broken(error: Exception, url: str) -> FlowError:
    """What a failed exchange means to the caller."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            detail = seen.verify_message if getattr(seen, "verify_message", "") else str(seen)
            return AuthenticationError(
                f"{url} does not prove to be the coordinator: {detail}",
                hint="check the address; if the federation has a new CA, log in again with a new login string",
            )
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return TemporaryError(
            f"cannot reach the coordinator at {url}: {str(error) or type(error).__name__}",
            hint="check that it runs and that its port can be reached; flow doctor tells more",
            reason="disconnected",
        )
    if isinstance(error, httpx2.TransportError):
        return TemporaryError(
            f"the connection to the coordinator at {url} broke: {str(error) or type(error).__name__}",
            hint="try again",
            reason="disconnected",
        )
    return ProtocolError(f"{url} does not speak as a coordinator does: {error}", hint="check the address")


class Transport:
    """Connections to one coordinator.

    Args:
        access: address, token, CA.
        context: TLS settings other than those of a user, such as an agent's with its certificate.
        retry_for_s: how long what failed for a passing reason is tried again.
        note: told once when retrying begins, with a line for people.
    """

    def __init__(
        self,
        access: Access,
        *,
        context: ssl.SSLContext | None = None,
        retry_for_s: float = 30.0,
        note: Callable[[str], object] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.url = access.url
        self._retry_for_s = retry_for_s
        self._note = note
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries
        self._streams: set[EventStream[Any]] = set()
        headers = {"user-agent": f"flowengine/{flowengine.__version__}", "accept": "application/json"}
        if access.token:
            headers["authorization"] = f"Bearer {access.token}"
        host = urlsplit(access.url).hostname or ""
        self._http = httpx2.AsyncClient(
            base_url=access.url,
            headers=headers,
            verify=context or client_context(access.ca_pem),
            timeout=httpx2.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=200, max_keepalive_connections=20, keepalive_expiry=60.0),
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # no proxy leads back to this machine
        )

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections and streams."""
        with anyio.CancelScope(shield=True):
            for stream in list(self._streams):
                await stream.aclose()
            await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        result: type[T],
        *,
        params: Mapping[str, str | int | float] | None = None,
        body: msgspec.Struct | None = None,
        key: str = "",
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> T:
        """Ask, again where that is safe and may help, and decode the answer as `result` (`None` for none).

        Args:
            key: makes a POST safe to be sent twice (Idempotency-Key); a POST without one is sent once.
            timeout_s: how long the coordinator may think.

        Raises:
            FlowError: as the coordinator's problem says, or "disconnected".
        """
        content = None if body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"} if body is not None else {}
        if key:
            headers["idempotency-key"] = key
        repeatable = method != "POST" or bool(key)
        pauses = self._pauses()
        repeated = False
        while True:
            try:
                answer = await self._http.request(
                    method,
                    path,
                    params=params,
                    content=content,
                    headers=headers,
                    timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
                )
                if answer.is_success:
                    return _decode(answer.content, result, self.url)
                if repeated and method == "DELETE" and answer.status_code == 404:
                    return _decode(b"", result, self.url)  # the try whose answer got lost has done it
                error = error_of(answer.status_code, answer.content, f"{method} {path}")
                may_repeat = repeatable
            except httpx2.HTTPError as broken:
                error = _broken(broken, self.url)
                may_repeat = repeatable or isinstance(broken, httpx2.ConnectError | httpx2.ConnectTimeout)
            if not (error.retryable and may_repeat):
                raise error
            repeated = True
            await pauses.wait(error)

    async def all_of(
        self, path: str, kind: type[T], params: Mapping[str, str | int] | None = None
    ) -> list[T]:
        """Every item of a listing, page by page."""
        found: list[T] = []
        after = ""
        while True:
            items, after = await self.page(path, kind, params, after)
            found += items
            if not after:
                return found

    async def page(
        self,
        path: str,
        kind: type[T],
        params: Mapping[str, str | int | float] | None = None,
        after: str = "",
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> tuple[list[T], str]:
        """One page of a listing, and the cursor of the next one (empty on the last).

        Raises:
            ProtocolError: it says that more follows, and leads nowhere: whoever went on would ask for ever.
        """
        asked: dict[str, str | int | float] = dict(params or {})
        if after:
            asked["after"] = after
        page = await self.request("GET", path, Page, params=asked, timeout_s=timeout_s)
        if page.next and (not page.items or page.next == str(asked.get("after", ""))):
            odd = "an empty page" if not page.items else "the page that was asked for"
            raise ProtocolError(
                f"the coordinator at {self.url} answers {path} with {odd} and says that more follows behind "
                f"{page.next[:40]!r}: its listing has no end",
                hint="ask its operator to look at its version and its log; flow doctor tells more",
            )
        try:
            return msgspec.convert(page.items, list[kind]), page.next  # type: ignore[valid-type]
        except msgspec.ValidationError as error:
            raise _broken(error, self.url) from None

    def events(
        self, path: str, kind: type[T], *, params: Mapping[str, str | int] | None = None, after: str = ""
    ) -> EventStream[T]:
        """A stream of events, opened when the first one is asked for."""
        stream = EventStream(self, path, kind, params or {}, after)
        self._streams.add(stream)
        return stream

    def _pauses(self) -> _Pauses:
        return _Pauses(self._retry_for_s, self._rng, self._note)


class _Pauses:
    """Waits between tries: doubling, spread, until the time is over."""

    def __init__(self, retry_for_s: float, rng: random.Random, note: Callable[[str], object] | None) -> None:
        self._retry_for_s = retry_for_s
        self._rng = rng
        self._note = note
        self.reset()

    def reset(self) -> None:
        self._until = -1.0
        self._pause = FIRST_PAUSE_S

    async def wait(self, error: FlowError) -> None:
        """Sleep before the next try; raises `error` when it is too late for one."""
        now = anyio.current_time()
        if self._until < 0:
            self._until = now + self._retry_for_s
            if self._note is not None and self._retry_for_s > 0:
                self._note(f"{error.message}; trying again for {_seconds(self._retry_for_s)}")
        if now + self._pause > self._until:
            raise error
        await anyio.sleep(self._pause * self._rng.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)


def _seconds(value: float) -> str:
    return "as long as it takes" if math.isinf(value) else f"{value:.0f} s"


class EventStream(Generic[T]):
    """Events as they happen: an asynchronous iterator that comes back after a broken connection where it stopped.

    Ends only by `aclose` (or with the client). Iterate it in one task.

    Raises (while iterating):
        FlowError: the coordinator refused, or could not be reached for as long as the transport retries.
    """

    def __init__(
        self, transport: Transport, path: str, kind: type[T], params: Mapping[str, str | int], after: str
    ) -> None:
        self._transport = transport
        self._path = path
        self._kind = kind
        self._params = dict(params)
        self._last = after
        self._stack: AsyncExitStack | None = None
        self._source: Any = None
        self._pauses = transport._pauses()
        self._closed = False

    def __aiter__(self) -> EventStream[T]:
        return self

    async def __aenter__(self) -> EventStream[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> T:
        event = await self.next_event()
        if event is None:
            raise StopAsyncIteration
        return event

    async def next_event(self) -> T | None:
        """The next event; None once the stream was closed."""
        while not self._closed:
            try:
                if self._source is None:
                    await self._open()
                event = await anext(self._source)
            except StopAsyncIteration:
                # The coordinator stops, or ended the stream: come back after a moment.
                error: FlowError = TemporaryError(
                    "the coordinator ended the event stream", reason="disconnected"
                )
            except (httpx2.HTTPError, httpx2.StreamError) as broken:
                error = _broken(broken, self._transport.url)
            except FlowError as refused:
                error = refused
            except BaseException:
                await (
                    self._drop()
                )  # cancelled in the middle of an event: the connection is of no use any more
                raise
            else:
                self._pauses.reset()
                if event.id:
                    self._last = event.id
                if event.data:
                    return _decode(event.data.encode(), self._kind, self._transport.url)
                continue
            await self._drop()
            if not error.retryable:
                raise error
            await self._pauses.wait(error)
        return None

    async def _open(self) -> None:
        headers = {"accept": "text/event-stream", "cache-control": "no-store"}
        if self._last:
            headers["last-event-id"] = self._last
        stack = AsyncExitStack()
        try:
            answer = await stack.enter_async_context(
                self._transport._http.stream(
                    "GET",
                    self._path,
                    params=self._params,
                    headers=headers,
                    timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S),
                )
            )
            if not answer.is_success:
                raise error_of(answer.status_code, await answer.aread(), f"GET {self._path}")
            source = aiter(httpx2.EventSource(answer, max_event_size=MOST_EVENT_BYTES))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            raise
        self._stack, self._source = stack, source

    async def _drop(self) -> None:
        stack, source = self._stack, self._source
        self._stack = self._source = None
        with anyio.CancelScope(shield=True):
            if stack is not None:
                await stack.aclose()
            if source is not None:
                # The body is read through a chain of generators, and closing the outermost leaves the others to the
                # garbage collector, which trio complains about. The connection is closed: reading on ends them all.
                with anyio.move_on_after(1.0):
                    try:
                        while True:
                            await anext(source)
                    except (StopAsyncIteration, httpx2.HTTPError, httpx2.StreamError):
                        pass

    async def aclose(self) -> None:
        """End the stream."""
        self._closed = True
        self._transport._streams.discard(self)
        await self._drop()


def _decode(body: bytes, kind: type[T], url: str) -> T:
    if kind is type(None):
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise PeerError(
            f"the coordinator at {url} answered with what this version does not understand: {error}",
            hint="update flowengine here or there; flow doctor compares the versions",
            reason="incompatible",
        ) from None
