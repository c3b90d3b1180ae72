"""OpenAI's completions and Mistral's: a text goes on, or the gap before a suffix is filled."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.infill.fill import Filled, Prepared, prepare_fill, write_gaps
from dgemma_mlx.infill.template import Gap
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.openai_request import (
    CommonRequest,
    ask_all,
    begin,
    cancelling,
    finish_reason,
    until_done,
    updates,
    usage,
)
from dgemma_mlx.server.own import TYPING_CANDIDATES
from dgemma_mlx.server.question import Ended, Question, Written
from dgemma_mlx.server.sse import EventStream, event, unless_gone
from dgemma_mlx.server.stops import cut

_MOST_PROMPTS = 16
# How StarCoder, and editors that do not know a model, write the text before and after a gap.
_FIM = re.compile(r"(.*)<fim_prefix>(.*)<fim_suffix>(.*)<fim_middle>\s*", re.DOTALL)


class CompletionRequest(CommonRequest, kw_only=True):
    """The body of a request of both protocols.

    Attributes:
        prompt: The text to go on with, or several; it may hold a gap in StarCoder's spelling.
        suffix: The text after the gap. Without it, nothing comes after.
        echo: Whether the result begins with the prompt.
        logprobs: Refused.
        random_seed: Mistral's name of ``seed``.
    """

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    random_seed: int | None = None


class Piece(NamedTuple):
    """A part of a choice.

    Attributes:
        number: Index of the choice.
        text: What is written.
        reason: Why the choice has ended; None before its end.
        counts: Numbers of tokens of its prompt, of these that were encoded before, and of its text, at its end.
    """

    number: int
    text: str
    reason: str | None = None
    counts: tuple[int, int, int] | None = None


class Form(NamedTuple):
    """How a protocol writes its objects.

    Attributes:
        prefix: The beginning of their ids.
        whole: The name of an answer in one piece.
        chunk: The name of a piece.
        told: Makes the part of a choice that holds its text, given the text, and whether it is a piece.
    """

    prefix: str
    whole: str
    chunk: str
    told: Callable[[str, bool], dict[str, Any]]

    def choice(self, piece: Piece, *, is_chunk: bool) -> dict[str, Any]:
        """Return a choice, or a piece of one."""
        told = self.told(piece.text, is_chunk)
        return {"index": piece.number, **told, "logprobs": None, "finish_reason": piece.reason}


_COMPLETION = Form("cmpl", "text_completion", "text_completion", lambda text, is_chunk: {"text": text})
_FIM_COMPLETION = Form(
    "fim", "chat.completion", "chat.completion.chunk",
    lambda text, is_chunk: {"delta" if is_chunk else "message": {"role": "assistant", "content": text}},
)  # fmt: skip


async def complete(request: Request) -> Response:
    """Go on with a text, or fill the gap before the suffix, as OpenAI has it."""
    return await _complete(request, _COMPLETION)


async def fill_in_the_middle(request: Request) -> Response:
    """Do the same as Mistral has it."""
    return await _complete(request, _FIM_COMPLETION)


async def _complete(request: Request, form: Form) -> Response:
    """Answer a request in the form of its protocol."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, CompletionRequest)
    if body.logprobs is not None and body.logprobs is not False:
        raise ApiError(400, "there are no log-probabilities: a canvas has none", param="logprobs")
    body.seed = body.random_seed if body.seed is None else body.seed
    head, prompts = begin(request, body, form.prefix), _prompts(body)
    gaps = [_gap(prompt, body.suffix) for prompt in prompts]
    if all(gap is None for gap in gaps):
        pieces = await _continued(engine, body, prompts)
    else:
        pieces = await _filled(engine, body, [gap or (prompt, "") for gap, prompt in zip(gaps, prompts, strict=True)])
    echoed = [prompt if body.echo else "" for prompt in prompts for _ in body.seeds()]
    if body.stream:
        chunks = _chunks(pieces, form, {**head, "object": form.chunk}, echoed, body)
        return EventStream(until_done(chunks), engine.settings.ping_seconds)
    whole = await unless_gone(request, _joined(pieces, echoed))
    choices = [form.choice(piece, is_chunk=False) for piece in whole]
    return JSONResponse({**head, "object": form.whole, "choices": choices, "usage": _usage(whole, body.n or 1)})


def _prompts(body: CompletionRequest) -> list[str]:
    """Return the prompts."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ApiError(400, "a prompt is a text; ids of tokens are not read", param="prompt")
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise ApiError(400, f"there are {len(prompts)} prompts; from 1 to {_MOST_PROMPTS} are read", param="prompt")
    return prompts


def _gap(prompt: str, suffix: str | None) -> tuple[str, str] | None:
    """Return the text before and after the gap, or None when there is none."""
    if suffix:
        return prompt, suffix
    found = _FIM.fullmatch(prompt)
    return None if found is None else (found[1] + found[2], found[3])


async def _continued(
    engine: Engine, body: CompletionRequest, prompts: list[str]
) -> AsyncGenerator[Piece, None]:
    """Ask for the continuations of the prompts, and return their pieces."""
    sampling = body.sampling(body.max_tokens)
    answerings = await ask_all(
        engine,
        [Question(prompt, raw=True, seed=seed, **sampling) for prompt, seed in product(prompts, body.seeds())],
    )

    async def pieces() -> AsyncGenerator[Piece, None]:
        with cancelling(answerings):
            async for index, update in updates(answerings):
                if isinstance(update, Written):
                    yield Piece(index, update.text)
                elif isinstance(update, Ended):
                    counts = update.done.statistics
                    tokens = counts.prompt_tokens, counts.cached_tokens, counts.generated_tokens
                    yield Piece(index, "", finish_reason(update), tokens)

    return pieces()


async def _filled(
    engine: Engine, body: CompletionRequest, gaps: list[tuple[str, str]]
) -> AsyncGenerator[Piece, None]:
    """Check the texts with gaps, and return the pieces that fill them: each one in one piece."""
    sampling = body.sampling(body.max_tokens)
    gap = Gap(most=sampling["max_tokens"])

    def prepare(text: ModelText) -> tuple[list[Prepared], GenerationOptions]:
        options = GenerationOptions(
            speed=body.speed or engine.settings.speed, temp=sampling["temp"],
            memory_limit=engine.settings.memory_limit,
        )  # fmt: skip
        found = [prepare_fill(text, [before, gap, after], candidates=TYPING_CANDIDATES) for before, after in gaps]
        return found, options

    prepared, options = await engine.read(prepare)

    def work(gap: Prepared, seed: int | None) -> Callable[[Model, Callable[[], bool]], Filled]:
        return lambda model, cancelled: write_gaps(model, gap, seed, replace(options, cancelled=cancelled))

    async def pieces() -> AsyncGenerator[Piece, None]:
        for index, (gap, seed) in enumerate(product(prepared, body.seeds())):
            filled = await engine.run(work(gap, seed))
            best = filled.candidates[0]
            text, _ = cut(best.texts[0], sampling["stop"])
            yield Piece(index, text, "stop", (filled.statistics.prompt_tokens, 0, best.lengths[0]))

    return pieces()


async def _joined(pieces: AsyncGenerator[Piece, None], echoed: list[str]) -> list[Piece]:
    """Return the whole choices."""
    found = [Piece(index, text) for index, text in enumerate(echoed)]
    async with aclosing(pieces):
        async for index, text, reason, counts in pieces:
            found[index] = Piece(index, found[index].text + text, reason, counts)
    return found


async def _chunks(
    pieces: AsyncGenerator[Piece, None], form: Form, head: dict[str, Any], echoed: list[str], body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of the choices."""
    ended = []
    async with aclosing(pieces):
        for index, text in enumerate(echoed):
            if text:
                yield event({**head, "choices": [form.choice(Piece(index, text), is_chunk=True)]})
        async for piece in pieces:
            if piece.text or piece.reason is not None:
                yield event({**head, "choices": [form.choice(piece, is_chunk=True)]})
            if piece.reason is not None:
                ended.append(piece)
    if body.wants_usage:
        yield event({**head, "choices": [], "usage": _usage(ended, body.n or 1)})


def _usage(ended: Sequence[Piece], choices: int) -> dict[str, Any]:
    """Return the counts of a request. A prompt counts once, however many choices it has."""
    counts = [(*piece.counts, piece.number % choices == 0) for piece in ended if piece.counts is not None]
    prompt = sum(each[0] for each in counts if each[3])
    return usage(prompt, sum(each[1] for each in counts if each[3]), sum(each[2] for each in counts))


ROUTES = [
    Route("/v1/completions", complete, methods=["POST"]),
    Route("/v1/fim/completions", fill_in_the_middle, methods=["POST"]),
]
