"""The list of models, of which there is one. OpenAI's and Anthropic's clients, and others, find their fields in it."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.openai_request import check_model


async def list_models(request: Request) -> Response:
    """List the loaded model."""
    model = _entry(request.app.state.engine)
    pages = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": [model], **pages})


async def retrieve(request: Request) -> Response:
    """Describe the loaded model, whichever name is asked for."""
    engine: Engine = request.app.state.engine
    check_model(engine, request.path_params["id"])
    return JSONResponse(_entry(engine))


def _entry(engine: Engine) -> dict[str, Any]:
    """Return what the list says of the model. The length of the context has no common name."""
    config = engine.text.config.text
    reads = ["text", "image"] if engine.text.config.reads_images else ["text"]
    name, now = engine.settings.model_name, int(time.time())
    context = config.max_position_embeddings
    return {
        "id": name, "object": "model", "created": now, "owned_by": "dgemma-mlx",
        "type": "model", "display_name": name, "created_at": datetime.fromtimestamp(now, timezone.utc).isoformat(),
        "architecture": {"input_modalities": reads, "output_modalities": ["text"]},
        "context_length": context, "max_model_len": context,
        "meta": {"n_ctx": context, "n_ctx_train": context, "n_vocab": config.vocab_size},
    }  # fmt: skip


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", retrieve, methods=["GET"]),
]
