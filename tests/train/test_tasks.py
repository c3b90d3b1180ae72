"""The demo model's tasks: answers are checked independently, and the splits share no content."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import product

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.text.tokenizer import load_tokenizer
from dgemma_mlx.train.demo import ENDS, MIXES
from dgemma_mlx.train.tasks import LAST_MIX, MIX, TASKS, UNKNOWN, Example, Split, training_example
from dgemma_mlx.train.tasks.base import split_of
from dgemma_mlx.train.tasks.facts import CAPITALS, LEGS, SOUNDS, build_facts
from dgemma_mlx.train.tasks.numbers import DESCENDING
from dgemma_mlx.train.tasks.recall import KINDS
from dgemma_mlx.train.tasks.sentence import VERBS, WORDS
from dgemma_mlx.train.tasks.sudoku import all_grids, is_solved, parse_grid
from dgemma_mlx.train.tasks.unknown import ANSWER, COUNTRIES, OTHER_ANIMALS

SPLITS: tuple[Split, ...] = ("train", "heldout")
NAMES = list(TASKS)


def draw(task: str, split: Split, count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [TASKS[task].sample(rng, split) for _ in range(count)]


def prompt_of(example: Example) -> str:
    return example.messages[-1]["content"]


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_mix_gives_every_task_a_share() -> None:
    for mix in (MIX, LAST_MIX):
        assert list(mix) == NAMES
        assert sum(mix.values()) == pytest.approx(1)
        assert min(mix.values()) > 0


def test_training_draws_the_mix_and_more_of_the_long_lists_to_sort() -> None:
    rng = random.Random(0)
    examples = [training_example(rng) for _ in range(6000)]
    counts = Counter(example.task for example in examples)
    for name, share in MIX.items():
        assert abs(counts[name] / len(examples) - share) < 5 * (share / len(examples)) ** 0.5
    lengths = Counter(len(example.answer.split()) for example in examples if example.task == "sort")
    assert sorted(lengths) == [3, 4, 5, 6, 7, 8]
    assert 3 < lengths[8] / lengths[5] < 5 and 1.5 < lengths[7] / lengths[4] < 2.7
    assert all(TASKS[example.task].check(example, example.answer) for example in examples[:200])


def test_there_are_more_additions_after_the_first_fall_of_the_learning_rate() -> None:
    assert len(MIXES) == len(ENDS) and list(ENDS) == sorted(ENDS)
    shares = []
    for mix in MIXES:
        rng = random.Random(0)
        shares.append(sum(training_example(rng, mix).task == "add" for _ in range(2000)) / 2000)
    assert shares == pytest.approx([MIX["add"], LAST_MIX["add"], LAST_MIX["add"]], abs=0.03)


def test_tasks_need_no_array_library() -> None:
    code = "import sys, dgemma_mlx.train.tasks; print({'mlx.core', 'tokenizers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_examples_and_well_formed(name: str, split: Split) -> None:
    examples = draw(name, split, 200)
    assert examples == draw(name, split, 200)
    assert len({example.key for example in examples}) > 20
    for example in examples:
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all(message["content"] == message["content"].strip() != "" for message in example.messages)
        assert example.answer == example.answer.strip() != ""
        assert not re.search(r"[{}]", prompt_of(example)), "an unfilled slot"


@pytest.mark.parametrize("name", NAMES)
def test_checker_accepts_the_answer_only(name: str) -> None:
    examples = draw(name, "heldout", 100)
    for example in examples:
        assert TASKS[name].check(example, f" {example.answer}\n")
        assert not TASKS[name].check(example, "")
        assert not TASKS[name].check(example, example.answer + " 1")
        assert not TASKS[name].check(example, example.answer[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_content(name: str) -> None:
    train = {example.key for example in draw(name, "train", 4000)}
    heldout = {example.key for example in draw(name, "heldout", 1500)}
    assert not train & heldout


def test_held_out_operands_are_never_added_in_any_training_conversation() -> None:
    heldout = {tuple(sorted(integers(prompt_of(example)))) for example in draw("add", "heldout", 3000)}
    assert len(heldout) > 300
    seen = {tuple(sorted(integers(prompt_of(example)))) for example in draw("add", "train", 20_000)}
    for example in draw("recall", "train", 4000):
        for said, reply in zip(example.messages[::2], example.messages[1::2], strict=False):
            if reply["content"].isdigit():
                seen.add(tuple(sorted(integers(said["content"]))))
    assert not heldout & seen


def test_held_out_sudokus_have_unseen_solutions() -> None:
    train = {example.answer for example in draw("sudoku", "train", 8000)}
    heldout = {example.answer for example in draw("sudoku", "heldout", 2000)}
    assert not train & heldout
    assert len(train) + len(heldout) == 288
    assert 0.1 < len(heldout) / 288 < 0.3


def test_the_split_is_the_same_on_every_machine() -> None:
    pairs = [(a, b) for a in range(6) for b in range(a, 20)]
    heldout = [(a, b) for a, b in pairs if split_of(f"add:{a} {b}", 0.1) == "heldout"]
    first = [(0, 10), (0, 11), (1, 10), (2, 2), (2, 11), (2, 16), (2, 18)]
    assert heldout == [*first, (4, 7), (4, 8), (4, 13), (5, 15), (5, 17)]


def test_there_are_288_grids() -> None:
    grids = all_grids()
    assert len(set(grids)) == len(grids) == 288
    assert all(is_solved(grid) for grid in grids)


def solutions(puzzle: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all solutions of a puzzle by trying every digit in every empty cell."""
    if 0 not in puzzle:
        return [puzzle]
    cell = puzzle.index(0)
    row, column = divmod(cell, 4)
    found = []
    for digit in range(1, 5):
        clash = any(
            puzzle[other] == digit
            and (r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2))
            for other, (r, c) in enumerate(product(range(4), repeat=2))
        )
        if not clash:
            found += solutions((*puzzle[:cell], digit, *puzzle[cell + 1 :]))
    return found


def test_sudokus_have_one_solution_and_all_numbers_of_clues() -> None:
    clues = set()
    for example in draw("sudoku", "train", 300):
        lines = prompt_of(example).splitlines()
        puzzle = parse_grid("\n".join(line for line in lines if re.fullmatch(r"[1-4._]( [1-4._]){3}", line)))
        assert puzzle is not None
        assert solutions(puzzle) == [parse_grid(example.answer)]
        clues.add(sum(cell > 0 for cell in puzzle))
    assert clues == set(range(5, 13))


def test_sudoku_is_checked_by_the_rules() -> None:
    sudoku = TASKS["sudoku"]
    for example in draw("sudoku", "heldout", 50):
        answer = example.answer
        assert not sudoku.check(example, answer.replace("1", "x").replace("2", "1").replace("x", "2"))
        assert not sudoku.check(example, answer.replace("1", "."))
        assert not sudoku.check(example, "\n".join(answer.splitlines()[:3]))
        assert not sudoku.check(example, answer.replace("\n", " "))
        assert not sudoku.check(example, "I do not know that.")


@pytest.mark.parametrize("split", SPLITS)
def test_sort_sorts_the_numbers_of_the_prompt(split: Split) -> None:
    descending = 0
    for example in draw("sort", split, 1000):
        falling = any(order in prompt_of(example).lower() for order in DESCENDING)
        assert integers(example.answer) == sorted(integers(prompt_of(example)), reverse=falling)
        assert 3 <= len(integers(example.answer)) <= 8
        descending += falling
    assert 100 < descending < 400


@pytest.mark.parametrize("split", SPLITS)
def test_reverse_reverses_the_items_of_the_prompt(split: Split) -> None:
    for example in draw("reverse", split, 1000):
        words = re.findall(r"\w+", prompt_of(example))
        items = example.answer.split()[::-1]
        listing = [word for word in words if word != "and"]
        assert any(listing[at : at + len(items)] == items for at in range(len(listing)))


@pytest.mark.parametrize("split", SPLITS)
def test_add_adds_the_numbers_of_the_prompt(split: Split) -> None:
    for example in draw("add", split, 1000):
        assert int(example.answer) == sum(integers(prompt_of(example)))


@pytest.mark.parametrize("split", SPLITS)
def test_count_counts_and_often_spans_two_canvases(split: Split) -> None:
    long = 0
    for example in draw("count", split, 1000):
        low, high = sorted((1, *integers(prompt_of(example)))[-2:])  # 'Count to 9.' starts at 1
        numbers = integers(example.answer)
        assert numbers == list(range(low, high + 1))
        tokens = sum(len(str(number)) for number in numbers) + 1  # one token for each digit, and the end of the turn
        assert tokens <= 64
        long += tokens > 32
    assert long > 300


@pytest.mark.parametrize("split", SPLITS)
def test_json_holds_what_the_sentence_says(split: Split) -> None:
    for example in draw("json", split, 500):
        record = json.loads(example.answer)
        assert list(record) == ["name", "age", "city"]
        assert isinstance(record["age"], int)
        assert all(re.search(rf"\b{value}\b", prompt_of(example)) for value in record.values())


def test_sentence_is_checked_by_its_grammar() -> None:
    sentence = TASKS["sentence"]
    example = next(e for e in draw("sentence", "train", 500) if e.key == "cat,,")
    assert sentence.check(example, "The big cat sleeps near the house.")
    assert sentence.check(example, "The happy cat plays by the old tree.")
    for wrong in (
        "The big dog sleeps near the house.",
        "The cat sleeps near the house.",
        "The big cat near the house.",
        "The big cat reads near the house.",
        "The big cat sleeps near the the house.",
        "The big cat sleeps on the house.",
        "The big cat sleeps near the sleeps.",
        "The tree cat sleeps near the house.",
        "The big cat sleeps near the house. The big cat sleeps near the house.",
        "the big cat sleeps near the house",
    ):
        assert not sentence.check(example, wrong), wrong


def test_sentence_must_use_the_words_asked_for() -> None:
    sentence = TASKS["sentence"]
    for example in draw("sentence", "heldout", 300):
        noun, adjective, place = example.key.split(",")
        assert noun in VERBS
        prompt = prompt_of(example).lower()
        assert all(word in prompt for word in (noun, adjective, place))
        if adjective:
            assert not sentence.check(example, example.answer.replace(f" {adjective} ", " ", 1))
        if place:
            assert not sentence.check(example, re.sub(r"\w+\.$", "lamp.", example.answer))


def test_every_word_of_a_sentence_is_one_token_of_the_demo_model() -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER)
    assert {word: len(tokenizer.encode(f" {word}")) for word in WORDS} == dict.fromkeys(WORDS, 1)


def test_every_fact_is_trained_and_held_out_facts_have_unseen_wordings() -> None:
    trained = {example.key.split(": ")[0] for example in draw("question", "train", 15_000)}
    assert {fact.key for fact in build_facts()} <= trained
    assert not any(example.key.startswith("small talk") for example in draw("question", "heldout", 500))


@pytest.mark.parametrize("split", SPLITS)
def test_recall_answers_with_what_was_said(split: Split) -> None:
    recalled = re.compile(
        r"(?:your name is|you live in|your favourite colour is|you have a) (.+)\.|you are (.+) years old\."
    )
    forms = set()
    for example in draw("recall", split, 2000):
        said = " ".join(message["content"] for message in example.messages[::2]).lower()
        found = recalled.fullmatch(example.answer.lower())
        if found:
            assert re.search(rf"\b{found[1] or found[2]}\b", said)
            assert len(example.messages) >= 3
        forms.add((len(example.messages), bool(found)))
    assert forms >= {(1, False), (3, True), (5, True)}


def test_recall_of_what_was_not_said_is_unknown() -> None:
    asks = {asked.lower().rstrip("?."): kind for kind, texts in KINDS.items() for asked in texts.asked}
    missing = set()
    for example in draw("recall", "train", 3000):
        kind = asks.get(prompt_of(example).lower().rstrip("?."))
        if kind:
            assert (example.answer == ANSWER) == (f"{kind}=" not in example.key)
            missing |= {kind} if example.answer == ANSWER else set()
    assert missing == set(KINDS)


def test_no_prompt_has_two_answers() -> None:
    answers: dict[tuple[str, ...], str] = {}
    for name in NAMES:
        if name == "sentence":  # many sentences are correct
            continue
        for split in SPLITS:
            for example in draw(name, split, 2500):
                turns = tuple(message["content"].lower().rstrip(".?!:") for message in example.messages)
                answer = example.answer.lower()
                assert answers.setdefault(turns, answer) == answer, turns


def test_unknown_never_asks_what_the_table_knows() -> None:
    assert not set(COUNTRIES) & set(CAPITALS)
    assert not set(OTHER_ANIMALS) & {*SOUNDS, *LEGS}
    known = {wording.lower().rstrip(".?") for fact in build_facts() for wording in fact.wordings}
    for split in SPLITS:
        for example in draw("unknown", split, 5000):
            assert example.answer == ANSWER
            assert prompt_of(example).lower().rstrip(".?") not in known


def test_training_asks_in_other_scripts_and_the_tokenizer_never_sees_them() -> None:
    rng = random.Random(0)
    asked = [prompt_of(e) for e in (training_example(rng) for _ in range(6000)) if e.task == "unknown"]
    foreign = [prompt for prompt in asked if not prompt.isascii()]
    assert 0.2 < len(foreign) / len(asked) < 0.4
    names = {unicodedata.name(letter, "").split(" ")[0] for prompt in foreign for letter in prompt}
    assert {"CJK", "HIRAGANA", "HANGUL", "CYRILLIC", "ARABIC", "GREEK"} <= names
    train, heldout = ({UNKNOWN.foreign(rng, split).key for _ in range(2000)} for split in SPLITS)
    assert not train & heldout and len(heldout) > 100
    assert all(prompt_of(example).isascii() for example in draw("unknown", "train", 2000))


def test_unknown_holds_out_templates_and_content_words() -> None:
    def parts(split: Split) -> tuple[set[str], set[str]]:
        keys = [example.key.split("|") for example in draw("unknown", split, 8000)]
        return {key[0] for key in keys}, {filler for key in keys for filler in key[1:]}

    train_templates, train_fillers = parts("train")
    heldout_templates, heldout_fillers = parts("heldout")
    assert not train_templates & heldout_templates
    assert not train_fillers & heldout_fillers
    assert len(train_templates) > 150
    assert len(heldout_templates) > 20
    assert len(heldout_fillers) > 100
