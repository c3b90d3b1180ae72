"""``/openapi.json``: the server's endpoints, described from the structs that read their bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from dgemma_mlx.server import anthropic_request, llamacpp, openai_chat, openai_completions, own, responses_request
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.security import OPEN_PATHS
from dgemma_mlx.version import __version__

# The struct of each body, by path.
BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": openai_chat.ChatRequest,
    "/v1/completions": openai_completions.CompletionRequest,
    "/v1/fim/completions": openai_completions.CompletionRequest,
    "/v1/responses": responses_request.ResponsesRequest,
    "/v1/messages": anthropic_request.MessagesRequest,
    "/v1/messages/count_tokens": anthropic_request.MessagesRequest,
    "/v1/fill": own.FillRequest,
    "/v1/edit": own.EditRequest,
    "/v1/choose": own.ChooseRequest,
    "/infill": llamacpp.InfillRequest,
    "/tokenize": llamacpp.TokenizeRequest,
    "/detokenize": llamacpp.DetokenizeRequest,
}
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"],
                             "properties": {"message": {"type": "string"}, "type": {"type": "string"}}}},
}  # fmt: skip
_FIELD = re.compile(r"^ {4,8}(\w+): (.+?)(?=^ {4,8}\w+: |\Z)", re.MULTILINE | re.DOTALL)


def describe(routes: Iterable[BaseRoute], needs_key: bool) -> dict[str, Any]:
    """Return the description of these routes in the form of OpenAPI 3.1. ``needs_key`` says whether the server does."""
    _, schemas = msgspec.json.schema_components(BODIES.values(), ref_template="#/components/schemas/{name}")
    for struct in {base for body in BODIES.values() for base in body.__mro__}:
        _add_meanings(struct, schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route):
            for method in sorted((route.methods or set()) - {"HEAD"}):
                paths.setdefault(route.path.replace(":path}", "}"), {})[method.lower()] = _operation(route, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "dgemma-mlx", "version": __version__, "description": "A local server of DiffusionGemma."},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}] if needs_key else [],
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    """Return the description of one method of a route, whose summary is the first line of its function."""
    kinds = ("application/json", "text/event-stream") if method == "POST" else ("*/*",)
    content: dict[str, Any] = {kind: {} for kind in kinds}
    error = {"description": "What is wrong.", "content": {"application/json": {"schema": {
        "$ref": "#/components/schemas/Error"}}}}  # fmt: skip
    answer: dict[str, Any] = {"description": "The answer.", "content": content}
    found: dict[str, Any] = {
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0].rstrip("."),
        "operationId": f"{method.lower()}{re.sub('[^a-z0-9]+', '_', route.path.lower())}",
        "responses": {"200": answer, "4XX": error, "5XX": error},
    }
    if route.path in OPEN_PATHS:
        found["security"] = []
    if route.param_convertors:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
    if method == "POST" and route.path in BODIES:
        schema = {"$ref": f"#/components/schemas/{BODIES[route.path].__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _add_meanings(struct: type, schemas: Mapping[str, Any]) -> None:
    """Describe the fields of a struct, and of its subclasses, by the section Attributes of its docstring."""
    _, _, section = (struct.__doc__ or "").partition("Attributes:\n")
    meanings = {name: " ".join(text.split()) for name, text in _FIELD.findall(section)}
    for body in schemas.values():
        if body.get("title") in {each.__name__ for each in (struct, *struct.__subclasses__())}:
            for name, field in body["properties"].items():
                if name in meanings:
                    field.setdefault("description", meanings[name])


async def document(request: Request) -> Response:
    """Describe this server in the form of OpenAPI."""
    engine: Engine = request.app.state.engine
    return JSONResponse(describe(request.app.routes, engine.settings.api_key is not None))


ROUTES = [Route("/openapi.json", document)]
