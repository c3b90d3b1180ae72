"""Images on the command line: what the options read, refuse, show and keep."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli import app as program
from dgemma_mlx.cli.batch import _messages, read_batch
from dgemma_mlx.cli.images import kept_image
from dgemma_mlx.cli.log.asking import asked
from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError
from tests.vision.seeing import drawn, png, write_blind, write_seeing
from tests.vision.test_video import video

Run = Callable[..., tuple[int, str, str]]


def picture(path: Path, color: str = "red", size: tuple[int, int] = (40, 30)) -> Path:
    """Write a picture of one color."""
    from PIL import Image

    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process, in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DGEMMA_MAX_DENOISING_STEPS", "2")
    monkeypatch.setenv("DGEMMA_MAX_TOKENS", "8")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dgemma-mlx", *arguments])
        out, into = os.pipe()
        with open(into, "wb") as pipe:
            pipe.write(stdin)
        with os.fdopen(out) as file:
            monkeypatch.setattr("sys.stdin", file)
            code = program.run()
        printed, err = capsys.readouterr()
        return code, printed, err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a", "--image", "https://example.com/a.png"], "--image: https://example.com/a.png is an address"),
        (["generate", "a", "--image", "gone.png"], "--image: gone.png cannot be read: No such file"),
        (["generate", "a", "--image", "."], "--image: . cannot be read: "),
        (["generate", "a", "--image", "t.txt"], "t.txt is not a picture that Pillow reads"),
        (["choose", "a", "--from", "b,c", "--image", "-"], "standard input is empty"),
        (["generate", "a", "--image", "pipe"], "--image: pipe is not a file"),
        (["generate", "a", "--video", "gone.mp4"], "--video: gone.mp4 cannot be read: No such file"),
        (["generate", "a", "--video", "-"], "--video cannot read standard input"),
        (["generate", "a", "--image", "a.png", "--image-budget", "71"], "--image-budget cannot be 71"),
        (["generate", "a", "--image-budget", "70"], "--image-budget needs --image"),
        (["generate", "a", "--image", "-", "--image", "-"], "--image - can be given once"),
        (["generate", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["generate", "-", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["generate", "a", "-f", "-", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["generate", "a", "--raw", "--image", "a.png"], "--raw cannot be combined with --image"),
        (["generate", "a", "--raw", "--video", "a.png"], "--raw cannot be combined with --video"),
        (["generate", "--batch", "b.jsonl", "--image", "a.png"], "--batch cannot be combined with --image"),
        (["fill", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["fill", "--raw", "--image", "a.png", "t.txt"], "--raw cannot be combined with --image"),
        (["fill", "--prefix-file", "-", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["edit", "a", "-", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["choose", "--from", "a,b", "--image", "-"], "standard input cannot be the image and the text at once"),
        (["choose", "q", "--from", "a,b", "--image", "gone.png"], "--image: gone.png cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line_before_a_model_is_loaded(run: Run, arguments: list[str], words: str) -> None:
    picture(Path("a.png"))
    Path("b.jsonl").write_text('"a"\n')
    Path("t.txt").write_text("a ___")
    os.mkfifo("pipe")
    code, out, err = run(*arguments, "-m", "gone/model")  # which would be an error of another kind
    first, hint, *more = err.splitlines()
    assert (code, out, more) == (2, "", [])
    assert first.startswith(f"dgemma-mlx: {words}") and hint.startswith("hint: ")


def test_a_terminal_is_not_an_image(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with open(master, "rb"), os.fdopen(slave) as terminal:
        monkeypatch.setattr("sys.argv", ["dgemma-mlx", "generate", "a", "--image", "-", "-m", "gone/model"])
        monkeypatch.setattr(sys, "stdin", terminal)
        assert program.run() == 2


def test_a_missing_library_is_named_before_a_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(Path("a.png"))
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    assert "reading videos needs PyAV" in run("generate", "a", "--video", "a.png", "-m", "gone/model")[2]
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert run("generate", "a", "--image", "a.png", "-m", "gone/model")[::2] == (
        2, "dgemma-mlx: reading images needs Pillow\nhint: Run pip install pillow, or pipx inject dgemma-mlx pillow.\n"
    )  # fmt: skip


def test_a_model_without_a_tower_says_so(run: Run) -> None:
    picture(Path("a.png"))
    Path("t.txt").write_text("a ___")
    write_blind(Path("blind"))
    Path("blind/model.safetensors").write_bytes(b"no weights")  # which are not read for this
    for command in (["generate", "a"], ["fill", "t.txt"], ["edit", "a", "t.txt"], ["choose", "a", "--from", "b,c"]):
        code, _, err = run(*command, "-m", "./blind", "--image", "a.png")
        assert code == 2 and err.splitlines()[0] == (
            "dgemma-mlx: ./blind reads no images: the checkpoint has no vision tower"
        )


def test_a_batch_checks_the_images_of_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("a.png"))
    file = Path("b.jsonl")
    file.write_text('{"prompt": "a", "images": ["a.png"]}\n"b"\n')
    with_budget, without = read_batch(file, budget={"budget": 70})
    assert with_budget["images"] == [{"type": "image", "path": "a.png", "budget": 70}] and "images" not in without
    assert read_batch(file)[0]["images"] == [{"type": "image", "path": "a.png"}]
    for images, words in (
        (["gone.png"], "images: gone.png cannot be read: No such file"), ("a.png", "images cannot be"),
        ([1], "images cannot be"), ([""], "images cannot be"), (["http://a/b.png"], "images: http://a/b.png is an"),
        (["a\0.png"], "images: a\\x00.png cannot be read: embedded null byte"),
    ):  # fmt: skip
        file.write_text(f'"a"\n{json.dumps({"prompt": "a", "images": images})}\n')
        with pytest.raises(DgemmaError) as caught:
            read_batch(file)
        assert caught.value.message.startswith(f"b.jsonl, line 2: {words}") and caught.value.exit_code == 2


def test_a_conversation_keeps_the_files_and_shows_the_images_again(tmp_path: Path) -> None:
    session = Session()
    path = picture(tmp_path / "a.png")
    shown = {"type": "image", "path": str(path), "budget": 70}
    assert asked(session, "one", [shown]) == [{"role": "user", "content": [shown, {"type": "text", "text": "one"}]}]
    session.add("assistant", "two")
    asked(session, "three", [{"type": "image", "bytes": b"123"}])
    session.add("assistant", "four")
    session.save(tmp_path / "kept.json")
    data = path.read_bytes()
    path.unlink()
    again = Session.load(tmp_path / "kept.json")
    kept = again.messages[0]["images"][0]
    assert (kept["name"], kept["size"], kept["budget"]) == ("a.png", [40, 30], 70)
    assert asked(again, "five") == [
        {"role": "user", "content": [{"type": "image", "base64": base64.b64encode(data).decode(), "budget": 70},
                                     {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "image", "base64": "MTIz"}, {"type": "text", "text": "three"}]},
        {"role": "assistant", "content": "four"}, {"role": "user", "content": "five"},
    ]  # fmt: skip


@pytest.mark.parametrize("images", [[1], "a", [{"type": "image"}], [{"type": "image", "path": 1}], {"a": 1}])
def test_damaged_images_of_a_kept_conversation_are_named(tmp_path: Path, images: object) -> None:
    session = Session([{"role": "user", "content": "a", "images": images}, {"role": "assistant", "content": "b"}])
    session.save(tmp_path / "kept.json")
    with pytest.raises(DgemmaError, match="its messages do not make a conversation"):
        Session.load(tmp_path / "kept.json")


def test_the_log_of_a_batch_holds_texts_and_images(tmp_path: Path) -> None:
    parts = [{"type": "image", "base64": "aGk="}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"},
              {"role": "user", "content": "d"}]  # fmt: skip
    path = picture(tmp_path / "a.png")
    first, second, third = _messages(prompt, [{"type": "image", "path": str(path)}])
    assert [first["content"], second["content"], third["content"]] == ["ab", "c", "d"]
    assert first["images"][0]["base64"] == "aGk=" and third["images"][0]["name"] == "a.png"
    assert _messages("a", None) == [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that reads images, with random weights in its tower."""
    return str(write_seeing(tmp_path_factory.mktemp("seeing")))


def answered(run: Run, seeing: str, *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    """Run generate --json and return the record. The random model may give an answer without text."""
    code, out, err = run("generate", "-m", seeing, "--seed", "1", "--json", *arguments, stdin=stdin)
    assert code == 0 or "the model gave no answer" in err, err
    record: dict[str, Any] = json.loads(out)
    return record


def test_images_become_soft_tokens_of_the_prompt(run: Run, seeing: str) -> None:
    Path("a.png").write_bytes(png(1))
    Path("b.png").write_bytes(png(2, 80, 20))

    def count(*arguments: str, stdin: bytes = b"") -> int:
        tokens: int = answered(run, seeing, "What is it?", *arguments, stdin=stdin)["statistics"]["prompt_tokens"]
        return tokens

    text = count()
    one, other = count("--image", "a.png") - text, count("--image", "b.png") - text
    assert one == other == 64 + 2  # 8 x 8 and 4 x 16 squares, and two marks around each
    assert count("--image", "a.png", "--image", "b.png") == text + one + other
    assert count("--image", "-", stdin=png(1)) == text + one
    assert count("--image", "a.png", "--image-budget", "140") == text + 121 + 2


def test_a_video_becomes_its_frames(run: Run, seeing: str) -> None:
    Path("a.mp4").write_bytes(video(3))
    Path("a.png").write_bytes(png(1))
    text, *shown = (
        answered(run, seeing, "What?", *words)["statistics"]["prompt_tokens"]
        for words in ([], ["--video", "a.mp4"], ["--video", "a.mp4", "--image", "a.png"])
    )
    assert shown[0] > text + 3 * 50 and shown[1] == shown[0] + 64 + 2


def test_the_saved_prompt_of_a_picture_goes_on_wherever_the_picture_comes_from(run: Run, seeing: str) -> None:
    Path("a.png").write_bytes(png(1))
    drawn(1).save("c.bmp")
    asked = ["Reverse", "--prompt-cache", "kept.cache"]
    first = answered(run, seeing, *asked, "--image", "a.png")
    again = answered(run, seeing, *asked, "--image", "c.bmp")
    assert first["statistics"]["cached_tokens"] == 0 and again["statistics"]["cached_tokens"] > 66
    assert first["text"] == again["text"]
    Path("a.png").write_bytes(png(2))
    other = answered(run, seeing, *asked, "--image", "a.png")
    assert other["statistics"]["cached_tokens"] < 10 and other["tokens"] != first["tokens"]
    code, _, err = run("generate", "-m", seeing, *asked, "--image", "a.png", "--image-attention", "transformers")
    assert code == 1 and err.startswith("dgemma-mlx: kept.cache was computed with") and "attention google" in err


def test_every_command_sees_the_picture(run: Run, seeing: str) -> None:
    for name, seed in (("a.png", 1), ("b.png", 2)):
        Path(name).write_bytes(png(seed))
    Path("t.txt").write_text("a ___:2___ b")
    for command in (
        ["choose", "What?", "--from", "a,b"], ["fill", "t.txt", "--candidates", "1"],
        ["edit", "Do.", "t.txt", "--match", "b", "--candidates", "1"],
    ):  # fmt: skip
        found = []
        for images in ([], ["--image", "a.png"], ["--image", "b.png"]):
            code, out, err = run(*command, "-m", seeing, "--seed", "1", "--json", *images)
            assert code == 0, err
            record = json.loads(out)
            found.append(record.get("choices") or record["candidates"][0]["score"])
        assert found[0] != found[1] != found[2] != found[0]
    kept = [log.load(entry.id).messages[0] for log in [Log()] for entry in log.entries()]
    paths = [[image["name"] for image in message.get("images", [])] for message in kept]
    assert paths == [["b.png"], ["a.png"], []] * 3 and all(isinstance(message["content"], str) for message in kept)


def test_an_answer_about_a_picture_matches_a_schema(run: Run, seeing: str) -> None:
    Path("a.png").write_bytes(png(1))
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    record = answered(run, seeing, "What?", "--image", "a.png", "--json-schema", json.dumps(schema), "-n", "64")
    assert json.loads(record["text"])["color"] in ("red", "blue")


def test_the_lines_of_a_batch_have_their_own_images(run: Run, seeing: str) -> None:
    for name, data in (("a.png", png(1)), ("b.png", png(2)), ("bad.png", b"no picture")):
        Path(name).write_bytes(data)
    images_of_lines = (["a.png", "b.png"], [], ["bad.png"], ["b.png"])
    lines = [json.dumps({"prompt": "What?", "images": images}) for images in images_of_lines]
    Path("b.jsonl").write_text("\n".join(lines))
    code, out, _ = run("generate", "-m", seeing, "--seed", "1", "--batch", "b.jsonl", "--batch-size", "4")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and records[2] == {"index": 2, "error": "bad.png is not a picture that Pillow reads"}
    for record, images in zip(records, images_of_lines, strict=True):
        if "error" in record:
            continue
        alone = answered(run, seeing, "What?", *(word for name in images for word in ("--image", name)))
        assert (record["tokens"], record["text"]) == (alone["tokens"], alone["text"])


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has no such names of files")
def test_a_name_that_is_not_utf_8_is_kept_readable(run: Run, seeing: str) -> None:
    with open(b"\xff.png", "wb") as file:
        file.write(png(1))
    answered(run, seeing, "What?", "--image", os.fsdecode(b"\xff.png"))
    assert "[image: \ufffd.png 40x40]" in run("sessions", "show")[1]
    assert kept_image({"type": "video", "path": os.fsdecode(b"/\xff.mp4")})["path"] == "/\ufffd.mp4"


def test_a_conversation_goes_on_about_its_picture(run: Run, seeing: str) -> None:
    Path("a.png").write_bytes(png(1))
    first = answered(run, seeing, "What?", "--image", "a.png", "--session", "pictures")
    second = answered(run, seeing, "And now?", "--session", "pictures")
    assert second["statistics"]["prompt_tokens"] > first["statistics"]["prompt_tokens"] + 10
    code, out, _ = run("sessions", "show", "pictures")
    assert code == 0 and "[image: a.png 40x40]\nWhat?" in out
    Path("a.png").unlink()
    third = answered(run, seeing, "And then?", "--session", "pictures")
    assert third["statistics"]["prompt_tokens"] > second["statistics"]["prompt_tokens"]


def test_only_a_terminal_is_told_which_picture_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.png").write_bytes(png(1))
    arguments = ["generate", "-m", "./gone", "What?", "--image", "a.png"]  # said before the model is loaded
    assert "a.png" not in run(*arguments)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for options, is_shown in (([], True), (["-q"], False), (["--json"], False)):
        assert ("a.png  40x40" in run(*arguments, *options)[2]) is is_shown
