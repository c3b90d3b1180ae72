"""The web application: paths, and errors in each protocol's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.prompt_cache_folder import PromptCacheFolder
from dgemma_mlx.server import (
    anthropic,
    llamacpp,
    openai_chat,
    openai_completions,
    openai_models,
    openapi,
    own,
    page,
    responses,
    status,
)
from dgemma_mlx.server.accounting import Accounting
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError, error_response
from dgemma_mlx.server.machines import Machines
from dgemma_mlx.server.metrics import Metrics
from dgemma_mlx.server.remarks import Remarks
from dgemma_mlx.server.security import Guard, check_settings
from dgemma_mlx.server.settings import ServerSettings
from dgemma_mlx.server.sse import GoneError

ROUTES = [
    *anthropic.ROUTES, *llamacpp.ROUTES, *openai_chat.ROUTES, *openai_completions.ROUTES, *openai_models.ROUTES,
    *openapi.ROUTES, *own.ROUTES, *page.ROUTES, *responses.ROUTES, *status.ROUTES,
]  # each protocol's file lists its own

WITHOUT_MODEL = {route.path for route in (*openapi.ROUTES, *page.ROUTES, *status.ROUTES)}


def make_app(load: Callable[[], Model], settings: ServerSettings, machines: Machines | None = None) -> Starlette:
    """Return the application. ``load`` is called on the thread of the model when the application starts.

    ``machines`` are others that answer as well.

    Raises ``DgemmaError`` (exit code 2) for settings that are not safe, and (1) for a folder of prompt caches that
    cannot be used.
    """
    check_settings(settings)
    metrics = Metrics()
    folder = None  # opened here, because an error when the application starts would be a traceback
    if settings.prompt_cache_dir is not None:
        folder = PromptCacheFolder(settings.prompt_cache_dir, settings.prompt_caches, settings.log)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.engine, app.state.remarks = Engine(load, settings, metrics, folder, machines), Remarks(settings.log)
        try:
            app.state.engine.start()
            yield
        finally:
            await app.state.engine.close()

    return Starlette(
        routes=ROUTES, lifespan=lifespan,
        middleware=[
            Middleware(Accounting, settings=settings, metrics=metrics), Middleware(Guard, settings=settings),
            Middleware(AfterLoading),
        ],
        exception_handlers={ApiError: show_error, HTTPException: show_http_error, GoneError: show_gone,
                            ClientDisconnect: show_gone, Exception: show_fault},
    )  # fmt: skip


class AfterLoading:
    """Lets requests wait until the model has been loaded once, except those that need none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in WITHOUT_MODEL:
            engine: Engine = scope["app"].state.engine
            try:
                await engine.ready()
            except DgemmaError as error:
                response = await show_error(Request(scope), ApiError(503, error.message, "server_error"))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def show_error(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    assert isinstance(error, ApiError)
    return error_response(request, error)


async def show_http_error(request: Request, error: Exception) -> Response:
    """Answer with one of Starlette's errors, such as an unknown path."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}.get(
        error.status_code, error.detail
    )
    return await show_error(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def show_fault(request: Request, error: Exception) -> Response:
    """Answer with an error of this program, which the server then reports with its traceback."""
    return error_response(request, ApiError.failed(error))


async def show_gone(request: Request, error: Exception) -> Response:
    """Answer a client that has gone away, which nobody reads."""
    return Response(status_code=499)
