"""Every slash command on the built-in model, without a terminal."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import dgemma_mlx
from dgemma_mlx import Model
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.cli.chat.command import Outcome
from dgemma_mlx.cli.chat.commands import COMMANDS, take
from dgemma_mlx.cli.chat.local import LocalChat
from dgemma_mlx.cli.log.session import CHANGEABLE, Session
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.errors import DgemmaError

ANA, NAME = "My name is Ana.", "What is my name?"


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


@pytest.fixture
def chat(model: Model) -> LocalChat:
    return new_chat(model)


def new_chat(model: Model) -> LocalChat:
    """Return a chat with few denoising steps: the model needs two for a known task and uses all for an unknown one."""
    defaults = {name: kind.default for name, kind in SETTINGS.items()}
    return LocalChat(model, Session(), {**defaults, "max_denoising_steps": 4, "max_tokens": 32}, draw=False)


def say(chat: LocalChat, line: str) -> Outcome:
    """Take a line and answer it, as the loop does."""
    outcome = take(chat, line)
    if outcome.ask:
        assert chat.answer(again=outcome.again)
    return outcome


def contents(chat: LocalChat) -> list[str]:
    return [message["content"] for message in chat.session.messages]


def refused(chat: LocalChat, line: str) -> str:
    """Return the message and the hint for a line that is refused, and check that it changes nothing."""
    before = replace(chat.session, messages=list(chat.session.messages), settings=dict(chat.session.settings))
    with pytest.raises(DgemmaError) as caught:
        take(chat, line)
    assert chat.session == before
    assert caught.value.hint
    return f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("line", ["/bogus", "/", "/ help", "  /bogus Sort 7 3 5", "/HELP", "/usr/bin/env", "/\x1b[2J"])
def test_an_unknown_command_never_reaches_the_model(chat: LocalChat, line: str) -> None:
    assert "there is no command" in refused(chat, line)
    assert chat.last is None


def test_text_in_three_quotation_marks_is_a_message_whatever_it_says(chat: LocalChat) -> None:
    say(chat, '"""\n/help me:\nSort 7 3 5\n"""')
    assert contents(chat)[0] == "/help me:\nSort 7 3 5"
    for line in ("", "  \n", '""""""', '"""\n"""'):
        assert take(chat, line) == Outcome()
    assert chat.session.turns == 1
    take(chat, '"""not closed')
    assert contents(chat)[-1] == '"""not closed'


def test_help_lists_every_command(chat: LocalChat, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(COMMANDS)
    take(chat, "/help")
    printed = capsys.readouterr()
    assert printed.out == ""  # no terminal: stdout is for answers
    assert [line.split()[0] for line in printed.err.splitlines()[: len(names)]] == [f"/{name}" for name in names]


def test_the_system_prompt_is_set_sent_and_removed(chat: LocalChat, capsys: pytest.CaptureFixture[str]) -> None:
    without = len(chat.model.encode_prompt("Hi"))
    take(chat, "/system Be brief.\nAnd kind.")
    assert chat.session.system == "Be brief.\nAnd kind."
    say(chat, "Hi")
    assert chat.last is not None and chat.last.statistics.prompt_tokens > without
    take(chat, "/system")
    assert chat.session.system == "Be brief.\nAnd kind."
    assert "Be brief." in capsys.readouterr().err
    take(chat, "/system none")
    assert chat.session.system is None


def test_what_is_set_is_what_the_engine_gets(chat: LocalChat) -> None:
    for line in ("/set seed 11", "/set steps 1", "/set max_tokens 3", "/set thinking on"):
        take(chat, line)
    assert chat.session.settings == {"seed": 11, "max_denoising_steps": 1, "max_tokens": 3, "thinking": True}
    say(chat, "Count from 13 to 40.")
    assert chat.last is not None
    assert (chat.last.seed, chat.last.finish_reason) == (11, "length")
    assert (chat.last.statistics.denoising_steps, chat.last.statistics.generated_tokens) == (1, 3)
    assert chat.last.statistics.prompt_tokens == len(chat.model.encode_prompt("Count from 13 to 40.", thinking=True))


def test_temperatures_are_set(chat: LocalChat) -> None:
    for line in ("/set t_max 1.25", "/set t_min 0.5", "/set entropy_bound 0.2", "/set confidence_threshold 0.01",
                 "/set stability_threshold 2"):  # fmt: skip
        take(chat, line)
    generation = chat.generation()
    assert (generation.t_max, generation.t_min, generation.entropy_bound) == (1.25, 0.5, 0.2)
    assert (generation.confidence_threshold, generation.stability_threshold) == (0.01, 2)
    take(chat, "/set temp 0")
    take(chat, "/set seed 1")
    say(chat, "Write a sentence about a cat.")
    one = contents(chat)[-1]
    chat.session.messages.clear()
    say(chat, "Write a sentence about a cat.")
    assert contents(chat)[-1] == one


def test_a_setting_goes_back_to_its_default(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {name: kind.default for name, kind in SETTINGS.items()}
    chat = LocalChat(model, Session(), {**defaults, "seed": 4}, draw=False)
    take(chat, "/set seed 9")
    take(chat, "/set steps 7")
    assert capsys.readouterr().err == "seed: 9\nmax_denoising_steps: 7\n"
    take(chat, "/set seed")
    take(chat, "/set steps default")
    assert capsys.readouterr().err == f"seed: 4\nmax_denoising_steps: {model.generation.max_denoising_steps}\n"
    assert chat.session.settings == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set", "which setting?"),
        ("/set colour red", "there is no setting 'colour'"),
        ("/set model demo", "there is no setting 'model'"),
        ("/set seed one", "seed must be a whole number"),
        ("/set seed -1", "seed must be"),
        ("/set max_tokens 0", "max_tokens must be"),
        ("/set max_tokens 1.5", "max_tokens must be"),
        ("/set steps 0", "max_denoising_steps must be"),
        ("/set temp nan", "temp must be"),
        ("/set t_min 0.9", "not below t_min (0.9)"),
        ("/set t_max 0", "t_max (0.0) must be above 0"),
        ("/set thinking perhaps", "thinking must be true or false"),
    ],
)
def test_a_bad_setting_is_refused_and_the_old_one_stays(chat: LocalChat, line: str, message: str) -> None:
    take(chat, "/set t_max 0.85")
    assert message in refused(chat, line)


def test_settings_that_contradict_each_other_are_refused(chat: LocalChat) -> None:
    take(chat, "/set t_max 2")
    take(chat, "/set t_min 1.5")
    assert "not below t_min (1.5)" in refused(chat, "/set t_max default")


def test_show_has_settings_and_conversation(chat: LocalChat, capsys: pytest.CaptureFixture[str]) -> None:
    take(chat, "/system Be brief.")
    chat.session.messages = [
        {"role": "user", "content": "Hi\x1b[2J"}, {"role": "assistant", "content": "Hello", "cancelled": True},
    ]  # fmt: skip
    capsys.readouterr()
    take(chat, "/show")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[: len(CHANGEABLE)]] == list(CHANGEABLE)
    assert lines[len(CHANGEABLE) :] == [
        "system                 Be brief.", "", "[user]", "Hi␛[2J", "", "[assistant (cancelled)]", "Hello"
    ]  # fmt: skip


def test_clear_begins_anew(chat: LocalChat, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("7 3 5")
    take(chat, "/set seed 1")
    say(chat, ANA)
    take(chat, f"/read {tmp_path / 'a.txt'}")
    take(chat, "/clear")
    say(chat, NAME)
    assert contents(chat)[0] == NAME
    assert "Ana" not in contents(chat)[1]
    assert chat.session.settings == {"seed": 1}


def test_undo_forgets_the_last_turn(chat: LocalChat) -> None:
    say(chat, ANA)
    say(chat, NAME)
    take(chat, "/undo")
    assert contents(chat)[0] == ANA and chat.session.turns == 1
    take(chat, "/undo")
    assert "there is no turn yet" in refused(chat, "/undo")


def test_regen_answers_the_same_question_with_another_seed(chat: LocalChat) -> None:
    take(chat, "/set seed 20")
    take(chat, "/set speed reference")
    say(chat, "Write a sentence about a cat.")
    answers = [contents(chat)[1]]
    for seed in (21, 22, 23):
        say(chat, "/regen")
        assert chat.last is not None and chat.last.seed == seed
        assert chat.last.statistics.cached_tokens == chat.last.statistics.prompt_tokens
        assert contents(chat)[0] == "Write a sentence about a cat." and chat.session.turns == 1
        answers.append(contents(chat)[1])
    assert len(set(answers)) > 1
    say(chat, "Write a sentence about a dog.")
    assert chat.last is not None and chat.last.seed == 20


def test_regen_and_edit_need_a_turn_and_edit_a_terminal(chat: LocalChat) -> None:
    assert "there is no turn yet" in refused(chat, "/regen")
    say(chat, "Sort 7 3 5")
    assert "/edit needs a terminal" in refused(chat, "/edit")


def test_files_go_with_the_next_message(
    chat: LocalChat, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("Sort\n")
    Path("and two.txt").write_text("  7 3 5 ß\n")
    take(chat, "/read one.txt")
    tokens = len(chat.model.tokenizer.encode("one.txt:\n```\nSort\n```"))
    assert capsys.readouterr().err.splitlines() == [
        f"one.txt: 5 bytes, {tokens} tokens", "1 file will be sent with your next message; /drop takes it back"
    ]  # fmt: skip
    take(chat, "/read   and two.txt  ")  # a path that exists needs no quotation marks
    assert chat.session.messages == []
    take(chat, "please")
    take(chat, "Sort 2 1")
    sent = "one.txt:\n```\nSort\n```\n\nand two.txt:\n```\n  7 3 5 ß\n```\n\nplease"
    assert contents(chat) == [sent, "Sort 2 1"]


@pytest.mark.parametrize("line", [
    "{0}/a.txt {0}/My\\ File.txt", "'{0}/a.txt' \"{0}/My File.txt\"",
    "~/a.txt ~/My\\ File.txt ", "~/a.txt '~/My File.txt'",
])  # fmt: skip
def test_several_files_are_read_as_they_are_pasted(
    chat: LocalChat, tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "My File.txt"):
        (tmp_path / name).write_text(name)
    take(chat, "/read " + line.format(tmp_path))
    assert [attachment.text for attachment in chat.attachments] == ["a.txt", "My File.txt"]


def test_a_file_with_a_quotation_mark_in_its_name(chat: LocalChat, tmp_path: Path) -> None:
    (tmp_path / "don't.txt").write_text("x")
    take(chat, f"/read {tmp_path}/don't.txt")
    take(chat, f"/read {tmp_path}/don\\'t.txt")
    assert [Path(attachment.name).name for attachment in chat.attachments] == ["don't.txt"]  # read again, sent once
    assert "a quotation mark is open" in refused(chat, "/read a don't.txt")


def test_files_are_listed_and_dropped(chat: LocalChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    assert "no file waits" in refused(chat, "/drop")
    take(chat, f"/read {tmp_path}")
    assert "d.txt" in capsys.readouterr().err
    take(chat, "/drop 2")
    take(chat, "/drop d.txt")
    take(chat, f"/drop {tmp_path}/a.txt")
    capsys.readouterr()
    take(chat, "/files")
    assert capsys.readouterr().err.startswith(f"1  {tmp_path}/c.txt: 5 bytes, ")
    for name in ("2", "0", "a.txt", "nowhere"):
        assert f"no file that waits is called {name}" in refused(chat, f"/drop {name}")
    take(chat, f"/read {tmp_path}/a.txt")
    take(chat, "/drop")
    assert chat.attachments == []


def test_files_that_cannot_be_read(chat: LocalChat, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "good").write_text("good")
    assert "which file?" in refused(chat, "/read")
    assert "which file?" in refused(chat, "/read a\0b")
    assert "nowhere: No such file" in refused(chat, "/read nowhere")
    assert "~nosuchuser/x: No such file" in refused(chat, "/read ~nosuchuser/x")
    assert "binary file" in refused(chat, "/read /dev/zero")
    assert "not UTF-8 text" in refused(chat, f"/read {tmp_path}/good {tmp_path}/latin")
    assert chat.attachments == []


def test_a_conversation_is_saved_and_continued(chat: LocalChat, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    take(chat, "/set seed 1")
    take(chat, "/system Be brief.")
    say(chat, ANA)
    take(chat, f"/save {path}")
    other = new_chat(chat.model)
    say(other, "Sort 2 1")
    take(other, f"/load {path}")
    assert other.session == chat.session
    say(other, NAME)
    say(chat, NAME)
    assert contents(other) == contents(chat)
    assert "Ana" in contents(other)[-1]
    take(chat, f"/save {path}")
    escaped = str(path).replace(" ", "\\ ")
    take(other, f"/load {escaped}")
    assert other.session == chat.session
    take(other, f"/save '{path}'")  # a saved conversation may be replaced
    assert Session.load(path) == other.session


def test_files_that_cannot_be_saved_or_loaded(chat: LocalChat, tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    for line in ("/save", "/load", "/save .", "/save /", "/load a\0b"):
        assert "which file?" in refused(chat, line)
    assert "not overwritten" in refused(chat, f"/save {mine}")
    assert "not overwritten" in refused(chat, f"/save {tmp_path}")
    assert "cannot write" in refused(chat, f"/save {mine}/talk.json")
    assert "cannot write" in refused(chat, f"/save {tmp_path}/{'x' * 300}")
    assert "cannot read" in refused(chat, f"/load {mine}")
    assert "there is no file" in refused(chat, f"/load {tmp_path}/nowhere")
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]


def test_stats_tell_how_much_was_reused(chat: LocalChat, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing has been generated yet" in refused(chat, "/stats")
    say(chat, ANA)
    first = chat.model.encode_prompt(ANA)
    say(chat, NAME)
    capsys.readouterr()
    take(chat, "/stats")
    shown = {line[:20].strip(): line[20:].strip() for line in capsys.readouterr().err.splitlines()}
    assert chat.last is not None
    assert shown["cached tokens"] == str(len(first)) == str(chat.last.statistics.cached_tokens)
    assert int(shown["prompt tokens"]) > len(first)
    assert shown["peak memory"].endswith("B") and shown["finish reason"] == "stop"
    assert shown.keys() >= {"denoising steps", "tokens per second", "seed"}


def test_bye_leaves(chat: LocalChat) -> None:
    assert take(chat, "/bye").leave


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo with 160 positions."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 160
    (folder / "config.json").write_text(json.dumps(config))
    return dgemma_mlx.load(folder)


def test_a_conversation_that_no_longer_fits_loses_its_oldest_turns(
    short: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = new_chat(short)
    take(chat, "/system Be brief.")
    take(chat, "/set seed 1")
    questions: list[str] = []
    while len(questions) == chat.session.turns:
        assert len(questions) < 20
        questions.append(f"Sort {len(questions)} 3 5")
        say(chat, questions[-1])
        assert len(short.encode_prompt(chat.session.prompt()[:-1])) <= 160 - 32
    kept = contents(chat)[0::2]
    assert len(kept) > 1 and kept == questions[-len(kept) :]  # only the oldest turns are missing
    assert chat.session.system == "Be brief."
    notes = [line for line in capsys.readouterr().err.splitlines() if "no longer fits" in line]
    assert len(notes) == 1 and re.search("its oldest (turn is|[2-9] turns are) forgotten", notes[0])


def test_a_message_too_long_by_itself_leaves_the_conversation_as_it_was(short: Model) -> None:
    chat = new_chat(short)
    say(chat, ANA)
    say(chat, "Sort 7 3 5")
    before = contents(chat)
    take(chat, "Sort 7 3 5 " * 60)
    with pytest.raises(DgemmaError, match=r"the message is too long: .* limit of 160 positions"):
        chat.answer()
    assert contents(chat)[:-1] == before


def test_a_single_message_may_use_all_the_room(short: Model) -> None:
    """A single message may leave room for only one canvas."""
    chat = new_chat(short)
    message = "Sort 7 3 5"
    while len(short.encode_prompt(message + " 1")) <= 160 - 32:
        message += " 1"
    say(chat, message)
    take(chat, message + " 1 1")
    with pytest.raises(DgemmaError, match="too long"):
        chat.answer()
