"""Who stands in for the coordinator is sent nothing: the handshake itself ends."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from cryptography.hazmat.primitives import serialization

from flowengine.client.access import Access
from flowengine.client.pairing import access_of_login
from flowengine.client.transport import Transport
from flowengine.errors import AuthenticationError, FlowError
from flowengine.trust.certificates import issue_coordinator, issue_site, make_authority, make_key, make_request
from flowengine.trust.tokens import Login, UserToken

