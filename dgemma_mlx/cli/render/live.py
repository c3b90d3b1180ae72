"""Draw the canvas on a terminal while it denoises: in place, step by step, dimmer where it is less settled."""

from __future__ import annotations

import codecs
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from dgemma_mlx.cli.render.plain import reading
from dgemma_mlx.cli.render.region import Region
from dgemma_mlx.cli.render.visible import Piece, Row, visible, wrap
from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event

if TYPE_CHECKING:
    from dgemma_mlx.cli.render.markdown import MarkdownText

FRAME_SECONDS = 0.05
DIM = "2"
_STABLE = 0.1  # nats; an unchanged token with a lower entropy is settled
# Entropy limits in nats and the style below each of them. The attributes fit dark and light themes.
_STYLES = ((_STABLE, ""), (0.7, DIM), (2.0, "90"))
_NOISE = "2;90"  # style of a token above all limits
_SHOWN = 20_000  # characters, more than fit on a screen
_NO_BREAK = "\xa0"  # a space at which a row does not break
_ENDS = 0.5  # nats; an end-of-text token with a lower entropy ends the drawn text


class Tokens(Protocol):
    """What is known of tokens: as much of a ``Tokenizer`` as drawing needs.

    Attributes:
        special_ids: Ids of control tokens, by their texts.
    """

    special_ids: dict[str, int]

    def token_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to the text."""


class LiveView:
    """A context manager that draws events on a terminal. Call it with each event.

    Finished lines scroll up above the drawn rows as unbroken text that can be copied. The last, unfinished line is
    among the drawn rows until it is complete. With Markdown, blocks such as a whole list take the place of lines.
    Thinking is drawn dim; when it is over, one line with the number of its words takes its place.
    """

    def __init__(
        self, stream: TextIO, tokenizer: Tokens, eos_ids: Collection[int],
        clock: Callable[[], float] = time.monotonic, *, markdown: bool = False,
    ) -> None:
        """Begin with empty rows.

        ``eos_ids`` are the tokens that end the text of a canvas. ``clock`` returns seconds; until it advances, the
        status line shows no times. ``markdown`` draws committed text as Markdown.
        """
        self._region, self._tokenizer, self._eos_ids, self._clock = Region(stream), tokenizer, eos_ids, clock
        self._open_channel = tokenizer.special_ids.get("<|channel>")
        self._close_channel = tokenizer.special_ids.get("<channel|>")
        self._markdown = markdown
        self._blocks: MarkdownText | None = None  # committed Markdown
        self._tail = ""  # committed text that is not above the drawn rows
        self._thinking = False  # whether the committed tokens end within thinking
        self._thought = ""  # committed thinking that is not complete
        self._previous: tuple[int, ...] = ()
        self._status = "reading the prompt"
        self._began = clock()
        self._drawn = float("-inf")
        self._kept = 0  # number of committed tokens
        self._length = 0  # number of characters of committed text

    def __enter__(self) -> LiveView:
        try:
            self._region.draw(self._rows(self._region.size[0]))
        except BaseException:  # such as Ctrl-C before the block begins
            self._region.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Erase the drawn rows, keep the committed text and leave the cursor at the start of a line."""
        if self._blocks is not None:
            rest = self._blocks.finish(self._region.size[0])
        else:
            rest = self._tail + "\n" if self._tail else ""
        self._region.close(self._fold() + rest)
        self._tail = ""

    def __call__(self, event: Event) -> None:
        """Draw an event."""
        if isinstance(event, Draft):
            self._draft(event)
        elif isinstance(event, Committed):
            self._committed(event)
        elif rest := event.text[self._length :]:  # of a tool call that was cancelled
            self._add(rest)

    def encoded(self, part: Encoded) -> None:
        """Draw how much of the prompt is encoded."""
        self._status = reading(part)
        self._region.draw(self._rows(self._region.size[0]))

    def frame(self, draft: Draft, columns: int) -> list[Row]:
        """Return the rows for a draft: the unfinished line followed by the draft, and the status line."""
        levels = self._levels(draft)
        self._previous = draft.tokens
        seconds = self._clock() - self._began
        settled = self._kept + sum(level < _STABLE for level in levels)
        parts = (
            f"canvas {draft.canvas + 1}" + (", again" if draft.attempt else ""),
            f"step {draft.step}/{draft.max_steps}",
            f"{sum(draft.accepted_mask) / len(draft.accepted_mask):.0%} accepted",
            f"entropy {draft.mean_entropy:.2f}",
            *((f"{settled / seconds:,.0f} settled tokens/s", f"{seconds:.1f} s") if seconds else ()),
        )
        self._status = "  ".join(part.replace(" ", _NO_BREAK) for part in parts)
        return self._rows(columns, self._pieces(draft, levels))

    def _draft(self, draft: Draft) -> None:
        """Draw a draft, unless the last frame is too recent and more steps follow."""
        now = self._clock()
        if draft.finished or now - self._drawn >= FRAME_SECONDS:
            self._drawn = now
            self._region.draw(self.frame(draft, self._region.size[0]))
        self._previous = draft.tokens

    def _committed(self, event: Committed) -> None:
        """Add the text and the thinking of a canvas."""
        self._kept += len(event.tokens)
        self._previous = ()
        for token in event.tokens:
            self._thinking = self._thinks(token, self._thinking)
        self._thought += visible(event.thinking)
        self._add(event.text)

    def _add(self, text: str) -> None:
        """Write what is finished of the answer above the drawn rows, and keep the rest."""
        self._length += len(text)
        columns, _ = self._region.size
        above = "" if self._thinking else self._fold()
        if self._markdown:
            if self._blocks is None:
                from dgemma_mlx.cli.render.markdown import MarkdownText  # slow to import: not before a step

                self._blocks = MarkdownText()
            above += self._blocks.add(visible(text), columns)
            self._tail = self._blocks.pending
        else:
            lines, feed, self._tail = (self._tail + visible(text)).rpartition("\n")
            above += lines + feed
        self._region.draw(self._rows(columns), above=above)

    def _fold(self) -> str:
        """Forget the thinking, which is complete, and return the line that takes its place."""
        words = len(self._thought.split())
        self._thought = ""
        return f"\x1b[{DIM}mthought, {words:,} {'word' if words == 1 else 'words'}\x1b[0m\n" if words else ""

    def _rows(self, columns: int, pieces: Iterable[Piece] = ()) -> list[Row]:
        """Return the unfinished text and the pieces, with the status line below.

        The rows leave the last column free, because terminals differ in what they do after it.
        """
        width = max(columns - 1, 1)
        before = [(self._thought[-_SHOWN:], DIM), (self._tail[-_SHOWN:], "")]
        lines = textwrap.wrap(self._status, width)
        status: list[Row] = [[(line.replace(_NO_BREAK, " "), DIM)] for line in lines]
        rows = wrap([*before, *pieces], width)
        return status if rows == [[]] else rows + status

    def _levels(self, draft: Draft) -> list[float]:
        """Return a level in nats for each token up to the end of the text.

        The level of a token is its entropy, and at least ``_STABLE`` when the token has changed since the last step.
        """
        levels: list[float] = []
        previous = self._previous or (None,) * len(draft.tokens)
        for token, entropy, before in zip(draft.tokens, draft.entropy, previous, strict=True):
            if token in self._eos_ids and entropy < _ENDS:
                break
            levels.append(entropy if token == before else max(entropy, _STABLE))
        return levels

    def _pieces(self, draft: Draft, levels: list[float]) -> Iterator[Piece]:
        """Yield the text of each token in the style of its level."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        thinking = self._thinking
        for token, level in zip(draft.tokens, levels, strict=False):
            thinking = self._thinks(token, thinking)
            style = next((style for limit, style in _STYLES if level < limit), _NOISE)
            text = decoder.decode(self._tokenizer.token_bytes(token))
            yield visible(text), style or (DIM if thinking else "")

    def _thinks(self, token: int, before: bool) -> bool:
        """Return whether the text after the token is thinking. ``before`` says whether the text before it is."""
        if token == self._open_channel:
            return True
        return before and token != self._close_channel


def draw(events: Iterable[Event], view: LiveView) -> Done:
    """Draw a generation and return the last event."""
    with view:
        for event in events:
            view(event)
    assert isinstance(event, Done)
    return event
