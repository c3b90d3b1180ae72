"""Filling the gaps of a text: the text around the gaps is pinned, and the model writes the gaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import check_count, check_text
from dgemma_mlx.checks import shown as quoted
from dgemma_mlx.diffusion.edits import Edits, StartCanvas
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Draft
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import PromptIds
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.infill.layout import Layout, Lengths
from dgemma_mlx.infill.search import Candidate, ladder, search
from dgemma_mlx.infill.template import MARK, Gap, Part, parse_gaps, shown
from dgemma_mlx.infill.writer import InfillStatistics, Progress, Writer
from dgemma_mlx.text.images import Image

DEFAULT_CANDIDATES = 8
_PROMPT = (
    f"Fill in the gaps of the following text, each written {MARK}; in brackets behind some stands what belongs there. "
    "Answer with the whole text and nothing else.\n\n"
)


@dataclass(frozen=True)
class Filled:
    """A text whose gaps are filled. ``fill`` and ``edit`` return it.

    Attributes:
        text: The whole text, with the best candidate in the gaps. The text around the gaps is unchanged, byte for byte.
        candidates: All candidates that were tried, the best first.
        texts: The whole text with each of the candidates.
        seed: The seed that gives the same result again.
        statistics: Counts and times.
        doubt: Why the text must not replace what a file holds: the best candidate is empty where text was expected,
            it held incomplete characters, it was still uncertain when its steps were used up, or its score is not
            finite. None if all is well.
    """

    text: str
    candidates: tuple[Candidate, ...]
    texts: tuple[str, ...]
    seed: int
    statistics: InfillStatistics
    doubt: str | None


def fill(
    model: Model, text: str | Sequence[Part], *, mark: str = MARK, prompt: str | None = None,
    system: str | None = None, raw: bool = False, candidates: int = DEFAULT_CANDIDATES, seed: int | None = None,
    speed: str = DEFAULT_SPEED, temp: float | None = None, generation: GenerationConfig | None = None,
    prefill_step_size: int | None = None, memory_limit: int | None = None,
    cancelled: Callable[[], bool] | None = None, progress: Progress | None = None,
    images: Sequence[Image] | None = None,
) -> Filled:
    """Fill the gaps of a text.

    The text before the first gap is encoded as the beginning of the model's turn. The text between and after the gaps
    is pinned in one canvas. The most probable candidate wins; of equally probable ones, the shorter.

    Args:
        model: What ``load`` returned.
        text: A text with gaps, each written as ``mark``, as ``mark:20mark`` for 20 tokens, or as
            ``{{fill: a hint for the model}}``; or a sequence of strings and ``Gap`` objects.
        mark: How a gap is written.
        prompt: What to ask the model. None shows it the text with its gaps.
        system: A system prompt.
        raw: Whether to ask nothing, so that the model sees only the text before and after the gaps.
        candidates: Number of lengths to denoise at a time where a gap's length is not given.
        seed: Seed of the random numbers. None draws one.
        speed: What it takes to commit a canvas, as in ``stream``.
        temp: A constant temperature, as in ``stream``.
        generation: Parameters of the denoising loop, in place of the checkpoint's.
        prefill_step_size: Number of prompt positions encoded at once. None takes 2,048 (512 without Metal), or fewer
            to stay within the memory limit.
        memory_limit: Bytes that the work may take. None is the device's own limit.
        cancelled: A function that is called between any two steps. Once it returns True, the work ends.
        progress: A function that is called after each step with the number of canvases and of steps so far.
        images: Images that the question shows, as in ``stream``.

    Raises:
        DgemmaError: When there is no gap, one canvas does not hold all of them, the model's tokenizer cannot keep the
            text, or an image cannot be read.
        KeyboardInterrupt: After ``cancelled`` has returned True.
    """
    prepared = prepare_fill(
        model, text, mark=mark, prompt=prompt, system=system, raw=raw, candidates=candidates, images=images
    )
    options = GenerationOptions(
        speed=speed, temp=temp, generation=generation, prefill_step_size=prefill_step_size, memory_limit=memory_limit,
        cancelled=cancelled,
    )
    return write_gaps(model, prepared, seed, options, progress)


class Prepared(NamedTuple):
    """Gaps to write: what of ``fill`` and ``edit`` needs no network, checked and encoded.

    Attributes:
        ids: Ids (P) of the prompt and of the text before the first gap.
        layout: Where the other parts of the text go.
        ladders: Lengths to try for each gap.
        candidates: Number of candidates at a time.
        strength: Share of the gaps' original text that starts as noise; None where a gap holds no text yet.
    """

    ids: PromptIds
    layout: Layout
    ladders: list[list[int]]
    candidates: int
    strength: float | None = None


def prepare_fill(
    model: ModelText, text: str | Sequence[Part], *, mark: str = MARK, prompt: str | None = None,
    system: str | None = None, raw: bool = False, candidates: int = DEFAULT_CANDIDATES,
    images: Sequence[Image] | None = None,
) -> Prepared:
    """Check and encode a text with gaps. The arguments are those of ``fill``, whose errors are raised here."""
    parts = alternating(parse_gaps(text, mark) if isinstance(text, str) else text)
    if prompt is not None:
        check_text("the prompt", prompt)
    if raw and (prompt is not None or system is not None):
        raise DgemmaError("raw text takes no prompt and no system prompt", "Leave one of them out.", exit_code=2)
    check_count("candidates", candidates)
    layout = lay_out(model, parts)
    most = layout.room - len(layout.slots) + 1
    ladders = [
        [slot.gap.size] if slot.gap.size else ladder(min(most, slot.gap.most or most), candidates)
        for slot in layout.slots
    ]
    question = "" if raw else _PROMPT + shown(parts) if prompt is None else prompt
    ids = model.encode_prompt(question, system=system, raw=raw, images=images).followed_by(layout.prefix)
    model.check_prompt(ids)
    return Prepared(ids, layout, ladders, candidates)


def alternating(parts: Sequence[Part]) -> list[Part]:
    """Return the same parts as text, gap, text, ..., text.

    Raises ``DgemmaError`` (exit code 2) when there is no gap, and for anything but texts and gaps.
    """
    result: list[Part] = [""]
    if not isinstance(parts, Sequence) or not all(isinstance(part, (str, Gap)) for part in parts):
        raise DgemmaError(
            f"not a text with gaps: {quoted(parts)}", "It is a text, or a list of texts and Gap objects.", exit_code=2
        )
    for part in parts:
        if isinstance(part, Gap):
            result += [part, ""]
        else:
            result[-1] = f"{result[-1]}{part}"
    if len(result) == 1:
        raise DgemmaError("there is no gap in the text", "Write ___ where something is missing.", exit_code=2)
    return result


def lay_out(model: ModelText, parts: Sequence[Part]) -> Layout:
    """Return the layout of a text with gaps in this model's tokens and canvas."""
    end, pad = end_id(model), model.generation.pad_token_id
    return Layout(model.tokenizer, parts, model.config.canvas_length, end, pad)


def end_id(model: ModelText) -> int:
    """Return the id that ends an answer: the end-of-turn id where the checkpoint has it, else an end-of-text id."""
    ends = model.generation.eos_token_ids
    turn = model.tokenizer.special_ids.get("<turn|>")
    return turn if turn is not None and turn in ends else ends[0]


# Called after each step with the drafts (B) of all candidates that are written together, and with which of their
# positions (B, C) are free.
WatchGaps = Callable[[Sequence[Draft], Sequence[Sequence[bool]]], None]

# Denoises a canvas for each of the combinations of lengths, and returns the last step of each.
DenoiseGaps = Callable[[Writer, Layout, list[Lengths]], Sequence["Draft | Written"]]


class Written(NamedTuple):
    """A canvas as a step has left it.

    Attributes:
        tokens: Its ids (C).
        settled_by: The stopping test that it has passed, as in ``Draft``; None while it is uncertain.
    """

    tokens: tuple[int, ...]
    settled_by: str | None


@wired_memory()
def write_gaps(
    model: Model, prepared: Prepared, seed: int | None, options: GenerationOptions, progress: Progress | None = None,
    watch: WatchGaps | None = None, denoise: DenoiseGaps | None = None,
) -> Filled:
    """Write the gaps at the lengths of the ladders, and at some between them.

    With a ``strength``, the canvases start as the gaps' original text, of which that share is noise. ``denoise``
    denoises the canvases in another way than the writer does; without a ``strength`` and a ``watch``.
    """
    layout = prepared.layout
    writer = Writer(model, prepared.ids, prepared.candidates, seed, options, progress)
    if denoise is None:
        denoise = partial(_denoise, prepared.strength, watch)
    evaluate = partial(_evaluate, writer, layout, denoise)
    found = search(prepared.ladders, layout.room, prepared.candidates, evaluate)
    texts = tuple(layout.whole(candidate.texts) for candidate in found)
    doubt = doubt_about(found[0], [slot.gap.original for slot in layout.slots])
    return Filled(texts[0], tuple(found), texts, writer.seed, writer.statistics(), doubt)


def doubt_about(best: Candidate, originals: Sequence[str | None]) -> str | None:
    """Return why the best candidate must not be written to a file, or None; see ``Filled``.

    ``originals`` are the texts that the candidate replaces; None for a gap, which holds no text yet. Only a text that
    was blank before may be blank afterwards.
    """
    if not math.isfinite(best.score):
        return f"the score of the result is {best.score}"
    expected = (original is None or bool(original.strip()) for original in originals)
    if any(wanted and not text.strip() for wanted, text in zip(expected, best.texts, strict=True)):
        return "the model wrote nothing where text was expected"
    if best.cut:
        return "the model wrote bytes that are no character; they were left out"
    return "the model was still uncertain of the result" if best.low_confidence else None


def _denoise(
    strength: float | None, watch: WatchGaps | None, writer: Writer, layout: Layout, wanted: list[Lengths]
) -> list[Draft]:
    """Denoise a canvas for each of the combinations of lengths."""
    length = layout.length(wanted)
    pins = layout.pins(wanted, length)
    start = None if strength is None else noised_start(writer, pins.ids, strength)
    edits = Edits(pins, layout.barred(wanted, length, writer.vocab_size), start)
    free = [free for _, free in layout.rows(wanted, length)]
    return writer.write(length, len(wanted), edits, watch and (lambda drafts: watch(drafts, free)))


def _evaluate(writer: Writer, layout: Layout, denoise: DenoiseGaps, wanted: list[Lengths]) -> list[Candidate]:
    """Denoise a canvas for each of the combinations of lengths, and score the results."""
    length = layout.length(wanted)
    drafts = denoise(writer, layout, wanted)
    scores = writer.scores([draft.tokens for draft in drafts], [layout.used(lengths, length) for lengths in wanted])
    found = []
    for lengths, draft, score in zip(wanted, drafts, scores, strict=True):
        texts, cut = layout.texts(draft.tokens, lengths)
        found.append(Candidate(lengths, texts, score, draft.settled_by is None, draft.tokens, cut))
    return found


def noised_start(writer: Writer, ids: mx.array, strength: float) -> StartCanvas:
    """Return the canvases (B, C) with a share of ``strength`` random ids, and the step to start from.

    The same share of the denoising steps remains to be run.
    """
    noise = writer.noise(ids.shape[0]).fork()
    replaced = noise.uniform(ids.shape[1]) < strength
    canvas = mx.where(replaced, noise.canvas(ids.shape[1], writer.vocab_size), ids)
    return StartCanvas(canvas, 1 + min(int((1 - strength) * writer.max_steps), writer.max_steps - 1))
