"""The OpenAPI 3.1 document of the interface, made from the table of routes and the schemas."""

from __future__ import annotations

from typing import Any, Final

import msgspec

import flowengine
from flowengine.api.agents import Command
from flowengine.api.events import Event
from flowengine.api.schema import Page, Problem
from flowengine.coordinator.routes import ROUTES
from flowengine.coordinator.routes.queries import PATH_TYPES
from flowengine.coordinator.routes.route import Route, statuses

__all__ = ["document"]

_REF: Final = "#/components/schemas/{name}"


def _kinds() -> list[Any]:
    kinds: list[Any] = [Problem, Event, Command]
    for route in ROUTES:
        named = (route.request, route.response, route.items)
        kinds += [kind for kind in named if kind is not None and kind not in (str, dict, Page)]
    return list(dict.fromkeys(kinds))


def _schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a type, its parts referred to as components."""
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _parameters(route: Route) -> list[dict[str, Any]]:
    found = [
        {"name": name, "in": "path", "required": True, "schema": _schema_of(PATH_TYPES[name])}
        for name in route.parameters
    ]
    for field in msgspec.structs.fields(route.query):
        schema = _schema_of(field.type)
        if "anyOf" in schema:  # no value is told by leaving the parameter out
            schema = next(part for part in schema["anyOf"] if part.get("type") != "null")
        parameter: dict[str, Any] = {
            "name": field.encode_name,
            "in": "query",
            "required": field.required,
            "schema": schema,
        }
        if "description" in schema:
            parameter["description"] = schema.pop("description")
        found.append(parameter)
    if route.creates:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "The same key with the same body is answered the same for 24 hours.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
            }
        )
    return found


def _answer(route: Route) -> dict[str, Any]:
    description = "Done" if route.response is None else "The answer"
    if route.response is None:
        return {"description": description}
    schema: dict[str, Any]
    if route.response is Page:
        item = _schema_of(route.items)
        schema = {
            "type": "object",
            "required": ["items", "next"],
            "properties": {"items": {"type": "array", "items": item}, "next": {"type": "string"}},
        }
    else:
        schema = {"type": "object"} if route.response is dict else _schema_of(route.response)
    if route.media == "text/event-stream":
        schema = {"type": "string"}
    content = {route.media: {"schema": schema}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": description, "content": content}


def _operation(route: Route) -> dict[str, Any]:
    responses: dict[str, Any] = {str(route.status): _answer(route)}
    for status, reasons in statuses(route).items():
        responses[str(status)] = {
            "description": "Reasons: " + ", ".join(reasons),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": ["agent" if route.path.startswith("/v1/agent/") else "user"],
        "parameters": _parameters(route),
        "responses": responses,
    }
    if route.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema_of(route.request)}},
        }
    if route.who == "agent":
        operation["security"] = [{"certificate": []}]
    elif route.who == "any":
        operation["security"] = []
    else:
        operation["security"] = [{"token": []}]
        operation["description"] = "For the roles " + ", ".join(sorted(route.who)) + "."
    return operation


def document() -> dict[str, Any]:
    """The whole document; equal for equal versions."""
    _, components = msgspec.json.schema_components(_kinds(), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flowengine coordinator",
            "version": flowengine.__version__,
            "description": "Ask for transfers between sites, watch them, and look after the federation.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS"},
            },
        },
    }
