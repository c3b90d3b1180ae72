"""The endpoints of llama.cpp's server that editors and tools use: infill, tokenize, detokenize, props."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.generation.model import ModelText
from dgemma_mlx.infill.fill import Filled, Prepared, prepare_fill, write_gaps
from dgemma_mlx.infill.template import Gap, Part
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.own import TYPING_CANDIDATES, Denoising, worked
from dgemma_mlx.server.sse import EventStream, event
from dgemma_mlx.server.stops import cut, stop_texts
from dgemma_mlx.version import __version__


class Extra(msgspec.Struct):
    """Text from elsewhere in the project.

    Attributes:
        text: The text.
        filename: Where it is from.
    """

    text: str
    filename: str = ""


class InfillRequest(Denoising):
    """The body of ``/infill``. Fields of sampling other than ``seed`` are without effect.

    Attributes:
        input_prefix: Text before the gap.
        input_suffix: Text after the gap.
        input_extra: Text from elsewhere, for the model to know.
        prompt: Text between ``input_prefix`` and the gap, such as the beginning of the current line.
        n_predict: Largest number of tokens to write; a negative one is no limit, and 0 writes nothing.
        stop: Texts before which the result ends.
        stream: Whether the result comes as server-sent events.
        response_fields: Paths of the fields to answer with, such as ``timings/predicted_n``; null answers with all.
    """

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[Extra] = msgspec.field(default_factory=list)
    prompt: str = ""
    n_predict: int = -1
    stop: list[str] | str | None = None
    stream: bool = False
    response_fields: list[str] | None = None


class TokenizeRequest(msgspec.Struct):
    """The body of ``/tokenize``.

    Attributes:
        content: The text.
        add_special: Whether a beginning-of-text id goes before it.
        parse_special: Whether control tokens in the text are read as such.
        with_pieces: Whether the text of each token is answered as well.
    """

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(msgspec.Struct):
    """The body of ``/detokenize``.

    Attributes:
        tokens: Ids.
    """

    tokens: list[Annotated[int, msgspec.Meta(ge=0)]]


async def infill(request: Request) -> Response:
    """Fill the gap between two texts."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, InfillRequest)
    if body.stream:
        return EventStream(_events(request, body), engine.settings.ping_seconds)
    return JSONResponse(_picked(await _infill(request, body), body.response_fields))


async def _events(request: Request, body: InfillRequest) -> AsyncIterator[bytes]:
    """Yield the result as llama.cpp streams it: what is written, and the end."""
    try:
        found = await _infill(request, body)
    except ApiError as error:
        yield event(error.openai())
        return
    part = {"index": 0, "content": found["content"], "tokens": [], "stop": False}
    yield event(_picked(part, body.response_fields))
    yield event(_picked({**found, "content": ""}, body.response_fields))


async def _infill(request: Request, body: InfillRequest) -> dict[str, Any]:
    """Return the answer to ``/infill``."""
    engine: Engine = request.app.state.engine
    if body.n_predict == 0:  # editors ask so to have a prompt read before it is needed
        return _result(engine.settings.model_name, "", None, 0, "limit", "")
    stops = stop_texts(body.stop)

    def prepare(model: ModelText) -> Prepared:
        gap = Gap(most=body.n_predict if body.n_predict > 0 else None)
        parts: list[Part] = [body.input_prefix + body.prompt, gap, body.input_suffix]
        return prepare_fill(model, parts, system=_system(body), candidates=TYPING_CANDIDATES)

    if body.seed is not None and body.seed < 0:  # llama.cpp's spelling of a random one
        body.seed = None
    filled = await worked(request, body, prepare, write_gaps)
    best = filled.candidates[0]
    text, stop = cut(best.texts[0], stops)
    kind = "eos" if stop is None else "word"
    return _result(engine.settings.model_name, text, filled, best.lengths[0], kind, stop or "")


def _system(body: InfillRequest) -> str | None:
    """Return the system prompt: what the request says, and the texts from elsewhere."""
    extra = [f"{part.filename}\n{part.text}".strip() for part in body.input_extra if part.text.strip()]
    parts = ([body.system] if body.system else []) + (["From other files of the project:", *extra] if extra else [])
    return "\n\n".join(parts) or None


def _result(
    model: str, text: str, filled: Filled | None, tokens: int, stop_type: str, stopping_word: str
) -> dict[str, Any]:
    """Return an answer with llama.cpp's fields. Times are in milliseconds."""
    prompt = 0 if filled is None else filled.statistics.prompt_tokens
    milliseconds = 0.0 if filled is None else 1000 * filled.statistics.seconds
    per_token, per_second = (milliseconds / tokens, 1000 * tokens / milliseconds) if tokens and milliseconds else (0, 0)
    return {
        "index": 0, "content": text, "tokens": [], "id_slot": 0, "stop": True, "model": model,
        "tokens_predicted": tokens, "tokens_evaluated": prompt, "tokens_cached": 0, "truncated": False,
        "has_new_line": "\n" in text, "stop_type": stop_type, "stopping_word": stopping_word,
        "timings": {
            "prompt_n": prompt, "prompt_ms": 0.0, "prompt_per_token_ms": 0.0, "prompt_per_second": 0.0,
            "predicted_n": tokens, "predicted_ms": milliseconds, "predicted_per_token_ms": per_token,
            "predicted_per_second": per_second,
        },
    }  # fmt: skip


def _picked(found: dict[str, Any], paths: Sequence[str] | None) -> dict[str, Any]:
    """Return the values at the paths, each under its path; without paths, everything."""
    if not paths:
        return found
    picked: dict[str, Any] = {}
    for path in paths:
        value: Any = found
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            picked[path] = value
    return picked


async def tokenize(request: Request) -> Response:
    """Return the ids of a text."""
    body = await read_body(request, TokenizeRequest)

    def ids_of(model: ModelText) -> list[Any]:
        tokenizer = model.tokenizer
        ids = tokenizer.encode_control(body.content) if body.parse_special else tokenizer.encode(body.content)
        if body.add_special and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
        return [{"id": id, "piece": _piece(model, id)} for id in ids] if body.with_pieces else ids

    engine: Engine = request.app.state.engine
    return JSONResponse({"tokens": await engine.read(ids_of)})


def _piece(model: ModelText, id: int) -> str | list[int]:
    """Return the text of a token, or its bytes where they are no text by themselves."""
    data = model.tokenizer.token_bytes(id, keep_special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: Request) -> Response:
    """Return the text of ids, with control tokens."""
    body = await read_body(request, DetokenizeRequest)
    engine: Engine = request.app.state.engine
    size = engine.text.tokenizer.vocab_size
    if unknown := next((id for id in body.tokens if id >= size), None):
        raise ApiError(400, f"there is no token {unknown:,}: the vocabulary has {size:,}", param="tokens")
    content = await engine.read(lambda model: model.tokenizer.decode(body.tokens, keep_special=True))
    return JSONResponse({"content": content})


async def props(request: Request) -> Response:
    """Say what is served. Changing it is refused, as llama.cpp does without its option for it."""
    if request.method == "POST":
        raise ApiError(501, "properties are chosen when the server is started", "not_supported_error")
    engine: Engine = request.app.state.engine
    context = engine.text.config.text.max_position_embeddings
    template = await engine.read(lambda model: model.template.templates["default"])
    return JSONResponse({
        "default_generation_settings": {"id": 0, "n_ctx": context, "speculative": False, "is_processing": False},
        "total_slots": engine.settings.max_queue, "model_alias": engine.settings.model_name,
        "model_path": engine.settings.model_name, "chat_template": template,
        "modalities": {"vision": engine.text.config.reads_images, "audio": False},
        "build_info": f"dgemma-mlx {__version__}",
    })  # fmt: skip


ROUTES = [
    Route("/infill", infill, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/props", props, methods=["GET", "POST"]),
]
