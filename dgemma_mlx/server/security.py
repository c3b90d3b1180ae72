"""Who may use the server, and how much a request may take: checks that come before any protocol.

A web page on another site can send requests to a server on this machine. It is kept out by its ``Origin`` header, and
by the ``Host`` header where it has a name resolve to this machine (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import hmac
import re
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.server.errors import ApiError, error_response
from dgemma_mlx.server.settings import ServerSettings

# What needs no key: the page, which asks for it, and what says that the server is alive.
OPEN_PATHS = ("/", "/health")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*]*")
_ANY_OF_SCHEME = "://"  # an allowed origin that ends so stands for all origins of the scheme
_KEY = re.compile(r"[!-~]+")  # what a header can hold
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, HEAD", "access-control-max-age": "600", "vary": "Origin",
}  # fmt: skip
_EXPOSED = "retry-after, request-id, x-request-id"


def check_settings(settings: ServerSettings) -> None:
    """Raise ``DgemmaError`` (exit code 2) for settings that would let anybody in, or that cannot match anything."""
    if settings.api_key is not None and not _KEY.fullmatch(settings.api_key):
        message = "the API key is empty, or holds spaces or characters that are not ASCII"
        raise DgemmaError(message, "A key of random letters and digits is best.", exit_code=2)
    if settings.api_key is None and not is_loopback(settings.host):
        raise DgemmaError(
            f"the address {shown(settings.host)} can be reached from other machines, so the server needs an API key",
            "Give --api-key or the variable DGEMMA_API_KEY, or listen on 127.0.0.1.", exit_code=2,
        )  # fmt: skip
    for origin in settings.allowed_origins:
        anywhere = origin in ("http://", "https://")
        if not _ORIGIN.fullmatch(origin) or anywhere:
            raise DgemmaError(
                f"not an origin that can be allowed: {shown(origin)}",
                "An origin has no path: http://localhost:3000, app://obsidian.md, or vscode-webview:// for a scheme.",
                exit_code=2,
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address that is listened on."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


class Guard:
    """An ASGI application around another one. It answers what must not reach it, and hands over whole bodies."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._key = None if settings.api_key is None else settings.api_key.encode()
        names = ("localhost", settings.host, *settings.allowed_hosts)
        self._hosts = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        headers = connection.headers
        origin: str | None = None
        try:
            self._check_host(headers)
            origin = self._checked_origin(headers)
            send = _with_headers(send, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
            self._check_key(headers, scope["path"])
            body = await self._body(headers, scope["method"], receive)
        except ApiError as error:
            await error_response(connection, error)(scope, receive, send)
            return
        except _GoneEarlyError:
            return
        await self._app(scope, _again(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        """Raise ``ApiError`` (403) unless the request names this machine.

        An address as such is no danger: a page that was loaded from a name cannot have it as its own origin's host.
        """
        given = headers.getlist("host")
        name = _without_port(given[0].lower()) if len(given) == 1 else ""
        if not (name in self._hosts or name.endswith(".localhost") or _is_address(name)):
            hint = f"`dgemma-mlx serve --allow-host {name}` accepts it" if re.fullmatch(r"[\w.-]+", name) else ""
            raise _forbidden(f"this server is not {shown(given[0] if given else '')}; {hint}".rstrip("; "))

    def _checked_origin(self, headers: Headers) -> str | None:
        """Return the origin of another site's page that may use the server; None for its own page, and no page.

        Raises ``ApiError`` (403) for a page that may not.
        """
        given = headers.getlist("origin")
        if not given:
            return None
        if len(given) == 1:
            origin = given[0]
            if origin in (f"http://{headers['host']}", f"https://{headers['host']}"):
                return None
            for allowed in self._settings.allowed_origins:
                if origin == allowed or (allowed.endswith(_ANY_OF_SCHEME) and origin.startswith(allowed)):
                    return origin
        raise _forbidden(f"web pages of {shown(given[0])} may not use this server; --allow-origin lets one in")

    def _check_key(self, headers: Headers, path: str) -> None:
        """Raise ``ApiError`` (401) unless the request has the key, or needs none."""
        if self._key is None or path in OPEN_PATHS:
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        keys = [bearer.strip()] if kind.lower() == "bearer" else []
        keys += headers.getlist("x-api-key")
        fits = [hmac.compare_digest(key.encode("latin-1", "replace"), self._key) for key in keys]
        if not any(fits):
            raise ApiError(
                401, "the API key is wrong" if keys else "this server needs an API key, as a bearer token or x-api-key",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    async def _body(self, headers: Headers, method: str, receive: Receive) -> bytes:
        """Return the whole body. Raises ``ApiError`` for one that is too large, too slow, or not JSON."""
        most = self._settings.max_body
        declared = headers.get("content-length", "0")
        if "expect" in headers and declared.isdecimal() and (len(declared) > 15 or int(declared) > most):
            raise _too_large(most)  # the client waits for a word before it sends the body
        try:
            body = await asyncio.wait_for(_read(receive, most), self._settings.body_seconds)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self._settings.body_seconds:g} s"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if body and method == "POST" and kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"the body must be JSON (content-type: application/json), not {shown(kind)}")
        return body


class _GoneEarlyError(Exception):
    """The client has gone before its body was complete."""


async def _read(receive: Receive, most: int) -> bytes:
    """Return a body of at most this many bytes. A larger one is read to its end, or its client would see no answer."""
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneEarlyError
        piece = message.get("body", b"")
        size += len(piece)
        if size <= most:
            body += piece
        if not message.get("more_body", False):
            break
    if size > most:
        raise _too_large(most)
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives a whole body first, and then what ``receive`` gives."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def _with_headers(send: Send, origin: str | None) -> Send:
    """Return a function that sends with the headers that every answer has, and those for an allowed origin."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-content-type-options"] = "nosniff"
            headers["cross-origin-resource-policy"] = "same-origin"
            headers.add_vary_header("Origin")
            if origin is not None:
                headers["access-control-allow-origin"] = origin
                headers["access-control-expose-headers"] = _EXPOSED
        await send(message)

    return sending


def _preflight(headers: Headers) -> Response:
    """Return the answer to a browser's question before a request of an allowed page. It may send any header."""
    found = dict(_PREFLIGHT)
    if asked := headers.get("access-control-request-headers"):
        found["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        found["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=found)


def _without_port(host: str) -> str:
    """Return the name or address of a Host header."""
    if found := re.fullmatch(r"\[([^\]]*)\](:\d+)?", host):
        return found[1]
    return host.rpartition(":")[0] if ":" in host else host


def _is_address(name: str) -> bool:
    """Return whether this is an IP address, and not a name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, "permission_error")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes, the limit that --max-body sets")
