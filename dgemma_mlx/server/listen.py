"""Listening: the application on a port, until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.server.app import make_app
from dgemma_mlx.server.connection import TimedProtocol
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.machines import Machines
from dgemma_mlx.server.settings import ServerSettings

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds after a signal: until answers that are being written are cancelled, until connections are cut whose clients do
# not read, and until the process ends in any case, whatever it is doing.
_FINISH, _CUT, _END = 5, 7, 9


def listen(
    load: Callable[[], Model], settings: ServerSettings, ready: Callable[[int], None],
    machines: Machines | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, and then end within a few seconds.

    Requests are taken from the beginning, and wait until the model is loaded. ``ready`` is called with the port once
    it is. After a signal, no new connections are taken; answers that are not finished soon, or at the second signal,
    are cancelled. The process ends with exit code 0 when even this takes too long, as it does while a model is loaded.

    ``machines`` are others that answer as well.

    Raises ``DgemmaError`` when the port is taken or the folder of prompt caches cannot be used, and what loading
    raises.
    """
    app = make_app(load, settings, machines)
    listener = _bind(settings.host, settings.port)
    config = uvicorn.Config(
        app, http=TimedProtocol, ws="none", log_level="warning", access_log=False, proxy_headers=False,
        server_header=False, date_header=False, timeout_graceful_shutdown=_CUT,
    )  # fmt: skip
    deadline = threading.Timer(_END, os._exit, (0,))
    deadline.daemon = True
    try:
        asyncio.run(_serve(_Server(config), app, listener, ready, deadline.start))
    finally:
        deadline.cancel()


async def _serve(
    server: _Server, app: Starlette, listener: socket.socket, ready: Callable[[int], None], ending: Callable[[], None]
) -> None:
    """Run the server until a signal comes or loading fails. ``ending`` is called when it begins to end."""
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    engine: Engine = app.state.engine
    try:
        if not await _is_first(engine.ready(), signals):
            os._exit(0)  # nothing has begun but the load, which cannot be interrupted
        ready(listener.getsockname()[1])
        await _is_first(serving, signals)
    finally:
        ending()
        server.should_exit = True
        if not await _is_first(serving, signals, timeout=_FINISH):
            await engine.close()
        await serving


async def _is_first(work: Awaitable[None], signals: asyncio.Queue[None], timeout: float | None = None) -> bool:
    """Wait for work, until a signal comes or the time is up. Return whether the work is done; raise what it raises."""
    task, told = asyncio.ensure_future(work), asyncio.ensure_future(signals.get())
    await asyncio.wait([task, told], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if task.done():
        task.result()
    return task.done()


class _Server(uvicorn.Server):
    """A server that leaves signals to its caller."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ``DgemmaError`` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        why, _, _ = reason(error).partition(" (while attempting")  # Python adds the address
        hint = "End the program that listens there, or choose another --port."
        if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            hint = "Name an address of this machine with --host, such as 127.0.0.1."
        raise DgemmaError(f"cannot listen on {shown(host)}, port {port}: {why}", hint) from None
