"""How the server is: ``/health`` for programs that wait for it, and ``/metrics`` for those that watch it."""

from __future__ import annotations

import mlx.core as mx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.server.engine import Engine
from dgemma_mlx.version import __version__


async def health(request: Request) -> Response:
    """Say that the server is alive, whatever the model is doing."""
    engine: Engine = request.app.state.engine
    return JSONResponse({
        "status": "ok" if engine.is_ready else "loading", "model": engine.settings.model_name,
        "version": __version__, "loaded": engine.is_loaded,
        "running": engine.admission.running, "waiting": engine.admission.waiting,
        "uptime": round(engine.metrics.uptime(), 3),
    })  # fmt: skip


async def metrics(request: Request) -> Response:
    """Return all counts for Prometheus."""
    engine: Engine = request.app.state.engine
    gauges = {
        "model_loaded": int(engine.is_loaded), "requests_running": engine.admission.running,
        "requests_waiting": engine.admission.waiting, "prompt_caches": engine.caches.kept,
        "prompt_cache_bytes": engine.caches.nbytes, "memory_active_bytes": mx.get_active_memory(),
        "memory_cache_bytes": mx.get_cache_memory(), "uptime_seconds": engine.metrics.uptime(),
    }  # fmt: skip
    text = engine.metrics.text(gauges, model=engine.settings.model_name, version=__version__)
    return Response(text, media_type="text/plain; version=0.0.4")


ROUTES = [Route("/health", health), Route("/metrics", metrics)]
