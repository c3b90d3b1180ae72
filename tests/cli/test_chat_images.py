"""Images in a chat: attached, dragged, shown, sent, kept, and shown again when the conversation goes on."""

from __future__ import annotations

import base64
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import load
from dgemma_mlx.cli.chat.commands import take
from dgemma_mlx.cli.chat.local import LocalChat
from dgemma_mlx.cli.chat.pictures import dragged
from dgemma_mlx.cli.images import AttachedImage, image_of
from dgemma_mlx.cli.log.export import as_markdown, as_text
from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.errors import DgemmaError
from tests.cli.kept import last_session, messages
from tests.cli.test_conversation import Talk
from tests.cli.test_remote_chat import choice, foreign, new_chat, sent
from tests.vision.seeing import png, write_seeing

DEFAULTS = {
    **{name: kind.default for name, kind in SETTINGS.items()}, "max_denoising_steps": 2, "max_tokens": 8, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that reads images, with random weights in its tower."""
    return str(write_seeing(tmp_path_factory.mktemp("seeing")))


@pytest.fixture
def chat(seeing: str) -> LocalChat:
    """A chat with the model that reads images."""
    return LocalChat(load(seeing), Session(), DEFAULTS, draw=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures, and of files that are none."""
    for number, name in enumerate(("cat.png", "My Dog.png")):
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(png(2)[:200])
    return tmp_path


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """An empty log."""
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    return Log()


def test_an_image_goes_with_the_next_message_and_stays(
    chat: LocalChat, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take(chat, f"/image {pictures / 'cat.png'} '{pictures / 'My Dog.png'}'")
    cat, dog, waiting = capsys.readouterr().err.splitlines()
    assert cat == f"{pictures / 'cat.png'}  40x40  64 tokens" and dog.startswith(f"{pictures / 'My Dog.png'}  40x40")
    assert waiting == "2 files will be sent with your next message; /drop takes them back"
    take(chat, "/drop 2")
    take(chat, "/image")
    assert capsys.readouterr().err.splitlines()[1:] == [f"1  {cat}"]
    assert take(chat, "What?").ask and chat.answer()
    assert chat.attachments == [] and chat.last is not None
    assert chat.last.statistics.prompt_tokens > 66
    (pictures / "cat.png").unlink()
    assert take(chat, "/regen").ask and chat.answer(again=True)
    take(chat, "And now?", edited=True)
    assert [message.get("images", [{}])[0].get("name") for message in chat.session.messages] == ["cat.png"]
    assert chat.answer()
    take(chat, "/show")
    assert "[user]\n[image: cat.png 40x40]\nAnd now?\n" in capsys.readouterr().err
    take(chat, "/undo")
    assert chat.session.messages == []


@pytest.mark.parametrize(("name", "words"), [
    ("gone.png", "gone.png cannot be read: No such file"), ("text.png", "text.png is not a picture"),
    ("cut.png", "cut.png cannot be read: image file is truncated"), ("", "cannot be read: Is a directory"),
    ("https://example.com/cat.png", "/image: https://example.com/cat.png is an address, not a file"),
])  # fmt: skip
def test_what_is_no_image_changes_nothing(chat: LocalChat, pictures: Path, name: str, words: str) -> None:
    take(chat, f"/image {pictures / 'cat.png'}")
    before = chat.attachments
    with pytest.raises(DgemmaError, match=words) as caught:
        take(chat, f"/image '{pictures / 'My Dog.png'}' {name if '://' in name else pictures / name}")
    assert caught.value.hint and chat.attachments == before


def test_the_budget_is_that_of_the_pictures_that_are_added(chat: LocalChat, pictures: Path) -> None:
    take(chat, f"/image {pictures / 'cat.png'}")
    chat.image_budget = 140
    take(chat, f"/image '{pictures / 'My Dog.png'}'")
    small, large = (each for each in chat.attachments if isinstance(each, AttachedImage))
    assert "budget" not in small.image and large.image["budget"] == 140
    assert (small.tokens, large.tokens) == (64, 121)  # the next smaller squares of 70 and 140
    take(chat, "What are they?")
    assert sum(id < 0 for id in chat.model.encode_prompt(chat.session.prompt())) == 64 + 121


def test_frames_of_a_video_are_shown_while_the_file_is_there(
    chat: LocalChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    from tests.vision.test_video import video

    path = tmp_path / "clip.mp4"
    path.write_bytes(video(2))
    take(chat, f"/video {path}")
    assert capsys.readouterr().err.startswith(f"{path}  120 tokens\n1 file will be sent")
    take(chat, "What?")
    assert (used := chat.used) is not None and used > 120
    chat.session.add("assistant", "Grey.")
    path.unlink()
    take(chat, "/show")
    assert "[video: clip.mp4, gone]\nWhat?" in capsys.readouterr().err
    assert (used := chat.used) is not None and used < 120


def test_a_model_without_a_tower_says_so_and_paths_are_words(pictures: Path) -> None:
    blind = write_seeing(pictures / "blind")
    config = json.loads((blind / "config.json").read_text())
    del config["vision_config"]
    (blind / "config.json").write_text(json.dumps(config))
    cat = pictures / "cat.png"
    with Talk(pictures / "state", "-m", str(blind)) as talk:
        for line in (f"/image {cat}", str(cat)):
            assert "reads no images: the checkpoint has no vision tower" in "".join(talk.say(line))
        assert "cat.png is sent as its path" in "".join(talk.say(f"Resize {cat}"))
        Session(turn(image_of("cat.png", png(1)))).save(pictures / "talk.json")
        talk.say(f"/load {pictures / 'talk.json'}")  # and the line below the prompt has no count
        assert "reads no images" in "".join(talk.say("And now?"))


def test_paths_of_images_are_found_in_a_line(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pictures))
    cat, dog = pictures / "cat.png", pictures / "My Dog.png"
    pasted = str(dog).replace(" ", "\\ ")
    for line, paths, text in (
        (str(cat), [cat], ""), (str(dog), [dog], ""), (f"'{dog}' {cat} ", [dog, cat], ""), (pasted, [dog], ""),
        (f"file://{str(dog).replace(' ', '%20')}", [dog], ""), (f'"{dog}"', [dog], ""),
        (f"What is in {cat}?", [cat], "What is in cat.png?"), ("Is ~/cat.png red?", [cat], "Is cat.png red?"),
        ("~/cat.png", [cat], ""), ("Is cat.png red ~/?", [], "Is cat.png red ~/?"),
        (f"Is {pasted} or '{dog}' older than file://{cat}, or not", [dog, dog, cat],
         "Is My Dog.png or My Dog.png older than cat.png, or not"),
        (f"{cat} and {pictures / 'text.png'}", [cat], f"cat.png and {pictures / 'text.png'}"),
        ("a/b isn't /c", [], "a/b isn't /c"), (f"x{cat}", [], f"x{cat}"), (f"{cat}\n", [], f"{cat}\n"),
        (f"{pictures / 'gone.png'}", [], str(pictures / "gone.png")), ("/" + "x" * 5000 + ".png", [], None),
    ):  # fmt: skip
        assert dragged(line) == (paths, line if text is None else text)


def test_a_dragged_picture_is_seen_in_a_terminal(seeing: str, pictures: Path) -> None:
    state = pictures / "state"
    with Talk(state, "-m", seeing, TERM="xterm-kitty", TMUX="", STY="", HOME=str(pictures)) as talk:
        talk.type("/image ~/My\t")
        talk.wait_for(lambda: talk.text.endswith(r">>> /image ~/My\ Dog.png"))
        talk.type("\x15")  # erases the line
        rows = talk.say(f"'{pictures / 'My Dog.png'}'")
        assert "64 tokens" in " ".join(rows) and b"\x1b_Ga=T,f=100,q=2" in talk.output
        assert "gone.png cannot be read: No such file" in "".join(talk.say(f"/image {pictures / 'gone.png'}"))
        talk.say(f"Which one is {pictures / 'cat.png'}?")
        talk.type("\x04")
        assert talk.finish() == 0
    asked = messages(state)[0]
    assert asked["content"] == "Which one is cat.png?"
    assert [image["name"] for image in asked["images"]] == ["My Dog.png", "cat.png"]
    for name in ("cat.png", "My Dog.png"):
        (pictures / name).unlink()
    with sqlite3.connect(state / "conversations.db") as db:
        db.execute("DELETE FROM image_uses")
        db.execute("DELETE FROM images WHERE rowid = 2")
    with Talk(state, "-m", seeing, "--continue") as talk:
        assert "dgemma-mlx: cat.png: no longer kept; the model sees only the name\n" in talk.text
        talk.say("And now?")
        rows = talk.say("/show")
        assert "[image: My Dog.png 40x40]" in rows and "[image: cat.png 40x40, gone]" in rows
    assert last_session(state).turns == 2


def test_a_server_gets_data_urls(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with foreign((200, sent(choice(content="A cat"), choice("stop")))) as (url, asked):
        chat = new_chat(url)
        take(chat, f"/image {pictures / 'cat.png'}")
        with pytest.raises(DgemmaError, match=r"text\.png is not a picture"):
            take(chat, f"/image {pictures / 'text.png'}")
        with pytest.raises(DgemmaError, match="a video cannot be sent to a server"):
            take(chat, f"/video {pictures / 'cat.png'}")
        take(chat, "What?")
        assert chat.answer()
    url = f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"
    assert asked[0]["messages"] == [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}
    ]}]  # fmt: skip


def turn(*images: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "What?", "images": list(images)}, {"role": "assistant", "content": "A cat"}]


def test_the_log_keeps_a_file_once_and_as_long_as_a_message_shows_it(log: Log) -> None:
    first, second = image_of("a.png", png(1)), image_of("b.png", png(2))
    one, other = Session(turn(first, second)), Session(turn({**first, "name": "same.png"}))
    log.save(one, "chat")
    log.save(other, "chat")
    one.messages += turn(second)
    log.save(one, "chat")
    assert log.load(str(one.id)) == one and log.load(str(other.id)) == other

    def files() -> int:
        with sqlite3.connect(log.path) as db:
            count: int = db.execute("SELECT count(*) FROM images").fetchone()[0]
            return count

    assert files() == 2
    lines = list(as_text(one, log.entry(str(one.id)))), list(as_markdown(one, log.entry(str(one.id))))
    assert all("[image: a.png 40x40]\n[image: b.png 40x40]\nWhat?" in found for found in lines)
    log.remove([str(one.id)])
    assert files() == 1 and log.load(str(other.id)) == other
    log.remove([str(other.id)])
    assert files() == 0 and base64.b64decode(first["base64"])[-40:] not in log.path.read_bytes()


def test_a_log_of_the_version_before_is_read_and_gets_images(log: Log) -> None:
    log.save(Session(turn()), "chat")
    with sqlite3.connect(log.path) as db:
        db.executescript("DROP TABLE image_uses; DROP TABLE images; PRAGMA user_version = 1")
    session = log.load(str(log.last()))
    assert session.turns == 1
    session.messages += turn(image_of("a.png", png(1)))
    log.save(session, "chat")
    assert log.load(str(session.id)) == session


@pytest.mark.parametrize("change", [
    {"sha256": "0" * 64}, {"base64": "?"}, {"base64": 1}, {"size": [1]}, {"size": 1}, {"name": None}, {"type": "x"},
])  # fmt: skip
def test_a_saved_image_that_is_damaged_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    Session(turn({**image_of("a.png", png(1)), **change})).save(tmp_path / "talk.json")
    with pytest.raises(DgemmaError, match=r"talk\.json: its messages do not make a conversation: message 1: .*image"):
        Session.load(tmp_path / "talk.json")
