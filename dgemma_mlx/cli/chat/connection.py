"""HTTP to a server of chat completions: one request, and the events of its answer while they come."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Generator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

CONTEXT_EXCEEDED = "context_length_exceeded"  # the code of a prompt that is too long
_CONNECT_SECONDS = 10
_SILENT_SECONDS = 120  # a server that writes or waits says so more often
_POLL_SECONDS = 0.05
_MOST_BYTES = 1 << 24  # of a line


class ServerError(DgemmaError):
    """An error that the server has answered with.

    Attributes:
        code: The server's short name for it, or None.
    """

    code: str | None = None


class Server:
    """A server at an address.

    Attributes:
        url: The address, without a slash or ``/v1`` at its end.
    """

    def __init__(self, url: str, key: str | None) -> None:
        """Raise `DgemmaError` (exit code 2) for what is not an address, or a key that no header can hold."""
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            hint = "Write http://HOST:PORT, as `dgemma-mlx serve` prints it."
            raise DgemmaError(f"not the address of a server: {shown(url)}", hint, exit_code=2)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise DgemmaError("the API key holds characters that no header can hold", "Copy it again.", exit_code=2)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._secure = parts.scheme == "https"
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}

    def models(self) -> list[dict[str, Any]]:
        """Return what the server says of its models, each with an "id". Some servers say nothing.

        Raises `DgemmaError` when there is no server, or it wants another key.
        """
        connection = self._connect()
        try:
            with self._send(connection, "GET", "/v1/models", None, accept_missing=True) as response:
                found = parse_json(response.read(_MOST_BYTES), most_digits=40) if response.status == 200 else {}
        except ValueError:  # not JSON
            found = {}
        except (OSError, HTTPException) as error:
            raise self._lost(error) from None
        finally:
            connection.close()
        entries = found.get("data") if isinstance(found, dict) else None
        named = entries if isinstance(entries, list) else []
        return [entry for entry in named if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def events(
        self, path: str, body: dict[str, Any], cancelled: Callable[[], bool]
    ) -> Generator[dict[str, Any], None, None]:
        """Post a body, and yield the events of its answer until the last one, or until ``cancelled`` returns True.

        Raises `DgemmaError` when the server cannot be reached, answers with an error, or ends too early. Closing the
        generator closes the connection, which ends the server's work.
        """
        lines: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        connection = self._connect()
        connected: socket.socket = connection.sock
        thread = Thread(target=self._read, args=(connection, path, body, lines), daemon=True)
        thread.start()
        try:
            while not cancelled():
                try:
                    line = lines.get(timeout=_POLL_SECONDS)
                except Empty:
                    continue
                if isinstance(line, BaseException):
                    raise line
                if line is None:
                    raise DgemmaError("the server ended its answer too early", f"Is it still running at {self.url}?")
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data:"):
                    yield self._event(line[5:])
        finally:
            with suppress(OSError):  # the server may have closed it
                connected.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            thread.join()
            connection.close()

    def _read(
        self, connection: HTTPConnection, path: str, body: dict[str, Any],
        lines: SimpleQueue[bytes | BaseException | None],
    ) -> None:
        """Post a body and queue the lines of the answer, then None; or what was raised."""
        try:
            with self._send(connection, "POST", path, body) as response:
                while line := response.readline(_MOST_BYTES):
                    lines.put(line)
            lines.put(None)
        except DgemmaError as error:
            lines.put(error)
        except (OSError, HTTPException, ValueError) as error:
            lines.put(self._lost(error))

    def _connect(self) -> HTTPConnection:
        """Return an open connection."""
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:
            hint = "`dgemma-mlx serve` starts a server, and prints its address."
            raise DgemmaError(f"cannot reach {self.url}: {reason(error)}", hint) from None
        connection.sock.settimeout(_SILENT_SECONDS)
        return connection

    def _send(
        self, connection: HTTPConnection, method: str, path: str, body: dict[str, Any] | None,
        accept_missing: bool = False,
    ) -> HTTPResponse:
        """Send a request, and return the response once its headers are there. Raises `DgemmaError` for an error."""
        headers = {**self._headers, "content-type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
            if response.status == 200 or (accept_missing and response.status == 404):
                return response
            with response:
                raise _refusal(response.status, response.read(_MOST_BYTES))
        except (OSError, HTTPException) as error:
            raise self._lost(error) from None

    def _lost(self, error: BaseException) -> DgemmaError:
        return DgemmaError(f"the connection to {self.url} was lost: {reason(error)}", "Is the server still running?")

    def _event(self, data: bytes) -> dict[str, Any]:
        """Return the data of an event. Raises `DgemmaError` for an error, and for anything but an object."""
        try:
            value = parse_json(data, most_digits=40)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DgemmaError(f"{self.url} does not speak OpenAI's protocol", "Is it the address of another program?")
        if value.get("error"):
            raise _refusal(0, data)
        return value


def _refusal(status: int, content: bytes) -> ServerError:
    """Return the error that a response describes."""
    try:
        value = parse_json(content, most_digits=40)
    except ValueError:
        value = None
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    hint = "The server has refused or given up the request; the conversation has not changed."
    if status == 401:
        hint = "Give the server's key with --api-key or the variable DGEMMA_API_KEY."
    text = message if isinstance(message, str) and message else f"status {status}"
    refusal = ServerError(f"the server says: {text}", hint)
    code = error.get("code") if isinstance(error, dict) else None
    refusal.code = code if isinstance(code, str) else None
    return refusal
