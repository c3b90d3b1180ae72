"""This program's own endpoints: gaps that are filled, texts that are edited, and answers that are weighed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dgemma_mlx.checkpoint.config import LOOP_FIELDS
from dgemma_mlx.checks import check_seed
from dgemma_mlx.events import Draft
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.infill.choose import PreparedChoices, prepare_choices, weigh
from dgemma_mlx.infill.edit import DEFAULT_CANDIDATES as EDIT_CANDIDATES
from dgemma_mlx.infill.edit import PreparedText, prepare_edit, write_edit
from dgemma_mlx.infill.fill import DEFAULT_CANDIDATES as FILL_CANDIDATES
from dgemma_mlx.infill.fill import Prepared, prepare_fill, write_gaps
from dgemma_mlx.infill.template import MARK, Gap, Part
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.drafts import Drafts
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.images import url_reference
from dgemma_mlx.server.openai_request import check_model
from dgemma_mlx.server.settings import ServerSettings
from dgemma_mlx.server.sse import EventStream, event, unless_gone

P = TypeVar("P")
T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1)]
Candidates = Annotated[int, msgspec.Meta(ge=1, le=64)]  # each is a canvas of its own
Line = Annotated[int, msgspec.Meta(ge=1)]
TYPING_CANDIDATES = 4  # lengths at a time, fewer than by default, where somebody waits while typing


class Denoising(msgspec.Struct, kw_only=True):
    """What the bodies have in common: a system prompt, a seed, and the denoising loop.

    Attributes:
        model: The name of the model, which is served by the loaded one.
        system: A system prompt.
        seed: Seed of the random numbers; null draws one.
        speed: What it takes to commit a canvas: "reference", "balanced" or "fast".
        temp: A constant temperature.
        max_denoising_steps: Largest number of steps per canvas.
        entropy_bound: Bound on the entropy of the tokens that a step accepts.
        t_min: Temperature that the schedule approaches in the last step.
        t_max: Temperature of the first step.
        confidence_threshold: Mean entropy, in nats, below which a stable canvas is final.
        stability_threshold: Number of steps without a change after which a canvas is stable.
    """

    model: str | None = None
    system: str | None = None
    seed: int | None = None
    speed: str | None = None
    temp: float | None = None
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    confidence_threshold: float | None = None
    stability_threshold: int | None = None

    def options(self, text: ModelText, settings: ServerSettings) -> GenerationOptions:
        """Return checked options. Raises ``DgemmaError`` for values out of range."""
        check_seed(self.seed)
        return GenerationOptions(
            speed=settings.speed if self.speed is None else self.speed, temp=self.temp,
            generation=text.generation.override(**{name: getattr(self, name) for name in LOOP_FIELDS}),
            memory_limit=settings.memory_limit,
        )


class GapPart(msgspec.Struct):
    """A gap in a text.

    Attributes:
        size: Number of tokens; null searches for it.
        hint: What belongs there.
    """

    size: Count | None = None
    hint: str = ""


class FillRequest(Denoising):
    """The body of ``/v1/fill``. The attributes are the arguments of ``fill``.

    Attributes:
        text: A text with gaps, or a list of texts and gaps.
        mark: How a gap is written.
        prompt: What to ask the model; null shows it the text with its gaps.
        raw: Whether the model sees only the text around the gaps.
        candidates: Number of lengths to try at a time.
        images: Images that the question shows: data URLs, or addresses where the server fetches them.
        stream: Whether the steps are sent as they are made, as the events of a stream with the field ``dgemma``. They
            are those of the most certain candidate at the time. The last event is the result.
    """

    text: str | list[str | GapPart]
    mark: str = MARK
    prompt: str | None = None
    raw: bool = False
    candidates: Candidates = FILL_CANDIDATES
    images: list[str] | None = None
    stream: bool = False


class EditRequest(Denoising):
    """The body of ``/v1/edit``. The attributes are the arguments of ``edit``.

    Attributes:
        instruction: What to change.
        text: The text.
        lines: First and last line of the part to change, from 1.
        match: A regular expression for the parts to change.
        strength: Share of the text that starts as noise, above 0 and at most 1.
        candidates: Number of lengths to try for each part.
        images: Images that the question shows: data URLs, or addresses where the server fetches them.
    """

    instruction: str
    text: str
    lines: tuple[Line, Line] | None = None
    match: str | None = None
    strength: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    candidates: Candidates = EDIT_CANDIDATES
    images: list[str] | None = None


class ChooseRequest(msgspec.Struct):
    """The body of ``/v1/choose``. The attributes are the arguments of ``choose``.

    Attributes:
        question: What is asked.
        choices: The answers to choose among.
        listed: Whether the question names the choices.
        system: A system prompt.
        raw: Whether the question is plain text, without the chat template.
        seed: Seed of the canvas of noise; null draws one.
        model: The name of the model, which is served by the loaded one.
        images: Images that the question shows: data URLs, or addresses where the server fetches them.
    """

    question: str
    choices: Annotated[list[str], msgspec.Meta(min_length=2, max_length=1024)]
    listed: bool = False
    system: str | None = None
    raw: bool = False
    seed: int | None = None
    model: str | None = None
    images: list[str] | None = None

    def options(self, text: ModelText, settings: ServerSettings) -> GenerationOptions:
        """Return checked options. Raises ``DgemmaError`` for a seed out of range."""
        check_seed(self.seed)
        return GenerationOptions(memory_limit=settings.memory_limit)


async def fill(request: Request) -> Response:
    """Fill the gaps of a text."""
    body = await read_body(request, FillRequest)
    images = await _images(request, body.images)

    def prepare(model: ModelText) -> Prepared:
        text: str | list[Part] = body.text if isinstance(body.text, str) else [
            part if isinstance(part, str) else Gap(part.size, part.hint) for part in body.text
        ]
        return prepare_fill(
            model, text, mark=body.mark, prompt=body.prompt, system=body.system, raw=body.raw,
            candidates=body.candidates, images=images,
        )

    if not body.stream:
        return _answer(request, asdict(await worked(request, body, prepare, write_gaps)))
    engine: Engine = request.app.state.engine
    prepared, options = await _checked(engine, body, prepare)
    return EventStream(_steps(engine, prepared, body.seed, options), engine.settings.ping_seconds)


async def _steps(
    engine: Engine, prepared: Prepared, seed: int | None, options: GenerationOptions
) -> AsyncIterator[bytes]:
    """Yield the steps of gaps that are filled, and the result. A slow reader gets the latest step only."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    latest: list[tuple[Draft, Sequence[bool]]] = []

    def add(draft: Draft, free: Sequence[bool]) -> None:
        latest[:] = [(draft, free)]
        news.set()

    def watch(drafts: Sequence[Draft], free: Sequence[Sequence[bool]]) -> None:  # on the model's thread
        row = min(range(len(drafts)), key=lambda row: sum(drafts[row].entropy) / sum(free[row]))
        loop.call_soon_threadsafe(add, drafts[row], free[row])

    work = asyncio.ensure_future(engine.run(
        lambda model, cancelled: write_gaps(model, prepared, seed, replace(options, cancelled=cancelled), watch=watch)
    ))  # fmt: skip
    work.add_done_callback(lambda _: news.set())
    drafts = Drafts(engine.text)
    try:
        while latest or not work.done():
            await news.wait()
            news.clear()
            while latest:
                yield event({"dgemma": drafts.draft(*latest.pop())})
        yield event({"model": engine.settings.model_name, **asdict(work.result())})
        yield event("[DONE]")
    except ApiError as error:
        yield event(error.openai())
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def edit(request: Request) -> Response:
    """Change a text."""
    body = await read_body(request, EditRequest)
    images = await _images(request, body.images)

    def prepare(model: ModelText) -> Prepared | PreparedText:
        return prepare_edit(
            model, body.instruction, body.text, lines=body.lines, match=body.match, strength=body.strength,
            candidates=body.candidates, system=body.system, images=images,
        )

    return _answer(request, asdict(await worked(request, body, prepare, write_edit)))


async def choose(request: Request) -> Response:
    """Say how probable each of several answers is."""
    body = await read_body(request, ChooseRequest)
    images = await _images(request, body.images)

    def prepare(model: ModelText) -> PreparedChoices:
        return prepare_choices(
            model, body.question, body.choices, listed=body.listed, system=body.system, raw=body.raw, images=images
        )

    found = await worked(request, body, prepare, weigh)
    return _answer(request, {"choices": [asdict(choice) for choice in found]})


async def _images(request: Request, urls: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return images as parts of a message."""
    engine: Engine = request.app.state.engine
    references = [url_reference(url, None, f"images[{number}]") for number, url in enumerate(urls or ())]
    return await engine.images.parts(engine.text, references)


async def worked(
    request: Request, body: Denoising | ChooseRequest, prepare: Callable[[ModelText], P],
    write: Callable[[Model, P, int | None, GenerationOptions], T],
) -> T:
    """Run the two halves of some work, of which only the second needs the network, and return its result.

    Raises ``ApiError`` (400) for what ``prepare`` refuses and (404) for another model's name, if the server's owner
    wants that; and ``GoneError`` when the client goes away.
    """
    engine: Engine = request.app.state.engine
    prepared, options = await _checked(engine, body, prepare)
    work = engine.run(
        lambda model, cancelled: write(model, prepared, body.seed, replace(options, cancelled=cancelled))
    )
    return await unless_gone(request, work)


async def _checked(
    engine: Engine, body: Denoising | ChooseRequest, prepare: Callable[[ModelText], P]
) -> tuple[P, GenerationOptions]:
    """Run the half that needs no network, and return what it has prepared, and the options."""
    check_model(engine, body.model)
    return await engine.read(lambda text: (prepare(text), body.options(text, engine.settings)))


def _answer(request: Request, found: dict[str, Any]) -> Response:
    """Return an answer in JSON, in which a number that is not finite is null."""
    engine: Engine = request.app.state.engine
    content = msgspec.json.encode({"model": engine.settings.model_name, **found})
    return Response(content, media_type="application/json")


ROUTES = [
    Route("/v1/fill", fill, methods=["POST"]),
    Route("/v1/edit", edit, methods=["POST"]),
    Route("/v1/choose", choose, methods=["POST"]),
]
