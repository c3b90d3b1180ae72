"""Listening: the application on a port, until a signal ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvicorn

from dgemma_mlx.generation.model import Model
from dgemma_mlx.server.app import make_app
from dgemma_mlx.server.connection import TimedProtocol
from dgemma_mlx.server.settings import ServerSettings


def listen(load: Callable[[], Model], settings: ServerSettings, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM. ``ready`` is called with the port once requests are answered."""
    config = uvicorn.Config(
        make_app(load, settings), host=settings.host, port=settings.port, http=TimedProtocol, ws="none",
        log_level="warning", access_log=False, proxy_headers=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(serve())
