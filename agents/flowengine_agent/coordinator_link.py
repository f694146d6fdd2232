"""The agent's way to the coordinator: requests, and the one stream that commands come down.

The transport is the client's (`flowengine.client`): TLS 1.3, the federation's CA pinned, and a server that is not
`flow://coordinator` refused inside the handshake. Several addresses may be given; the one that answered last is asked
first.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import httpx2
import msgspec
import trio

from flowengine.api.agents import Command, Told, check_required
from flowengine.client.access import Access
from flowengine.client.tls import unchecked_context
from flowengine.client.transport import Transport
from flowengine.errors import FlowError, ProtocolError, TemporaryError

__all__ = ["CoordinatorLink", "fetch_ca"]

REQUEST_S: Final = 15.0
"""How long the coordinator may take to answer a request."""
FIRST_PAUSE_S: Final = 0.2
LAST_PAUSE_S: Final = 10.0
MAX_CA_BYTES: Final = 65536

T = TypeVar("T")


async def fetch_ca(url: str) -> str:
    """What an address says is the CA, in PEM. Proves nothing until it was compared with a fingerprint.

    Raises:
        TemporaryError: nobody answers there.
    """
    async with httpx2.AsyncClient(verify=unchecked_context(), trust_env=False, timeout=REQUEST_S) as client:
        try:
            answer = await client.get(f"{url}/v1/ca")
        except httpx2.HTTPError as error:
            raise TemporaryError(
                f"cannot reach the coordinator at {url}: {str(error) or type(error).__name__}",
                hint="check the address and that the coordinator runs",
                reason="disconnected",
            ) from error
    if answer.status_code != 200 or len(answer.content) > MAX_CA_BYTES:
        raise ProtocolError(
            f"{url} does not answer as a coordinator does (HTTP {answer.status_code})",
            hint="check the address",
        )
    return answer.text


class CoordinatorLink:
    """Requests and commands.

    Args:
        urls: the coordinator's addresses.
        context: TLS with this agent's certificate (`flowengine.client.tls.client_context`).
        retried: told why the stream of commands broke, before it is opened again.
    """

    def __init__(
        self,
        urls: Sequence[str],
        context: ssl.SSLContext,
        *,
        retried: Callable[[FlowError], None] = lambda error: None,
    ) -> None:
        self._urls = list(urls)
        self._retried = retried
        self._rng = random.Random()  # noqa: S311 - spreads retries
        self._retired: list[Transport] = []
        self._heard = trio.current_time()
        self._transports = self._made(context)

    def _made(self, context: ssl.SSLContext) -> list[Transport]:
        return [Transport(Access(url), context=context, retry_for_s=0) for url in self._urls]

    def silent_s(self) -> float:
        """For how long no coordinator has answered or said anything."""
        return trio.current_time() - self._heard

    @property
    def url(self) -> str:
        """The address that is asked first."""
        return self._transports[0].url

    def renew(self, context: ssl.SSLContext) -> None:
        """Use another certificate from the next connection on."""
        self._retired += self._transports  # requests may still be under way; closed at the end
        self._transports = self._made(context)

    def _turn(self, failed: Transport) -> None:
        if len(self._transports) > 1 and self._transports[0] is failed:
            self._transports.append(self._transports.pop(0))

    async def get(self, path: str, answer: type[T], params: Mapping[str, int] | None = None) -> T:
        """Fetch something; as `post`."""
        return await self._ask("GET", path, None, answer, params)

    async def post(self, path: str, body: msgspec.Struct | None, answer: type[T]) -> T:
        """Ask for something, of each address in turn until one answers; nothing is tried twice.

        Raises:
            FlowError: the coordinator refused, with its reason; or no address answers (retryable).
        """
        return await self._ask("POST", path, body, answer, None)

    async def _ask(
        self,
        method: str,
        path: str,
        body: msgspec.Struct | None,
        answer: type[T],
        params: Mapping[str, int] | None,
    ) -> T:
        away: FlowError | None = None
        for transport in list(self._transports):
            try:
                said = await transport.request(
                    method, path, answer, body=body, params=params, timeout_s=REQUEST_S
                )
                self._heard = trio.current_time()
                if isinstance(said, Told):
                    check_required(said)
                return said
            except FlowError as error:
                if error.reason != "disconnected":
                    raise
                self._turn(transport)
                away = error
        assert away is not None
        raise away

    async def commands(self) -> AsyncIterator[Command]:
        """Commands as they come, for ever; after a break the stream is opened again. `Greeting` begins each stream.

        Raises:
            FlowError: the coordinator refuses this agent for good.
        """
        pause = FIRST_PAUSE_S
        while True:
            transport = self._transports[0]
            stream = transport.events("/v1/agent/events", msgspec.Raw)
            try:
                async for data in stream:
                    pause = FIRST_PAUSE_S
                    self._heard = trio.current_time()
                    try:
                        command: Command = msgspec.json.decode(data, type=Command)
                    except msgspec.DecodeError:
                        continue  # of a newer coordinator; what must be understood comes by the heartbeat
                    yield command
            except FlowError as error:
                if not error.retryable:
                    raise
                self._retried(error)
            finally:
                await stream.aclose()
            self._turn(transport)
            await trio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE_S)

    async def aclose(self) -> None:
        """Close all connections."""
        for transport in [*self._transports, *self._retired]:
            await transport.aclose()


@asynccontextmanager
async def open_link(
    urls: Sequence[str],
    context: ssl.SSLContext,
    *,
    retried: Callable[[FlowError], None] = lambda error: None,
) -> AsyncIterator[CoordinatorLink]:
    """A link that is closed at the end of the block."""
    link = CoordinatorLink(urls, context, retried=retried)
    try:
        yield link
    finally:
        await link.aclose()
