"""What callers write becomes a checked request; errors of the coordinator keep their reason."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from flowengine.api.schema import Problem
from flowengine.api.transfers import Endpoint, Transfer, TransferOptions, TransferRequest
from flowengine.client.requests import parse_place, transfer_request
from flowengine.client.transfers import failure_of
from flowengine.client.transport import error_of
from flowengine.errors import (
    AuthenticationError,
    Denied,
    Exit,
    FlowError,
    IntegrityError,
    NotFound,
    TemporaryError,
    UsageError,
    exit_code,
)

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_a_request_from_words() -> None:
    request = transfer_request(
        "hpc-a:/data/", ["cloud-b:/x", Endpoint(site="edge-c", path="/y")], mode="sync", now=NOW,
        labels=("patients",), contracts=("dua-7",), deadline=timedelta(hours=2), delete=True,
    )  # fmt: skip
    assert request == TransferRequest(
        source=Endpoint(site="hpc-a", path="/data/"),
        targets=[Endpoint(site="cloud-b", path="/x"), Endpoint(site="edge-c", path="/y")],
        mode="sync",
        labels=["patients"],
        contracts=["dua-7"],
        deadline=NOW + timedelta(hours=2),
        options=TransferOptions(delete=True),
    )


@pytest.mark.parametrize(
    "place", ["", "x", "/x", "A:/x", "a:x", "a:/\0", "-a:/x", "a_b:/x", "a" * 64 + ":/x"]
)
def test_what_is_no_place(place: str) -> None:
    with pytest.raises(UsageError, match="SITE:/PATH"):
        parse_place(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": []},
        {"labels": "patients"},
        {"contracts": "dua-7"},
        {"deadline": NOW - timedelta(seconds=1)},
        {"priority": "soon"},
        {"purpose": "x" * 2000},
        {"options": TransferOptions(streams=65)},
    ],
)
def test_what_makes_no_sense_is_refused_here(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        transfer_request(**({"source": "a:/x", "targets": "b:/x", "mode": "copy", "now": NOW} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "reason", "kind", "code"),
    [
        (400, "usage", UsageError, Exit.USAGE),
        (401, "authentication", AuthenticationError, Exit.AUTHENTICATION),
        (403, "denied", Denied, Exit.DENIED),
        (404, "not-found", NotFound, Exit.NOT_FOUND),
        (409, "no-such-reason-yet", FlowError, Exit.FAILED),
        (503, "busy", TemporaryError, Exit.TEMPORARY),
    ],
)
def test_a_problem_becomes_an_error_with_its_reason(
    status: int, reason: str, kind: type[FlowError], code: Exit
) -> None:
    problem = Problem(
        title="t", status=status, reason=reason, detail="d", hint="h", retryable=True, context={"message": 1}
    )
    error = error_of(status, json.dumps({**api_dict(problem), "new": 1}).encode(), "GET /x")
    assert type(error) is kind
    assert (error.message, error.hint, error.reason, error.retryable) == ("d", "h", reason, True)
    assert error.context == {"message": 1}
    assert exit_code(error) is code


def api_dict(problem: Problem) -> dict[str, object]:
    return {name: getattr(problem, name) for name in problem.__struct_fields__}


def test_an_answer_that_is_no_problem_names_its_status() -> None:
    error = error_of(502, b"<html>", "GET /x")
    assert isinstance(error, TemporaryError)
    assert error.retryable
    assert "502" in error.message


@pytest.mark.parametrize(
    ("reason", "kind"), [("denied", Denied), ("integrity", IntegrityError), ("cancelled", FlowError)]
)
def test_a_transfer_that_ended_otherwise_is_an_error(reason: str, kind: type[FlowError]) -> None:
    request = transfer_request("a:/x", "b:/x", mode="copy", now=NOW)
    record = Transfer(
        id="t-1", request=request, state="terminated", reason=reason, message="m", since=NOW, created=NOW,
        user="u", tenant="default",
    )  # fmt: skip
    error = failure_of(record)
    assert type(error) is kind
    assert error.reason == reason
    record.state = "completed"
    assert failure_of(record) is None
