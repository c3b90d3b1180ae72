"""Bodies of requests, read and checked."""

from __future__ import annotations

from typing import TypeVar

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
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        _, _, path = str(error).partition(" - at `")
        raise ApiError(400, str(error), param=path.rstrip("`").removeprefix("$.") or None) from None
