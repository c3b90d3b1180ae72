"""Bodies of requests, read and checked."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from dgemma_mlx.json_text import parse_json
from dgemma_mlx.server.errors import ApiError

T = TypeVar("T")


async def read_body(request: Request, type: type[T]) -> T:
    """Return the body of a request, which is JSON, as a struct. Fields that the struct does not have are ignored.

    Raises ``ApiError`` (400), which names the field, for anything else.
    """
    try:
        value = parse_json(await request.body(), most_digits=40)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    body: T = converted(value, type)
    return body


def converted(value: Any, type: Any, place: str = "") -> Any:
    """Return a value of JSON as a struct. ``place`` names the value in the error.

    Raises ``ApiError`` (400), which names the field, when it is not such a value.
    """
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        param = place + path.rstrip("`").removeprefix("$" if place else "$.") or None
        raise ApiError(400, message if param is None else f"{param}: {message}", param=param) from None
