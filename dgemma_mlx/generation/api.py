"""What callers call: ``load`` (see ``generation.load``), ``generate``, ``stream`` and ``generate_batch``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from threading import get_ident
from typing import Any, TypeVar

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Encoded, Event
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import GenerationOptions, Verify
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.generation.request import ask, begin
from dgemma_mlx.generation.runner import Runner
from dgemma_mlx.text.images import Image
from dgemma_mlx.text.messages import Message
from dgemma_mlx.text.tools import Tool, ToolChoice

_T = TypeVar("_T")

DEFAULT_MAX_TOKENS = 1024
_ONE_THREAD = "Read a stream in the thread that began it, or let a dgemma_mlx.Worker own the model."


def generate(
    model: Model, prompt: str | Sequence[Message], *, max_tokens: int = DEFAULT_MAX_TOKENS, seed: int | None = None,
    system: str | None = None, thinking: bool = False, raw: bool = False, prompt_cache: PromptCache | None = None,
    speed: str = DEFAULT_SPEED, verify: Verify = "off", temp: float | None = None,
    generation: GenerationConfig | None = None, trim_canvas: bool = False, prefill_step_size: int | None = None,
    memory_limit: int | None = None, cancelled: Callable[[], bool] | None = None,
    constraint: Constraint | None = None, response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None, tool_choice: ToolChoice | None = None,
    encoded: Callable[[Encoded], None] | None = None, images: Sequence[Image] | None = None,
) -> Done:
    """Generate a whole answer. The arguments are those of ``stream``.

    Example:
        >>> generate(load("demo"), "Sort 7 3 5", seed=1).text
        '3 5 7'
    """
    for event in stream(
        model, prompt, max_tokens=max_tokens, seed=seed, system=system, thinking=thinking, raw=raw,
        prompt_cache=prompt_cache, speed=speed, verify=verify, temp=temp, generation=generation,
        trim_canvas=trim_canvas, prefill_step_size=prefill_step_size, memory_limit=memory_limit, cancelled=cancelled,
        constraint=constraint, response_format=response_format, tools=tools, tool_choice=tool_choice,
        encoded=encoded, images=images,
    ):  # fmt: skip
        if isinstance(event, Done):
            return event
    raise AssertionError("the last event is Done")


def stream(
    model: Model,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    seed: int | None = None,
    system: str | None = None,
    thinking: bool = False,
    raw: bool = False,
    prompt_cache: PromptCache | None = None,
    speed: str = DEFAULT_SPEED,
    verify: Verify = "off",
    temp: float | None = None,
    generation: GenerationConfig | None = None,
    trim_canvas: bool = False,
    prefill_step_size: int | None = None,
    memory_limit: int | None = None,
    cancelled: Callable[[], bool] | None = None,
    constraint: Constraint | None = None,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: ToolChoice | None = None,
    encoded: Callable[[Encoded], None] | None = None,
    images: Sequence[Image] | None = None,
) -> Generator[Event, None, None]:
    """Generate an answer step by step.

    Yield a ``Draft`` for each denoising step, a ``Committed`` for each canvas, and a ``Done`` at the end. To cancel,
    close the generator; or let ``cancelled`` return True, and the answer ends with the ``Done`` of the committed
    canvases.

    Args:
        model: What ``load`` returned.
        prompt: A text, or the messages of a conversation, ``{"role": ..., "content": ...}``, which may hold calls of
            tools and their results; see ``dgemma_mlx.text.messages.conversation``.
        max_tokens: Largest number of tokens to write.
        seed: Seed of the random numbers: one seed gives one text on one machine. None draws one at random;
            ``Done.seed`` reports it.
        system: A system prompt.
        thinking: Whether the model thinks before it answers.
        raw: Whether the prompt is plain text, without the chat template.
        prompt_cache: A cache that is passed from call to call, to encode only what the prompts do not share.
        speed: What it takes to commit a canvas: "reference", "balanced" or "fast"; see ``dgemma_mlx.diffusion.speed``.
        verify: Whether the encoder checks each canvas: "off", "flag" (its doubts are in ``Committed.doubted``) or
            "repair" (the canvas is denoised again from the first doubt).
        temp: A constant temperature. 0 takes the most probable tokens. None keeps the checkpoint's schedule.
        generation: Parameters of the denoising loop, in place of the checkpoint's.
        trim_canvas: Whether the last canvas is only as long as ``max_tokens`` needs. This saves work and
            changes the text.
        prefill_step_size: Number of prompt positions encoded at once. None takes 2,048 (512 without Metal), or fewer
            to stay within the memory limit.
        memory_limit: Bytes that the work may take. None is the device's own limit.
        cancelled: A function that is called between any two steps. Once it returns True, the answer ends.
        constraint: What the answer must match. A thought or calls of tools may stand before it or in its place.
        response_format: A constraint in the form of OpenAI's clients; see ``Constraint.response_format``.
        tools: What the model may call: declarations, or functions with type hints; see
            ``dgemma_mlx.text.tools.declarations``. Every call has arguments that validate against the tool's
            parameters, unless its ``strict`` is false.
        tool_choice: "auto" (or None) leaves it to the model whether it calls a tool. "none" tells it of no tool, and
            what looks like a call is text. With "required" the answer is one or more calls, and with the name of a
            tool, or ``{"type": "function", "function": {"name": ...}}``, calls of this one.
        encoded: A function that is called after each part of the prompt with the number of positions that are encoded,
            to show the progress of a long prompt.
        images: Images that the last user message shows before its text: paths, the bytes of files, or parts of a
            message. Messages may hold images themselves.

    Raises:
        DgemmaError: For an option out of range, options that exclude each other, a conversation without messages, a
            prompt that is too long, images that cannot be read, and a memory limit that is too low. All are raised
            before anything is encoded.
    """
    options = GenerationOptions(
        speed=speed, verify=verify, temp=temp, generation=generation, trim_canvas=trim_canvas,
        prefill_step_size=prefill_step_size, memory_limit=memory_limit, cancelled=cancelled, constraint=constraint,
        response_format=response_format,
    )  # fmt: skip
    asked = ask(model, prompt, options, system, thinking, raw, tools, tool_choice, images)
    runner = begin(model, [asked], [seed], [max_tokens], options, prompt_cache)
    return _events(runner, encoded)


def _events(runner: Runner, encoded: Callable[[Encoded], None] | None) -> Generator[Event, None, None]:
    """Yield the events of a runner with a single answer, computed when they are requested.

    Those about the prompt go to ``encoded`` instead. Raises ``DgemmaError`` when another thread than the first asks for
    an event: MLX's arrays belong to their thread.
    """
    owner, events = get_ident(), runner.events()
    try:
        for _, event in events:
            if isinstance(event, Encoded):
                if encoded is not None:
                    encoded(event)
                continue
            yield event
            if get_ident() != owner:
                raise DgemmaError("a stream was continued by another thread", _ONE_THREAD)
    finally:
        try:
            events.close()
        except RuntimeError:  # from MLX: the owner's work cannot end here; a prompt cache recovers when next used
            if get_ident() == owner:
                raise


def generate_batch(
    model: Model, prompts: Sequence[str | Sequence[Message]], *, max_tokens: int | Sequence[int] = DEFAULT_MAX_TOKENS,
    seeds: Sequence[int | None] | None = None, system: str | Sequence[str | None] | None = None,
    thinking: bool = False, raw: bool = False, speed: str = DEFAULT_SPEED, verify: Verify = "off",
    temp: float | None = None, generation: GenerationConfig | None = None, trim_canvas: bool = False,
    prefill_step_size: int | None = None, memory_limit: int | None = None,
    cancelled: Callable[[], bool] | None = None, constraint: Constraint | None = None,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | Sequence[Sequence[Tool] | None] | None = None,
    tool_choice: ToolChoice | Sequence[ToolChoice | None] | None = None,
    images: Sequence[Sequence[Image] | None] | None = None,
) -> list[Done]:
    """Answer several prompts at once. Each answer is what it would be alone with its seed, except for rounding.

    ``max_tokens``, ``system`` and ``tool_choice`` are one value for all prompts, or one for each; ``seeds`` are one for
    each. ``tools`` is one list for all prompts, or a list with a list of tools, or None, for each. ``images`` is a list
    with a list of images, or None, for each. The other arguments are those of ``stream``. ``trim_canvas`` is refused
    for more than one prompt, because the answers would differ from those that the prompts get alone. Raises
    ``DgemmaError`` for that, for lists of the wrong length, and whenever ``stream`` does.
    """
    if isinstance(prompts, str):
        raise DgemmaError("prompts must be a list of prompts", "One prompt goes to generate().", exit_code=2)
    if not prompts:
        return []
    count = len(prompts)
    if trim_canvas and count > 1:
        raise DgemmaError("trim_canvas takes one prompt at a time", "Leave it out.", exit_code=2)
    limits = max_tokens if isinstance(max_tokens, Sequence) else [max_tokens] * count
    systems = [system] * count if system is None or isinstance(system, str) else system
    seeds = [None] * count if seeds is None else seeds
    choices = tool_choice if isinstance(tool_choice, (list, tuple)) else [tool_choice] * count
    are_lists = bool(tools) and all(own is None or isinstance(own, (list, tuple)) for own in tools or ())
    offers: Sequence[Any] = (tools or ()) if are_lists else [tools] * count
    if not (images is None or isinstance(images, (list, tuple))):
        raise DgemmaError(
            f"images must be a list of lists, not {shown(images)}", 'As in [["cat.png"], None].', exit_code=2
        )
    images = [None] * count if images is None else images
    for name, values in (("max_tokens", limits), ("seeds", seeds), ("system", systems), ("tools", offers),
                         ("tool_choice", choices), ("images", images)):  # fmt: skip
        if len(values) != count:
            raise DgemmaError(
                f"{name} must be one for each of {count} prompts, not {len(values)}", "Use None to leave it out.", 2
            )
    options = GenerationOptions(
        speed=speed, verify=verify, temp=temp, generation=generation, trim_canvas=trim_canvas,
        prefill_step_size=prefill_step_size, memory_limit=memory_limit, cancelled=cancelled, constraint=constraint,
        response_format=response_format,
    )  # fmt: skip
    asked = []
    each_own = zip(prompts, systems, offers, choices, images, strict=True)
    for number, (prompt, own, offer, choice, pictures) in enumerate(each_own, 1):
        try:
            asked.append(ask(model, prompt, options, own, thinking, raw, offer, choice, pictures))
        except DgemmaError as error:
            place = f"prompt {number}: " if count > 1 else ""
            raise DgemmaError(f"{place}{error.message}", error.hint, error.exit_code) from None
    alike: dict[int, list[int]] = {}  # prompts whose answers are held to the same are answered together
    for number, each in enumerate(asked):
        alike.setdefault(id(each.held and each.held.machine), []).append(number)
    runners = [
        (group, begin(model, _at(group, asked), _at(group, seeds), _at(group, limits), options))
        for group in alike.values()
    ]
    done = {
        group[number]: event
        for group, runner in runners for number, event in runner.events() if isinstance(event, Done)
    }  # fmt: skip
    return [done[number] for number in range(count)]


def _at(places: Sequence[int], values: Sequence[_T]) -> list[_T]:
    return [values[place] for place in places]
