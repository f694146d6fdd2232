"""The one-time token by which a site enrols: in an environment variable, or in a file that only its owner can read."""

from __future__ import annotations

import os
from typing import Final

from flowengine.errors import LocalError, NotFound
from flowengine.store.secret_files import read_secret

__all__ = ["TOKEN_VARIABLE", "read_join_token"]

TOKEN_VARIABLE: Final = "FLOW_JOIN_TOKEN"  # noqa: S105 - a variable's name


def read_join_token(path: str, *, required: bool) -> str:
    """The token; empty where there is none.

    Args:
        path: the file that was named for it; empty for none.
        required: whether the file must be there.

    Raises:
        LocalError: the file is missing and required, holds no token, or others can read it.
    """
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    if not path:
        return ""
    try:
        return read_secret(path).decode("ascii").strip()
    except NotFound:
        if required:
            raise LocalError(f"there is no join token file {path}", hint="check the path") from None
        return ""  # one of the configuration is removed once it was used
    except UnicodeDecodeError:
        raise LocalError(
            f"the join token file {path} holds no join token",
            hint="flow site token SITE --output FILE makes one",
        ) from None
