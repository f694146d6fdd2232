"""Who stands in for the coordinator is sent nothing: the handshake itself ends."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from flowengine.client.access import Access
from flowengine.client.pairing import access_of_login
from flowengine.client.transport import Transport
from flowengine.errors import AuthenticationError
from flowengine.trust.certificates import (
    Authority,
    issue_coordinator,
    issue_site,
    make_authority,
    make_key,
    make_request,
)
from flowengine.trust.tokens import Login, make_user_token

NOW = time.time()
CA = make_authority(NOW, os.urandom)
OTHER_CA = make_authority(NOW, os.urandom)
COORDINATOR_KEY, SITE_KEY = make_key(os.urandom), make_key(os.urandom)
COORDINATOR = (
    issue_coordinator(CA, COORDINATOR_KEY, ["another.example.org"], NOW, os.urandom),
    COORDINATOR_KEY,
)
SITE = issue_site(CA, make_request(SITE_KEY), "hpc-a", NOW, os.urandom), SITE_KEY


@contextmanager
def server(folder: Path, identity: tuple[str, bytes], answer: str) -> Iterator[tuple[str, list[bytes]]]:
    """A TLS server that answers everything with one text: its address, and what it was sent."""
    (folder / "cert.pem").write_text(identity[0])
    (folder / "key.pem").write_bytes(identity[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    received: list[bytes] = []
    body = answer.encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(10)
            try:
                with context.wrap_socket(plain, server_side=True) as tls:
                    received.append(tls.recv(65536))
                    tls.sendall(head.encode() + body)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}", received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def ask(url: str, ca: Authority, backend: str) -> str:
    async def main() -> str:
        async with Transport(Access(url, "flowt_secret", ca.certificate_pem), retry_for_s=0) as transport:
            return await transport.request("GET", "/v1/word", str)

    return anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_coordinator_is_known_by_its_name_in_the_pinned_ca(tmp_path: Path, backend: str) -> None:
    with server(tmp_path, COORDINATOR, '"yes"') as (url, received):
        assert ask(url, CA, backend) == "yes"
        assert b"Bearer flowt_secret" in received[0]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("identity", "ca"), [(SITE, CA), (COORDINATOR, OTHER_CA)], ids=["an agent", "another CA"]
)
def test_nobody_else_is_sent_a_token(
    tmp_path: Path, backend: str, identity: tuple[str, bytes], ca: Authority
) -> None:
    with server(tmp_path, identity, '"yes"') as (url, received):
        with pytest.raises(AuthenticationError, match="does not prove to be the coordinator"):
            ask(url, ca, backend)
    assert b"".join(received) == b""


def test_a_login_string_is_believed_only_with_its_ca(tmp_path: Path) -> None:
    token = make_user_token(os.urandom)
    with server(tmp_path, COORDINATOR, CA.certificate_pem) as (url, received):
        good = Login(url, CA.fingerprint, token).format_secret()
        assert access_of_login(good) == Access(url, token.format_secret(), CA.certificate_pem)
        with pytest.raises(AuthenticationError, match="fingerprint"):
            access_of_login(Login(url, OTHER_CA.fingerprint, token).format_secret())
    assert token.format_secret().encode() not in b"".join(received)
