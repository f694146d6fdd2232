"""What every resource is made of: fields with their bounds, the two kinds of record, pages, and problems.

What a client sends is checked strictly (an unknown field is a typing error that must not be obeyed in part); what the
coordinator answers may gain fields, so clients ignore those that they do not know.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from flowengine.units import NAME_PATTERN

__all__ = [
    "Name",
    "Page",
    "Problem",
    "Rate",
    "Request",
    "Resource",
    "SitePath",
    "Size",
    "Text",
    "Word",
    "in_words",
]

Name: TypeAlias = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""Name of a site, tenant or user: as a DNS label."""
SitePath: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$")]
Text: TypeAlias = Annotated[str, Meta(max_length=1000)]
Word: TypeAlias = Annotated[str, Meta(max_length=128)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Rate: TypeAlias = Annotated[int, Meta(ge=1, le=10**15)]


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Something that a client sends."""


class Resource(msgspec.Struct, kw_only=True):
    """Something that the coordinator answers."""


class Problem(Resource):
    """An error as RFC 9457 problem details. `reason` is the stable word of docs/reference/errors.md."""

    title: str
    status: int
    reason: str
    detail: str
    hint: str = ""
    type: str = "about:blank"
    instance: str = ""
    retryable: bool = False
    context: dict[str, Any] = {}


class Page(Resource):
    """What every listing has: `next` is the cursor of the next page, empty on the last."""

    items: list[Any]
    next: str = ""


def in_words(error: msgspec.ValidationError) -> str:
    """What is wrong with a value, for people; where it stands is told at the end.

    >>> try:
    ...     msgspec.convert("Lab", Name)
    ... except msgspec.ValidationError as error:
    ...     in_words(error)
    'a name has lower-case letters, digits and dashes, 63 at most, and no dash at an end'
    """
    for said, told in (
        (
            f"Expected `str` matching regex {NAME_PATTERN!r}",
            "a name has lower-case letters, digits and dashes, 63 at most, and no dash at an end",
        ),
        ("Object contains unknown field", "there is no such key as"),
        ("Object missing required field", "what is missing is"),
    ):
        if str(error).startswith(said):
            return told + str(error).removeprefix(said)
    return str(error)
