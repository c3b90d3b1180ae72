"""A server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import uvicorn

from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.server.app import make_app
from dgemma_mlx.server.connection import TimedProtocol
from dgemma_mlx.server.settings import ServerSettings

# One client for all requests: making one reads certificates, which takes longer than a short answer.
http = httpx.Client(timeout=60, verify=False)


@contextmanager
def serving(load: Callable[[], Model] = lambda: load("demo"), **settings: Any) -> Iterator[str]:
    """Run a server, and yield its address, such as ``http://127.0.0.1:12345``."""
    chosen = replace(ServerSettings("demo"), **settings)
    config = uvicorn.Config(make_app(load, chosen), port=0, http=TimedProtocol, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
