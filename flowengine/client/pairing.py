"""From a login string to an `Access`: fetch the CA and compare it with the fingerprint, before any secret is sent."""

from __future__ import annotations

import hmac
import ssl
from hashlib import sha256

import httpx2

from flowengine.client.access import Access, normal_url
from flowengine.client.tls import unchecked_context
from flowengine.client.transport import CONNECT_TIMEOUT_S
from flowengine.errors import AuthenticationError, TemporaryError
from flowengine.trust.tokens import Login

__all__ = ["access_of_login", "fetch_ca"]

MOST_CA_BYTES = 64 << 10


def fetch_ca(url: str) -> tuple[str, str]:
    """The CA that a coordinator says is the federation's, as PEM, and its fingerprint (hex). Nothing is believed yet."""
    try:
        with httpx2.Client(verify=unchecked_context(), timeout=CONNECT_TIMEOUT_S, trust_env=False) as http:
            answer = http.get(f"{url}/v1/ca")
        if not answer.is_success or len(answer.content) > MOST_CA_BYTES:
            raise AuthenticationError(
                f"{url} does not answer as a coordinator does (status {answer.status_code})",
                hint="check the address",
            )
        der = ssl.PEM_cert_to_DER_cert(answer.text.strip() + "\n")
    except httpx2.HTTPError as error:
        raise TemporaryError(
            f"cannot reach the coordinator at {url}: {str(error) or type(error).__name__}",
            hint="check the address, that it runs, and that its port can be reached",
            reason="disconnected",
        ) from None
    except ValueError:
        raise AuthenticationError(f"{url} answered with no certificate", hint="check the address") from None
    return answer.text, sha256(der).hexdigest()


def access_of_login(text: str) -> Access:
    """What a login string gives access to.

    Raises:
        UsageError: it is no login string.
        AuthenticationError: who answers at its address is not the coordinator that it was made by.
    """
    login = Login.parse(text)
    url = normal_url(login.url)
    ca_pem, fingerprint = fetch_ca(url)
    if not hmac.compare_digest(bytes.fromhex(fingerprint), login.ca_sha256):
        raise AuthenticationError(
            f"{url} is not the coordinator of this login string: its CA has another fingerprint",
            hint="get a new login string from the operator; if the CA was not changed, somebody is in between",
        )
    return Access(url, login.token.format_secret(), ca_pem)
