"""Errors that clients see."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse

from dgemma_mlx.errors import DgemmaError, PromptTooLongError

# Kinds of errors in Anthropic's words, by status; other statuses below 500 are invalid requests.
_ANTHROPIC = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """An error as the answer to a request. Each protocol writes it in its own form.

    Attributes:
        status: The HTTP status.
        message: What is wrong, and where possible what to do; one line.
        type: The kind of error in OpenAI's words, such as ``invalid_request_error``.
        param: The field of the request that is at fault, or None.
        code: A short name that programs can test for, or None.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = headers or {}

    @classmethod
    def refused(cls, error: DgemmaError, param: str | None = None) -> ApiError:
        """Return the error of a request that was refused before any work.

        That of a prompt that is too long has the words and the code by which clients know to shorten it.
        """
        if isinstance(error, PromptTooLongError):
            message = (
                f"This model's maximum context length is {error.positions} tokens, and the prompt is too long: "
                f"{error.tokens} tokens > {error.most} maximum"
            )
            return cls(400, message, param="messages", code="context_length_exceeded")
        return cls(400, _sentence(error), param=param)

    @classmethod
    def failed(cls, error: BaseException) -> ApiError:
        """Return the error of a request whose work failed."""
        message = _sentence(error) if isinstance(error, DgemmaError) else f"unexpected {type(error).__name__}"
        return cls(500, message, "server_error")

    def openai(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's protocols, which is also the form of everything else here."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Return the error in the form of Anthropic's protocol, which is also the data of its event "error"."""
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def error_response(connection: HTTPConnection, error: ApiError) -> JSONResponse:
    """Return the answer to a request that failed, in the form of the protocol that the client speaks."""
    if connection.url.path.startswith("/v1/messages") or "anthropic-version" in connection.headers:
        id = f"req_{uuid4().hex}"
        return JSONResponse({**error.anthropic(), "request_id": id}, error.status, {**error.headers, "request-id": id})
    return JSONResponse(error.openai(), error.status, error.headers)


def _sentence(error: DgemmaError) -> str:
    """Return the message and the hint in one line."""
    return f"{error.message}. {error.hint}" if error.hint else error.message
