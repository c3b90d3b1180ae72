"""``fill``, ``edit`` and ``choose`` on the built-in demo model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx import DgemmaError, Gap, Model, choose, edit, fill, generate, load
from dgemma_mlx.infill.edit import selected
from dgemma_mlx.infill.fill import doubt_about
from dgemma_mlx.infill.search import Candidate
from dgemma_mlx.infill.writer import Writer
from dgemma_mlx.train.tasks import TASKS
from dgemma_mlx.train.tasks.sudoku import format_grid, parse_grid
from tests.text.gemma_like import random_text

RECORD = "Make a JSON object: Simon is 59 years old and lives in Rome."
GAPS = '{"name": "___", "age": ___, "city": "___"}\n'
FILLED = '{"name": "Simon", "age": 59, "city": "Rome"}\n'
ROUGH = {"raw": True, "candidates": 1}


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


def quick(demo: Model, steps: int = 1) -> dict[str, object]:
    return {"generation": demo.generation.override(max_denoising_steps=steps)}


def test_gaps_of_unknown_length_are_filled(demo: Model) -> None:
    filled = fill(demo, GAPS, prompt=RECORD, seed=1)
    assert filled.text == FILLED
    best, *others = filled.candidates
    assert best.texts == ("Simon", "59", "Rome")
    assert not best.low_confidence
    assert all(other.rank >= best.rank for other in others)
    assert len({candidate.texts for candidate in filled.candidates}) == len(filled.candidates) == len(filled.texts)
    assert filled.statistics.canvases >= len(filled.candidates)


def test_one_seed_gives_one_text(demo: Model) -> None:
    one, other = (fill(demo, 'The name is "___"', seed=1, **quick(demo)) for _ in range(2))  # type: ignore[arg-type]
    assert one.candidates == other.candidates


@pytest.mark.parametrize(
    ("original", "text", "score", "low_confidence", "doubt"),
    [
        ("old", "new", -1.0, False, None), (None, "new", -1.0, False, None), ("  ", " ", -1.0, False, None),
        ("old", "", -1.0, False, "nothing"), ("old", " \n", -1.0, False, "nothing"), (None, "", -1.0, False, "nothing"),
        ("old", "new", -1.0, True, "uncertain"), ("old", "new", float("nan"), False, "nan"),
        ("old", "new", float("-inf"), False, "inf"),
    ],
)  # fmt: skip
def test_what_must_not_be_written_to_a_file(
    original: str | None, text: str, score: float, low_confidence: bool, doubt: str | None
) -> None:
    found = doubt_about(Candidate((1, 1), ("right", text), score, low_confidence, ()), ["wrong", original])
    assert found is None if doubt is None else found is not None and doubt in found


def test_a_result_with_half_a_character_must_not_be_written_to_a_file() -> None:
    assert "no character" in str(doubt_about(Candidate((1,), ("new",), -1.0, False, (), cut=True), ["old"]))


def sudoku_gaps(prompt: str) -> str:
    """Return the grid of a prompt with a gap of one token for each empty cell."""
    lines = [line for line in prompt.splitlines() if parse_grid("\n".join([line] * 4)) is not None]
    givens = parse_grid("\n".join(lines))
    assert givens is not None
    return format_grid(givens, "___:1___")


def solve_both_ways(demo: Model, count: int, seed: int) -> tuple[int, int]:
    """Return how many held-out Sudoku are solved freely, and how many as pinned grids."""
    rng, task = random.Random(f"pinned/{seed}"), TASKS["sudoku"]
    free = pinned = 0
    for number in range(count):
        example = task.sample(rng, "heldout")
        prompt = example.messages[0]["content"]
        free += task.check(example, generate(demo, prompt, seed=number, max_tokens=128).text)
        pinned += task.check(example, fill(demo, sudoku_gaps(prompt), prompt=prompt, seed=number).text)
    return free, pinned


@pytest.mark.slow
def test_pinned_sudoku_is_solved_as_often_as_freely(demo: Model) -> None:
    free, pinned = solve_both_ways(demo, 12, seed=0)
    assert pinned >= max(free - 1, 9)  # among so few, a difference of one is chance


@pytest.mark.slow
def test_pinned_sudoku_is_solved_as_often_as_freely_in_many(demo: Model) -> None:
    free, pinned = solve_both_ways(demo, 200, seed=1)
    print(f"of 200 Sudoku: {free} solved freely, {pinned} with pinned givens")
    assert pinned >= free


def check_random_texts(demo: Model, count: int, seed: int) -> None:
    """Texts cut anywhere come back byte for byte, in what is returned and in the ids of the canvas."""
    rng = random.Random(seed)
    for number in range(count):
        text = random_text(rng, extra=[" ", "\n", "é", "🙂"])[:24]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 2)))
        ends = [*cuts[1:], len(text)]
        parts = [text[: cuts[0]], *(p for a, b in zip(cuts, ends, strict=True) for p in (Gap(1), text[a:b]))]
        try:
            filled = fill(demo, parts, seed=number, **ROUGH, **quick(demo))  # type: ignore[arg-type]
        except DgemmaError as error:
            assert "canvas holds" in error.message
            continue
        [candidate] = filled.candidates
        pieces = [parts[0]]
        for gap, piece in zip(candidate.texts, parts[2::2], strict=True):
            pieces += [gap, piece]
        assert filled.text == "".join(map(str, pieces))
        assert not any(demo.tokenizer.is_control(id) for id in demo.tokenizer.encode(filled.text))


def test_pinned_text_comes_out_as_it_went_in(demo: Model) -> None:
    check_random_texts(demo, 60, seed=1)


@pytest.mark.slow
def test_pinned_text_comes_out_as_it_went_in_a_thousand_times(demo: Model) -> None:
    check_random_texts(demo, 1000, seed=2)


def test_a_gap_of_given_length_has_it(demo: Model) -> None:
    filled = fill(demo, "Count: ___:5___.", raw=True, seed=3, candidates=3)
    assert {candidate.lengths for candidate in filled.candidates} == {(5,)}
    for candidate in filled.candidates:
        assert filled.text.startswith("Count: ")
        assert len(candidate.tokens) == demo.config.canvas_length


def test_the_encoder_prefers_what_fits(demo: Model) -> None:
    opening = demo.encode_prompt(RECORD)
    writer = Writer(demo, opening, 2, 0)
    ends = [demo.tokenizer.encode(text) for text in (FILLED.strip(), FILLED.strip().replace("Rome", "Rome Rome"))]
    rows = [ids + [0] * (32 - len(ids)) for ids in ends]
    right, wrong = writer.scores(rows, list(map(len, ends)))
    assert right > -0.01 > wrong


def test_a_score_is_the_mean_log_probability_of_the_encoder(demo: Model) -> None:
    opening = demo.encode_prompt(RECORD)
    ids = demo.tokenizer.encode("Simon is a cat")
    [score] = Writer(demo, opening, 1, 0).scores([ids + [0] * 8], [len(ids)])
    whole = [*opening, *ids]
    logits = demo.network.logits(demo.network.encode(mx.array([whole]), demo.network.new_cache()))[0]
    logits = np.array(logits, np.float64)
    normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = range(len(opening) - 1, len(whole) - 1)
    assert score == pytest.approx(np.mean([normal[place, whole[place + 1]] for place in places]), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no gap", {}, "no gap"),
        ("a ___", {"candidates": 0}, "candidates"),
        ("a ___", {"raw": True, "prompt": "x"}, "raw"),
        ("a ___:40___", {}, "canvas holds only 32"),
        ("a ___", {"speed": "warp"}, "speed"),
    ],
)
def test_options_that_are_refused(demo: Model, text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(DgemmaError, match=message) as caught:
        fill(demo, text, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda demo: Gap(size=1.5), "the size of a gap must be at least 1, not 1.5"),
        (lambda demo: Gap(size=0), "the size of a gap must be at least 1, not 0"),
        (lambda demo: Gap(size=True), "the size of a gap must be at least 1, not True"),
        (lambda demo: Gap(hint=5), "the hint of a gap must be a text, not 5"),
        (lambda demo: Gap(original=b"x"), "the original text of a gap must be a text, not b'x'"),
        (lambda demo: fill(demo, 5), "not a text with gaps: 5"),
        (lambda demo: fill(demo, None), "not a text with gaps: None"),
        (lambda demo: fill(demo, ["a", 5, Gap(1)]), "not a text with gaps"),
        (lambda demo: fill(demo, "a ___", mark=5), "the mark of a gap must be a text, not 5"),
        (lambda demo: fill(demo, "a ___", prompt=5), "the prompt must be a text, not 5"),
        (lambda demo: fill(demo, "a ___", candidates=1.5), "candidates must be at least 1, not 1.5"),
        (lambda demo: fill(demo, "a ___", system=5), "the system prompt must be a text, not 5"),
        (lambda demo: edit(demo, 5, "text"), "the instruction must be a text, not 5"),
        (lambda demo: edit(demo, "x", b"text"), "the text must be a text, not b'text'"),
        (lambda demo: edit(demo, "x", "text", lines=5), "lines must be two line numbers, not 5"),
        (lambda demo: edit(demo, "x", "text", lines=(1, 2, 3)), "lines must be two line numbers"),
        (lambda demo: edit(demo, "x", "text", lines=(1.0, 2)), "lines must be two line numbers"),
        (lambda demo: edit(demo, "x", "text", lines="12"), "lines must be two line numbers"),
        (lambda demo: edit(demo, "x", "text", match=5), "not a regular expression: 5"),
        (lambda demo: edit(demo, "x", "text", strength="1"), "strength must be a number above 0"),
        (lambda demo: edit(demo, "x", "text", candidates="2"), "candidates must be at least 1, not '2'"),
        (lambda demo: edit(demo, "x", "text", system=5), "the system prompt must be a text, not 5"),
        (lambda demo: choose(demo, "x", [5, 6]), "a choice must be a text, not 5"),
        (lambda demo: choose(demo, "x", "ab"), "the choices must be a list of texts, not 'ab'"),
        (lambda demo: choose(demo, "x", 5), "the choices must be a list of texts, not 5"),
        (lambda demo: choose(demo, 5, ["a", "b"]), "the question must be a text, not 5"),
        (lambda demo: choose(demo, "x", ["a", "b"], system=5), "the system prompt must be a text, not 5"),
        (lambda demo: choose(demo, "x", ["a", "b\ud800"]), "cannot keep"),
    ],
)  # fmt: skip
def test_values_of_other_types_are_one_clear_line(demo: Model, make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(DgemmaError) as caught:
        make(demo)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("option", ["verify", "trim_canvas", "constraint", "candidate", "max_tokens"])
def test_options_of_generate_and_misspelled_ones_are_named(demo: Model, option: str) -> None:
    for call, arguments in ((fill, ["a ___"]), (edit, ["x", "a text"]), (choose, ["x", ["a", "b"]])):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            call(demo, *arguments, **{option: 1})


def test_cancelled_between_two_steps(demo: Model) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(KeyboardInterrupt):
        fill(demo, GAPS, prompt=RECORD, seed=1, cancelled=cancelled)
    assert asked == 4


def test_an_edit_of_all_may_change_the_length(demo: Model) -> None:
    text = '{"name": "Al", "age": 5, "city": "Oslo"}\n\n'
    edited = edit(demo, RECORD, text, seed=1, strength=1.0)
    assert edited.text.endswith('"}\n\n')
    assert edited.text != text


def test_a_weak_edit_keeps_most_and_repairs_the_rest(demo: Model) -> None:
    """The canvas begins as the text: at a low strength the answer is found from what is left of it."""
    right = 0
    for seed in range(5):
        edited = edit(demo, RECORD, FILLED, seed=seed, strength=0.3)
        right += edited.text == FILLED
    assert right >= 4


def test_an_edit_of_a_part_leaves_the_rest(demo: Model) -> None:
    text = '{"name": "Simon", "age": 59, "city": "Oslo"}\r\nOslo, tail  \n'
    edited = edit(demo, RECORD, text, match="Oslo", lines=(1, 1), seed=1, candidates=2)
    assert edited.text.startswith('{"name": "Simon", "age": 59, "city": "')
    assert edited.text.endswith('"}\r\nOslo, tail  \n')
    assert len(edited.candidates[0].texts) == 1


@pytest.mark.parametrize(
    ("lines", "match", "parts"),
    [
        ((2, 2), None, ["a\r\n", Gap(original="b b"), "\r\nc"]),
        ((1, 3), None, ["", Gap(original="a\r\nb b\r\nc"), ""]),
        (None, "b", ["a\r\n", Gap(original="b"), " ", Gap(original="b"), "\r\nc"]),
        ((2, 3), "[bc]$", ["a\r\nb b\r\n", Gap(original="c"), ""]),
        (None, "x?c", ["a\r\nb b\r\n", Gap(original="c"), ""]),
    ],
)  # fmt: skip
def test_what_is_selected(lines: tuple[int, int] | None, match: str | None, parts: list[str | Gap]) -> None:
    assert selected("a\r\nb b\r\nc", lines, match) == parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": (0, 1)}, "no lines 0 to 1"),
        ({"lines": (2, 1)}, "no lines 2 to 1"),
        ({"lines": (1, 9)}, "no lines 1 to 9"),
        ({"match": "zzz"}, "nothing to change"),
        ({"match": "("}, "not a regular expression"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_bad_edits(demo: Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(DgemmaError, match=message) as caught:
        edit(demo, "x", "a text", **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_a_part_too_long_for_a_canvas_says_so(demo: Model) -> None:
    with pytest.raises(DgemmaError, match="a canvas holds only 32"):
        edit(demo, "x", "one\n" + "word " * 60 + "\nend", lines=(2, 2))


@pytest.mark.parametrize(("instruction", "text"), [("", "a"), ("x", " \n"), ("x", "word " * 80)])
def test_texts_that_cannot_be_edited(demo: Model, instruction: str, text: str) -> None:
    with pytest.raises(DgemmaError):
        edit(demo, instruction, text)


def test_choices_get_the_probabilities_that_the_model_gives_them(demo: Model) -> None:
    right = 0
    rng = random.Random(5)
    for number in range(20):
        a, b = rng.randint(0, 60), rng.randint(0, 39)
        answers = [str(a + b + offset) for offset in (0, 1, 10)]
        rng.shuffle(answers)
        choices = choose(demo, f"What is {a} + {b}?", answers, seed=number)
        assert sum(choice.probability for choice in choices) == pytest.approx(1)
        assert [choice.probability for choice in choices] == sorted((c.probability for c in choices), reverse=True)
        right += choices[0].text == str(a + b)
    assert right >= 18


def test_choices_do_not_depend_on_their_order_but_on_their_length_fairly(demo: Model) -> None:
    answers = ["Rome", "I do not know that.", "72"]
    one = choose(demo, "What is 27 + 45?", answers, seed=1)
    assert choose(demo, "What is 27 + 45?", answers[::-1], seed=1) == one
    assert one[0].text == "72"
    other = choose(demo, "Who painted the blue door of the station?", answers, seed=1)
    assert other[0].text == "I do not know that."


@pytest.mark.parametrize("choices", [[], ["a"], ["a", "a"], ["a", " a "], ["a", ""], ["a", "word " * 40]])
def test_choices_that_are_refused(demo: Model, choices: list[str]) -> None:
    with pytest.raises(DgemmaError) as caught:
        choose(demo, "x", choices)
    assert caught.value.exit_code == 2
