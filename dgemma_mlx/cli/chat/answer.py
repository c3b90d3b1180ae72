"""A conversation: send the session to the model, show the answer, and keep it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.attachments import Attachment
from dgemma_mlx.cli.batch import NO_ANSWER
from dgemma_mlx.cli.images import AttachedImage
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.render.plain import print_note, print_tool_calls, print_warnings
from dgemma_mlx.cli.summary import summary
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Event
from dgemma_mlx.sizes import counted

if TYPE_CHECKING:
    from dgemma_mlx.cli.render.live import LiveView, Tokens


class Chat(ABC):
    """A conversation with a model, which is loaded here (``LocalChat``) or behind a server (``RemoteChat``).

    Attributes:
        session: Messages, system prompt and changed settings.
        draw: Whether the canvas is drawn on the terminal.
        attachments: Files and images that go with the next message.
        last: The last answer, or None.
        image_budget: Number of tokens that a picture aims at; None for the checkpoint's own.
    """

    def __init__(self, session: Session, defaults: dict[str, Any], *, draw: bool) -> None:
        """``defaults`` are the settings that ``/set`` has not changed."""
        self.session, self.draw = session, draw
        self.attachments: list[Attachment | AttachedImage] = []
        self.last: Done | None = None
        self.image_budget: int | None = None
        self._defaults = defaults

    def setting(self, name: str) -> Any:
        """Return the value of a setting: what ``/set`` has chosen, or the default."""
        return self.session.settings.get(name, self._defaults[name])

    @abstractmethod
    def check(self) -> None:
        """Raise `DgemmaError` when the settings contradict each other, or cannot be changed here."""

    @abstractmethod
    def value_in_force(self, name: str) -> Any:
        """Return the value that the model takes for a setting; None where that is not one value, or not known."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """Name of the model that answers."""

    @property
    @abstractmethod
    def positions(self) -> int | None:
        """Number of positions that the model supports; None where a server does not tell it."""

    @property
    @abstractmethod
    def used(self) -> int | None:
        """Number of positions that the conversation takes; None where only the server can count them."""

    @property
    def context(self) -> str:
        """How much of the model's positions the conversation takes, in words."""
        used, positions = self.used, self.positions
        if positions is None:
            return "" if used is None else f"{used:,} tokens"
        return ("" if used is None else f"{used:,} of ") + f"{positions:,} tokens of context"

    @abstractmethod
    def models(self) -> list[tuple[str, str]]:
        """Return the name of each model that ``switch`` accepts at once, and a word about it."""

    @abstractmethod
    def switch(self, name: str) -> None:
        """Let another model answer from now on. The conversation stays.

        Raises `DgemmaError` when there is no such model, or it cannot be loaded; then the model stays as well.
        """

    @abstractmethod
    def tokens_of(self, text: str) -> int | None:
        """Return the number of tokens of a text; None where the tokenizer is elsewhere."""

    @property
    @abstractmethod
    def reads_images(self) -> bool:
        """Whether the model reads images, as far as that is known here."""

    @abstractmethod
    def look(self, part: Mapping[str, Any]) -> int | None:
        """Return the number of tokens of an image or video, a part of a message; None where only a server can tell.

        Raises `DgemmaError` when the model reads none, or not this one.
        """

    @abstractmethod
    def _run(self, seed: int | None, cancelled: Callable[[], bool]) -> Done:
        """Generate an answer and show it."""

    def answer(self, *, again: bool = False) -> bool:
        """Answer the session's last message and add the answer to the session. Return False when no answer was kept.

        Ctrl-C stops after the current step: committed canvases stay as an answer that is marked as cancelled. A second
        Ctrl-C raises KeyboardInterrupt immediately. With a fixed seed, answering ``again`` uses the next seed. Raises
        `DgemmaError` when the model gave no answer.
        """
        with interruptible() as cancelled, _keys_unseen():
            done = self._run(self._seed(again), cancelled)
        self.last = done
        print_tool_calls(done)
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
        if self.setting("stats"):
            print_note(self._line_about(done))
        return True

    def _line_about(self, done: Done) -> str:
        """Return the statistics of an answer in one line. Other programs' servers tell only the number of tokens."""
        about = summary(done) if done.statistics.seconds else counted(done.statistics.generated_tokens, "token")
        return ", ".join(part for part in (about, self.context) if part)

    def _seed(self, again: bool) -> int | None:
        """Return the seed of the next answer, or None for a random one."""
        seed: int | None = self.setting("seed")
        if seed is None or not again:
            return seed
        return (seed if self.last is None else self.last.seed) + 1

    def _view(self, tokens: Tokens, end_ids: Collection[int]) -> LiveView | None:
        """Return a view that draws an answer, or None where it is only printed."""
        from dgemma_mlx.cli.render.live import LiveView

        return LiveView(sys.stdout, tokens, end_ids, markdown=self.setting("markdown")) if self.draw else None

    def _show(self, events: Generator[Event, None, None], view: LiveView | None) -> Done:
        """Show an answer while it is written."""
        from dgemma_mlx.cli.render.live import draw
        from dgemma_mlx.cli.render.plain import print_text

        with closing(events):
            return print_text(events, quiet=False) if view is None else draw(events, view)

    def _forget(self, turns: int) -> None:
        """Leave the oldest turns out of what the model sees, and say so."""
        self.session.start = self.session.questions[turns]
        gone = "turn is" if turns == 1 else f"{turns} turns are"
        print(f"the conversation no longer fits: its oldest {gone} forgotten", file=sys.stderr)


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
