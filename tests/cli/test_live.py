"""The live canvas: the screen while it is drawn, and afterwards."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from dgemma_mlx.cli.render.live import LiveView
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event
from dgemma_mlx.text import Tokenizer
from tests.cli.conftest import HUGE
from tests.cli.synthetic import EOS, EOS_IDS, answer, draft
from tests.cli.terminal import ScreenStream, laid_out

SIZES = [(80, 24), (40, 10)]
POEM = "Title\n\nThe first line of some, and\nthe second one.\n" + "A line that no terminal is wide for. " * 8 + "\n.\n"
TEXTS = {
    "a word": "Yes.",
    "nothing": "",
    "lines": POEM,
    "ends with line feeds": "a\n\n\n",
    "one long line": "no line feed at all in this one " * 30,
    "exactly as wide": "x" * 80 + "\n" + "y" * 40 + "\nz",
    "wide": "北京和東京都是城市。" * 12 + "\n🙂🙂 done",
    "combining": "e\u0301a\u0308 नमस्ते שָׁלוֹם " * 10,
    "right to left": "שלום עולם\nالسلام عليكم and back\n",
    "tabs": "a\tb\tc\n\tindented\n" + "\tx" * 20,
    "markdown": "# Title\n\n* **bold** and [a link](http://x.y)\n\n| a | b |\n|---|---|\n```py\nx[0] = 1\n```\n",
    "brackets": "[bold red]not red[/bold red] [/] [link=file:///etc]x[/link] {0} %s \\n",
}
SEQUENCES = [
    "\x1b[2J", "\x1b[H", "\x1b[?1049h", "\x1b[?25l", "\x1b]0;title\x07", "\x1b]2;title\x1b\\", "\x1b[31m", "\x1b[8m",
    "\x1b]52;c;aGk=\x07", "\x1bP1$r\x1b\\", "\x1b_Gf=100\x1b\\", "\x1bc", "\x1b#8", "\x1b(0", "\x0e", "\x0f", "\x07",
    "\x08\x08\x08", "\r", "\x0b", "\x0c", "\x00", "\x7f", "\x9b31m", "\x9d0;title\x9c", "\x90q\x9c", "\x85", "\x8d",
    "\x1b[?1000h", "\x1b[?2004h", "\x1b[5;10r", "\x1b[6n", "\x1b[c", "\x1b[1000A", "\x1bM", "\x1b7\x1b8", "\x05",
    "\u202e", "\u2066", "\u2069", "\u2028", "\u2029", "\u200b", "\u200d", "\ufeff", "\ufe0f", "\u200f", "\ufff9",
    "\U000e0041", "\u00ad", "\ufffe", "\U0010ffff",
]  # fmt: skip
OTHER = [
    "你好", "🙂", "👩‍👩‍👧", "🇩🇪", "❤️", "a" + "\u0301" * 60, "שלום", "[red]", "**b**", "\t", "\n", "word ",
    " ", "ﷺ", "\U00012031",
]  # fmt: skip
ALLOWED = re.compile(r"\x1b\[(?:2|90|2;90|0)m|\x1b\[\d+A|\x1b\[[KCJ]|\r|\n|\t|[^\x00-\x1f\x7f-\x9f]")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def show(
    stream: ScreenStream, tokenizer: Tokenizer, events: Iterable[Event], clock: Clock | None = None
) -> Iterator[Event]:
    """Draw the events, more than a frame time apart, and yield each of them after it is drawn."""
    clock = clock or Clock()
    with LiveView(stream, tokenizer, EOS_IDS, clock) as view:  # type: ignore[arg-type]
        for event in events:
            clock.now += 0.1
            view(event)
            yield event


def run(stream: ScreenStream, tokenizer: Tokenizer, ids: Iterable[int], seed: int = 0) -> str:
    """Draw an answer whose drafts hold any tokens, and return its text."""
    *_, done = show(stream, tokenizer, answer(tokenizer, ids, seed, noise=tokenizer.vocab_size))
    assert isinstance(done, Done)
    return done.text


def assert_shows(stream: ScreenStream, text: str) -> None:
    """Check that the terminal shows this text and a new line, as if nothing else had been printed."""
    wanted = laid_out(text if not text or text.endswith("\n") else text + "\n", stream.screen.columns, 24)
    assert stream.screen.text == wanted.text
    assert stream.screen.all_rows == wanted.all_rows
    assert stream.screen.is_sane


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TEXTS)
def test_the_screen_shows_the_answer(tokenizer: Tokenizer, name: str, size: tuple[int, int]) -> None:
    stream = ScreenStream(*size)
    assert run(stream, tokenizer, tokenizer.encode(TEXTS[name])) == TEXTS[name]
    assert_shows(stream, TEXTS[name])


@pytest.mark.parametrize("seed", range(12))
def test_the_screen_shows_the_answer_when_the_size_changes_while_it_draws(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice([TEXTS[name] for name in ("lines", "one long line", "wide", "combining", "brackets")])
    stream = ScreenStream(*rng.choice(SIZES))
    stream.resize(stream.screen.columns, 70)
    for _ in show(stream, tokenizer, answer(tokenizer, tokenizer.encode(text), seed)):
        if rng.random() < 0.5:
            stream.resize(rng.randint(30, 120), rng.randint(70, 90))
    assert_shows(stream, text)


@pytest.mark.parametrize("seed", range(8))
def test_no_line_of_the_answer_is_lost_however_small_the_terminal_becomes(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    lines = [f"{number}. {rng.choice(['short', 'a little longer', '北京 ' * 20])}" for number in range(30)]
    stream = ScreenStream()
    for _ in show(stream, tokenizer, answer(tokenizer, tokenizer.encode("\n".join(lines)), seed)):
        if rng.random() < 0.5:
            stream.resize(rng.randint(2, 100), rng.randint(1, 40))
    assert stream.screen.is_sane
    position = 0
    for line in lines:
        position = stream.screen.text.index(line.rstrip(), position) + len(line)


@pytest.mark.parametrize("size", [(80, 24), (40, 24)])
def test_only_whole_lines_are_above_what_is_drawn(tokenizer: Tokenizer, size: tuple[int, int]) -> None:
    stream = ScreenStream(*size)
    *lines, rest = [""]
    for event in show(stream, tokenizer, answer(tokenizer, tokenizer.encode(POEM))):
        if isinstance(event, Committed):
            *new, rest = (rest + event.text).split("\n")
            lines += new
        elif isinstance(event, Draft):  # the unfinished line is drawn with it
            assert stream.output.rpartition("\x1b[J\r")[2].startswith(rest[: size[0] - 1].rstrip())
        assert stream.screen.text.split("\n")[: len(lines)] == [line.rstrip() for line in lines]
    assert "\n".join([*lines, rest]) == POEM


def test_whoever_stops_it_keeps_the_committed_text(tokenizer: Tokenizer) -> None:
    events = list(answer(tokenizer, tokenizer.encode(POEM)))
    for count in range(1, len(events)):
        stream = ScreenStream(40, 10)
        drawing = show(stream, tokenizer, events[:count])
        for _ in range(count):
            next(drawing)
        stream.write("^C")
        drawing.close()  # type: ignore[attr-defined]
        assert_shows(stream, "".join(event.text for event in events[:count] if isinstance(event, Committed)))


def test_what_only_done_holds_is_shown(tokenizer: Tokenizer) -> None:
    """An answer that is cancelled half-way through a tool call ends with what was written of it."""
    *before, done = answer(tokenizer, tokenizer.encode(POEM + "Well."))
    assert isinstance(done, Done)
    stream = ScreenStream(40, 10)
    text = POEM + "Well.call:f{a:\n"
    list(show(stream, tokenizer, [*before, replace(done, text=text)]))
    assert_shows(stream, text)


def hostile(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of an answer that must not reach a terminal unchanged."""
    huge = tokenizer.encode(HUGE)
    ids: list[int] = []
    for _ in range(rng.randint(1, 25)):
        kind = rng.randrange(5)
        if kind == 0:
            ids += tokenizer.encode(rng.choice(OTHER))
        elif kind == 1:
            ids += [n for n in range(tokenizer.vocab_size) if n not in EOS_IDS and rng.random() < 0.01]
        elif kind == 2 and rng.random() < 0.1:
            ids += huge
        elif kind == 3:
            ids += tokenizer.encode(chr(rng.randrange(0xD800)) + chr(rng.randrange(0x20)))
        else:
            ids += tokenizer.encode(rng.choice(SEQUENCES))
    return ids


@pytest.mark.parametrize("seed", range(20))
def test_hostile_answers_leave_the_terminal_sane(tokenizer: Tokenizer, seed: int) -> None:
    assert len(tokenizer.encode(HUGE)) == 1
    for number in range(10):  # 200 with all seeds
        rng = random.Random(100 * seed + number)
        stream = ScreenStream(*SIZES[number % 2])
        text = run(stream, tokenizer, hostile(rng, tokenizer), seed)
        assert not ALLOWED.sub("", stream.output)
        shown = "".join(line + "\n" for line in stream.screen.text.split("\n"))
        assert_answer_and_thought(stream, visible(text), shown)


def assert_answer_and_thought(stream: ScreenStream, text: str, shown: str) -> None:
    """Check the answer without the lines about thinking, which random control tokens begin."""
    assert stream.screen.is_sane
    kept = re.sub(r"thought, [\d,]+ words?\n", "", shown)
    assert kept.rstrip("\n") == laid_out(text, stream.screen.columns, 24).text


def test_a_sequence_that_is_cut_by_tokens_or_canvases_is_none_either(tokenizer: Tokenizer) -> None:
    bytes_of = {tokenizer.token_bytes(n): n for n in range(tokenizer.vocab_size)}
    sequence = [bytes_of[bytes([byte])] for byte in b"\x1b]0;owned\x07"] + [bytes_of[b"\xc2"], bytes_of[b"\x9b"]]
    for offset in range(24, 33):
        stream = ScreenStream()
        text = run(stream, tokenizer, tokenizer.encode("x" * 80)[:1] * offset + sequence)
        assert not ALLOWED.sub("", stream.output)
        assert_shows(stream, visible(text))
        assert "␛]0;owned␇\ufffd" in stream.screen.text


def test_a_canvas_taller_than_the_screen_shows_its_last_rows(tokenizer: Tokenizer) -> None:
    stream = ScreenStream(40, 10)
    tokens = tokenizer.encode("".join(f"row {n}\n" for n in range(50)) + "end")
    for _ in show(stream, tokenizer, [draft(tokens)]):
        assert stream.screen.rows[:7] == ["row 44", "row 45", "row 46", "row 47", "row 48", "row 49", "end"]
        assert stream.screen.rows[7].startswith("canvas 1")
        assert len(stream.screen.all_rows) <= 10
    assert stream.screen.all_rows == []


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_the_status_line(tokenizer: Tokenizer, columns: int, lines: int) -> None:
    stream, clock = ScreenStream(columns, lines), Clock()
    tokens = tokenizer.encode("one two three four five six seven eight")
    unsettled = [0.0] * (len(tokens) - 4) + [1.5] * 4
    drafts = [draft(tokens, step=6), draft(tokens, unsettled, step=7, canvas=2)]
    for _ in show(stream, tokenizer, drafts, clock):
        pass
    status = stream.output.split("\x1b[J\r")[2].partition("\r")[0]
    words = " ".join(re.sub(r"\x1b\[\d*m", "", status).partition("eight")[2].split())
    accepted, entropy = (len(tokens) - 4) / len(tokens), 6 / len(tokens)
    assert words == (
        f"canvas 3 step 7/48 {accepted:.0%} accepted entropy {entropy:.2f} "
        f"{(len(tokens) - 4) / 0.2:,.0f} settled tokens/s 0.2 s"
    )


def test_tokens_are_dimmer_the_less_they_are_settled(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.encode(word)[0] for word in ("a", "b", "c", "d", "e")]
    entropy = [0.01, 0.3, 1.0, 5.0, 0.01]
    stream = ScreenStream()
    changed = [*tokens[:4], tokenizer.encode("f")[0]]
    list(show(stream, tokenizer, [draft(tokens, entropy), draft(changed, entropy, step=2)]))
    first, second = stream.output.split("\x1b[J\r")[1:3]
    assert first.startswith("\x1b[2mab\x1b[0m")  # nothing is stable in the first step
    assert second.startswith("a\x1b[2mb\x1b[0m\x1b[90mc\x1b[0m\x1b[2;90md\x1b[0m\x1b[2mf\x1b[0m")


def test_tokens_after_the_end_of_the_text_are_not_drawn(tokenizer: Tokenizer) -> None:
    stream = ScreenStream()
    tokens = [*tokenizer.encode("word"), EOS, *tokenizer.encode("noise")]
    sure = [0.01] * len(tokens)
    unsure = [0.01 if token != EOS else 3.0 for token in tokens]
    list(show(stream, tokenizer, [draft(tokens, sure), draft(tokens, unsure, step=2)]))
    first, second = stream.output.split("\x1b[J\r")[1:3]
    assert "word" in first and "noise" not in first
    assert "noise" in second


def test_at_most_20_frames_a_second_and_always_the_last_one(tokenizer: Tokenizer) -> None:
    clock = Clock()
    stream = ScreenStream()
    ids = tokenizer.encode("abc " * 20)
    with LiveView(stream, tokenizer, EOS_IDS, clock) as view:  # type: ignore[arg-type]
        began = stream.output.count("\x1b[J")
        for canvas in range(3):
            for step in range(1, 101):
                clock.now += 0.01
                view(draft(ids, step=step, canvas=canvas))
            assert 15 <= stream.output.count("\x1b[J") - began <= 21
            clock.now += 0.001
            view(draft(ids, step=101, canvas=canvas, finished=True))
            assert "step 101/48" in stream.screen.text
            clock.now += 1
            began = stream.output.count("\x1b[J")


def test_thinking_is_dim_while_it_lasts_and_one_line_after(tokenizer: Tokenizer) -> None:
    special = tokenizer.special_ids
    thought = "thought\nLet me think. " + "More of it. " * 30
    channel = [special["<|channel>"], *tokenizer.encode(thought), special["<channel|>"]]
    stream = ScreenStream()
    dim_drawn = 0
    for event in show(stream, tokenizer, answer(tokenizer, channel + tokenizer.encode("Because.\nYes"))):
        frame = stream.output.rpartition("\x1b[J\r")[2]
        if isinstance(event, Draft) and "More of it." in frame and "Because" not in frame:
            dim_drawn += 1
            assert not re.search(r"(^|\x1b\[0m)[^\x1b]*More of it", frame)
    assert dim_drawn > 3
    words = len(thought.split()) - 1  # the name of the channel does not count
    assert f"\x1b[2mthought, {words} words\x1b[0m\n" in stream.output
    assert_shows(stream, f"thought, {words} words\nBecause.\nYes")


def test_thinking_that_does_not_end_is_folded_too(tokenizer: Tokenizer) -> None:
    stream = ScreenStream()
    run(stream, tokenizer, [tokenizer.special_ids["<|channel>"], *tokenizer.encode("thought\nHm.")])
    assert_shows(stream, "thought, 1 word\n")


def test_it_says_that_it_reads_the_prompt(tokenizer: Tokenizer) -> None:
    stream = ScreenStream()
    with LiveView(stream, tokenizer, EOS_IDS):  # type: ignore[arg-type]
        assert stream.screen.rows == ["reading the prompt"]
    assert_shows(stream, "")


def test_it_says_how_much_of_a_long_prompt_is_read(tokenizer: Tokenizer) -> None:
    stream = ScreenStream()
    with LiveView(stream, tokenizer, EOS_IDS) as view:  # type: ignore[arg-type]
        view.encoded(Encoded(2048, 8192))
        assert stream.screen.rows == ["reading the prompt: 25% of 8,192 tokens"]
        view(draft(tokenizer.encode("text")))
        assert stream.screen.rows[0] == "text"
    assert_shows(stream, "")
