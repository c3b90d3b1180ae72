"""One turn of a conversation: send the session to the model and show the answer."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.batch import NO_ANSWER
from dgemma_mlx.cli.chat.session import Session
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.loading import in_bytes
from dgemma_mlx.cli.render.plain import print_warnings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done

if TYPE_CHECKING:
    from dgemma_mlx.checkpoint.config import GenerationConfig
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.prompt_cache import PromptCache

# The settings that are parameters of the denoising loop.
_LOOP = (
    "max_denoising_steps", "entropy_bound", "t_min", "t_max", "confidence_threshold", "stability_threshold",
)  # fmt: skip


class Chat:
    """A conversation with a model.

    Attributes:
        model: The model that answers.
        session: Messages, system prompt and changed settings.
        draw: Whether the canvas is drawn on the terminal.
        attached: Text of files, which goes before the next message.
        last: The last answer, or None.
    """

    def __init__(
        self, model: Model, session: Session, defaults: dict[str, Any], *, draw: bool, cache: PromptCache | None = None
    ) -> None:
        """``defaults`` are the settings that ``/set`` has not changed. ``cache`` holds the prompt encoded so far."""
        from dgemma_mlx.generation.prompt_cache import PromptCache

        self.model, self.session, self.draw = model, session, draw
        self.attached = ""
        self.last: Done | None = None
        self._defaults = defaults
        self._cache = cache or PromptCache()

    def setting(self, name: str) -> Any:
        """Return the value of a setting: what ``/set`` has chosen, or the default."""
        return self.session.settings.get(name, self._defaults[name])

    def generation(self) -> GenerationConfig:
        """Return the parameters of the denoising loop. Raises `DgemmaError` when they contradict each other."""
        return self.model.generation.override(**{name: self.setting(name) for name in _LOOP})

    def answer(self, *, again: bool = False) -> bool:
        """Answer the session's last message and add the answer to the session. Return False when no answer was kept.

        Ctrl-C stops after the current step: committed canvases stay as an answer that is marked as cancelled. A second
        Ctrl-C raises KeyboardInterrupt immediately. With a fixed seed, answering ``again`` uses the next seed. Raises
        `DgemmaError` when the model gave no answer.
        """
        with interruptible() as cancelled, _keys_unseen():
            self._make_room()
            done = self._run(self._seed(again), cancelled)
        self.last = done
        print_warnings(done)
        stopped = done.finish_reason == "cancelled"
        if stopped and not done.text.strip() and not done.tool_calls:
            print("cancelled; nothing was kept", file=sys.stderr)
            return False
        if done.is_blank:
            raise DgemmaError(NO_ANSWER, "Ask again, or word the message differently.")
        calls = [asdict(call) for call in done.tool_calls]
        self.session.add("assistant", done.text, tool_calls=calls, thinking=done.thinking, cancelled=stopped)
        if stopped:
            print("cancelled; the text above was kept", file=sys.stderr)
        elif done.finish_reason == "length":
            print("the answer was cut off: it reached max_tokens or the model's last position, or went on as padding",
                  file=sys.stderr)  # fmt: skip
        return True

    def _seed(self, again: bool) -> int | None:
        """Return the seed of the next answer, or None for a random one."""
        seed: int | None = self.setting("seed")
        if seed is None or not again:
            return seed
        return (seed if self.last is None else self.last.seed) + 1

    def _run(self, seed: int | None, cancelled: Callable[[], bool]) -> Done:
        """Generate an answer and show it."""
        from dgemma_mlx.cli.render.live import draw
        from dgemma_mlx.cli.render.plain import print_text
        from dgemma_mlx.generation.api import stream

        events = stream(
            self.model, self.session.prompt(), max_tokens=self.setting("max_tokens"), seed=seed,
            temp=self.setting("temp"), thinking=self.setting("thinking"), generation=self.generation(),
            speed=self.setting("speed"), verify=self.setting("verify"),
            memory_limit=in_bytes(self.setting("memory_limit")), prompt_cache=self._cache, cancelled=cancelled,
        )  # fmt: skip
        with closing(events):
            if not self.draw:
                return print_text(events, quiet=False)
            return draw(events, self.model.tokenizer, self.model.generation.eos_token_ids)

    def _make_room(self) -> None:
        """Drop the oldest turns when the conversation and an answer no longer fit into the model's positions.

        Raises `DgemmaError` when the last message alone does not fit.
        """
        positions, canvas = self.model.config.text.max_position_embeddings, self.model.config.canvas_length
        answer = max(canvas, min(self.setting("max_tokens"), positions // 4))
        starts = self.session.questions

        def length(turn: int) -> int:
            """Return the number of tokens of the conversation from this turn on."""
            return len(self.model.encode_prompt(self.session.prompt(starts[turn]), thinking=self.setting("thinking")))

        if length(0) <= positions - answer:
            return
        last = len(starts) - 1
        if (alone := length(last)) > positions - canvas:
            raise DgemmaError(
                f"the message is too long: its {alone:,} tokens and a canvas of {canvas} exceed the model's limit of "
                f"{positions:,} positions", "Send less of it. The conversation has not changed.",
            )  # fmt: skip
        dropped = bisect_left(range(last), True, key=lambda turn: length(turn) <= positions - answer)
        del self.session.messages[: starts[dropped]]
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            print(f"the conversation no longer fits: its oldest {turns} forgotten", file=sys.stderr)


@contextmanager
def _keys_unseen() -> Iterator[None]:
    """Do not echo the keys that are typed within the block. The next prompt receives them."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before, unseen = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    unseen[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
