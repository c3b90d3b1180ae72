"""JSONL files of examples: the formats, the token ids, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import Model, load
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.train.dataset import as_jsonl, encode_all, encode_example, read_data, read_examples

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sort 2 1"},
    {"role": "assistant", "content": "1 2"},
    {"role": "user", "content": "Reverse 1 2"},
    {"role": "assistant", "content": "2 1"},
]


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def test_the_formats_of_mlx_lm_are_read(tmp_path: Path) -> None:
    pair = {"prompt": "Sort 2 1", "completion": "1 2"}
    path = write(tmp_path / "a.jsonl", {"messages": CHAT}, "", pair, {"text": "Once."})
    first, second, asked, text = read_examples(path)
    assert (list(first.messages), first.answer) == (CHAT[:2], "1 2")
    assert (list(second.messages), second.answer) == (CHAT[:4], "2 1")
    assert (list(asked.messages), asked.answer) == ([{"role": "user", "content": "Sort 2 1"}], "1 2")
    assert (text.messages, text.answer) == ((), "Once.")


def test_a_folder_has_a_file_to_train_and_one_to_validate_with(tmp_path: Path) -> None:
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    train.write_text(as_jsonl([("a", "b"), ("c", "d")]))
    assert [len(part) for part in read_data([tmp_path])] == [2, 0]
    valid.write_text(as_jsonl([("e", "f")]))
    assert [len(part) for part in read_data([tmp_path, train])] == [4, 1]
    assert [len(part) for part in read_data([valid], train)] == [1, 2]
    assert [len(part) for part in read_data([tmp_path], train)] == [2, 2]


def test_an_answer_begins_after_the_prompt_and_ends_the_turn(tmp_path: Path, demo: Model) -> None:
    _, second = read_examples(write(tmp_path / "a.jsonl", {"messages": CHAT}))
    prompt, answer = encode_example(demo, second)
    whole = demo.tokenizer.decode([*prompt, *answer], keep_special=True)
    assert whole == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nSort 2 1<turn|>\n<|turn>model\n1 2<turn|>\n"
        "<|turn>user\nReverse 1 2<turn|>\n<|turn>model\n2 1<turn|>"
    )
    assert demo.tokenizer.decode(answer, keep_special=True) == "2 1<turn|>"


def test_a_text_is_learned_from_its_beginning_to_its_end(tmp_path: Path, demo: Model) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", {"text": "Sort <turn|>"}))
    prompt, answer = encode_example(demo, example)
    assert prompt == [2] and answer[-1] == 1
    assert 106 not in answer and demo.tokenizer.decode(answer[:-1]) == "Sort <turn|>"


def test_long_examples_are_cut_to_whole_canvases_or_left_out(tmp_path: Path, demo: Model) -> None:
    long = " ".join(["7"] * 100)  # 101 ids with the end; the prompt of the first has 10
    examples = read_examples(write(tmp_path / "a.jsonl", {"prompt": "Sort", "completion": long},
                                   {"prompt": long, "completion": "7"}))  # fmt: skip
    prompt = len(encode_example(demo, examples[0])[0])
    kept, left_out = encode_all(demo, examples, prompt + 95)
    assert left_out == 1 and [len(answer) for _, answer in kept] == [64]
    kept, left_out = encode_all(demo, examples, 2048)
    assert left_out == 0 and [len(answer) for _, answer in kept] == [101, 2]
    with pytest.raises(DgemmaError, match="no example leaves room"):
        encode_all(demo, examples, prompt + 31)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"), ("[1]", "is not a JSON object"), ({"question": "a"}, "has neither"),
        ({"prompt": "a"}, "completion must be a non-empty string"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a non-empty string"),
        ({"text": "  "}, "text must be a non-empty string"), ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": CHAT[:2]}, "has no assistant message"),
        ({"messages": CHAT[2:]}, "begins with an assistant message"),
        ({"messages": [{"role": "user"}]}, "message 1 must have a role and a content and nothing else, but has role"),
        ({"messages": [{}]}, "message 1 must have a role and a content and nothing else, but has no keys"),
        ({"messages": ["hi"]}, "message 1 must have a role and a content, but is not a JSON object"),
        ({"messages": [*CHAT[:1], {"role": "robot", "content": "a"}]}, "message 2 has the unknown role 'robot'"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": None}]}, "content must be a non-empty string"),
        ('{"text": "\\ud800"}', "unpaired surrogate"), ("[" * 100_000, "is not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "good"}, "", line)
    with pytest.raises(DgemmaError) as error:
        read_examples(path)
    assert error.value.message.startswith(f"{path}, line 3") and words in error.value.message
    assert error.value.exit_code == 2 and len(error.value.message) < 400


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty").write_text("\n")
    for name, words in (("absent", "cannot read"), ("latin", "not UTF-8"), ("empty", "contains no examples")):
        with pytest.raises(DgemmaError, match=words) as error:
            read_data([tmp_path / name])
        assert name in error.value.message and error.value.exit_code == 2
    with pytest.raises(DgemmaError, match=r"cannot read .*train\.jsonl"):
        read_data([tmp_path])
