"""``chat --url``: conversations with the model of a server, of this program and of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from dgemma_mlx import load, stream
from dgemma_mlx.cli.chat.connection import Server, ServerError
from dgemma_mlx.cli.chat.remote import RemoteAnswer, RemoteChat
from dgemma_mlx.cli.chat.repl import _check_remote
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.machines import MachineOptions
from dgemma_mlx.cli.parameters import ModelOptions
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft
from dgemma_mlx.server.drafts import Drafts
from dgemma_mlx.server.question import Written
from tests.cli.kept import messages
from tests.cli.terminal import Terminal
from tests.cli.test_conversation import CTRL_C, CTRL_D
from tests.server.live import serving
from tests.server.scripted import scripted_model

KEY = "k3y"
DEFAULTS = {name: kind.default for name, kind in SETTINGS.items()}
WORDS = " ".join(str(number) for number in range(60))
ENDLESS = " ".join(str(number) for number in range(900))  # so that it is still written when it is to be stopped
SCRIPT = {"long": WORDS, "endless": ENDLESS, "think": "<|channel>thought\nHm, so<channel|>Yes."}


def answer(prompt: str) -> str:
    """Answer the last message by the script."""
    return next((text for word, text in SCRIPT.items() if word in prompt.rpartition("<|turn>user")[2]), "Hello")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(lambda: scripted_model(answer), api_key=KEY) as address:
        yield address


def run(url: str, typed: str, state: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "chat", "--url", url, *options], input=typed, capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, "DGEMMA_STATE": str(state), **environment},
    )  # fmt: skip


def test_lines_are_answered_by_the_server(address: str, tmp_path: Path) -> None:
    done = run(f"{address}/v1/", "Hi\nlong\n/stats\n", tmp_path, "--seed", "1", DGEMMA_API_KEY=KEY)
    assert (done.returncode, done.stdout) == (0, f"Hello\n{WORDS}\n")
    assert "prompt tokens" in done.stderr and "seed                 1" in done.stderr
    assert [message["content"] for message in messages(tmp_path)] == ["Hi", "Hello", "long", WORDS]


def test_the_canvas_is_drawn_and_an_answer_can_be_stopped(address: str, tmp_path: Path) -> None:
    environment = {"DGEMMA_STATE": str(tmp_path), "DGEMMA_API_KEY": KEY, "PROMPT_TOOLKIT_NO_CPR": "1"}
    with Terminal(["chat", "--url", address, "--seed", "1"], env=environment) as terminal:
        terminal.wait_for(lambda: terminal.text.endswith(">>>"))
        terminal.type("long\r")
        terminal.wait_for(lambda: WORDS[-8:] in terminal.text and terminal.text.endswith("\n>>>"))
        assert "".join(terminal.text.split()).count("".join(WORDS.split())) == 1
        terminal.type("endless\r")
        terminal.wait_for(lambda: "canvas" in terminal.text)
        terminal.type(CTRL_C)
        terminal.wait_for_text("cancelled")
        terminal.wait_for(lambda: terminal.text.endswith("\n>>>"))
        terminal.type(CTRL_D)
        assert terminal.finish() == 0


@pytest.mark.parametrize(("url", "options", "words", "code"), [
    ("{address}", [], "this server needs an API key", 1),
    ("http://127.0.0.1:1", [], "cannot reach http://127.0.0.1:1: Connection refused", 1),
    ("http://a", ["-m", "demo"], "--url cannot be combined with --model", 2),
])  # fmt: skip
def test_what_goes_wrong_is_one_line_and_a_hint(
    address: str, tmp_path: Path, url: str, options: list[str], words: str, code: int
) -> None:
    done = run(url.format(address=address), "Hi\n", tmp_path, *options)
    error, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (code, "")
    assert error.startswith("dgemma-mlx: ") and words in error and hint.startswith("hint: ")


@pytest.mark.parametrize(("url", "key", "words"), [
    ("{address}", "wrong", "the API key is wrong"), ("http://a", "ö", "no header can hold"),
    ("http://no.invalid", None, "cannot reach http://no.invalid"),
    *((url, None, "not the address of a server") for url in (
        "localhost:8080", "http://", "http://a:99999", "http://[", "ftp://a", "http://a?x", "", "http://a#x")),
])  # fmt: skip
def test_an_address_or_a_key_may_be_wrong(address: str, url: str, key: str | None, words: str) -> None:
    with pytest.raises(DgemmaError, match=words) as raised:
        Server(url.format(address=address), key).models()
    assert raised.value.hint


@pytest.mark.parametrize(("options", "name"), [
    ({"model": "demo"}, "--model"), ({"adapter": Path("x")}, "--adapter"), ({"dtype": "float32"}, "--dtype"),
    ({"no_kernels": True}, "--no-kernels"), ({"cpu_dequantize": "on"}, "--cpu-dequantize"),
])  # fmt: skip
def test_options_of_a_loaded_model_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(DgemmaError, match=f"--url cannot be combined with {name}") as raised:
        _check_remote(ModelOptions(**options), MachineOptions(), None, None, None)
    assert raised.value.exit_code == 2
    for verify, cache, budget in (("flag", None, None), (None, Path("x"), None), (None, None, 70)):
        with pytest.raises(DgemmaError, match="--url cannot be combined with"):
            _check_remote(ModelOptions(), MachineOptions(), verify, cache, budget)
    with pytest.raises(DgemmaError, match="--url cannot be combined with --hostfile"):
        _check_remote(ModelOptions(), MachineOptions(Path("hosts.json")), None, None, None)
    _check_remote(ModelOptions(), MachineOptions(), None, None, None)


def test_a_chat_over_http_imports_no_mlx(address: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dgemma_mlx.cli.app import run\n"
        f"sys.argv = ['dgemma-mlx', 'chat', '--url', {address!r}, '--api-key', {KEY!r}]\n"
        "run()\nprint('mlx' in sys.modules or 'mlx.core' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="Hi\n", capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "DGEMMA_STATE": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "Hello\nFalse\n"


def new_chat(url: str, key: str | None = None) -> RemoteChat:
    return RemoteChat(Server(url, key), Session(), DEFAULTS, draw=False)


def test_thinking_is_shown_apart_and_settings_are_sent(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = new_chat(address, KEY)
    chat.session.settings = {"seed": 7}
    chat.session.add("user", "think")
    assert chat.answer()
    assert capsys.readouterr().out == "Yes.\n"
    assert chat.last is not None and chat.last.seed == 7 and chat.last.finish_reason == "stop"
    assert chat.last.statistics.canvases == 1 and chat.last.statistics.generated_tokens > 0
    chat.session.settings = {"entropy_bound": 1.0}
    with pytest.raises(DgemmaError, match="entropy_bound is chosen by the server"):
        chat.check()


def test_an_answer_that_is_given_up_ends_the_servers_work(address: str) -> None:
    chunks = Server(address, KEY).events(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "long"}], "stream": True}, lambda: False
    )
    next(chunks)
    began = time.monotonic()
    chunks.close()
    assert time.monotonic() - began < 5
    assert httpx.get(f"{address}/health").status_code == 200


def test_drafts_arrive_as_they_were_sent() -> None:
    model = load("demo")
    drafts, answer = Drafts(model.without_network()), RemoteAnswer(0)
    for event in stream(model, "Count from 13 to 40.", seed=1, speed="reference"):
        if isinstance(event, Draft):
            received = answer._draft(json.loads(json.dumps(drafts.draft(event))))
            assert (received.canvas, received.step, received.max_steps) == (event.canvas, event.step, event.max_steps)
            assert received.accepted_mask == event.accepted_mask and received.finished == event.finished
            assert max(abs(a - b) for a, b in zip(received.entropy, event.entropy, strict=True)) < 0.006
            end = next((at for at, id in enumerate(event.tokens) if id in model.generation.eos_token_ids), None)
            shown = b"".join(map(answer.tokens.token_bytes, received.tokens[:end])).decode()
            assert shown == model.tokenizer.decode(event.tokens[:end])
        elif isinstance(event, Committed):
            drafts.wrote(Written(event.text, event.thinking))


class Foreign(BaseHTTPRequestHandler):
    """A server of another program, whose answers a test lists: a status, and the body."""

    answers: list[tuple[int, bytes]]
    asked: list[Any]

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status, body = self.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def foreign(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[Any]]]:
    handler = type("Handler", (Foreign,), {"answers": list(answers), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
        finally:
            server.shutdown()


def sent(*chunks: Any, end: str = "data: [DONE]\n\n") -> bytes:
    return "".join([*(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks), end]).encode()


def choice(reason: str | None = None, **delta: Any) -> Any:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def test_another_programs_server_may_answer(capsys: pytest.CaptureFixture[str]) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "add", "arguments": '{"a": '}}
    rest = {"index": 0, "function": {"arguments": "2}"}}
    body = sent(
        choice(role="assistant", content=None), choice(content="Hi "), choice(content="there"),
        choice(tool_calls=[call]), choice(tool_calls=[rest]), choice("tool_calls"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )  # fmt: skip
    with foreign((200, b": a comment\n\n" + body)) as (url, asked):
        chat = new_chat(url)
        chat.session.add("user", "Hi")
        assert chat.answer()
    assert capsys.readouterr().out == "Hi there\n"
    assert asked[0]["stream"] is True and asked[0]["max_tokens"] == 1024 and "seed" not in asked[0]
    assert isinstance(chat.last, Done)
    assert [(call.name, call.arguments) for call in chat.last.tool_calls] == [("add", {"a": 2})]
    assert (chat.last.statistics.prompt_tokens, chat.last.statistics.generated_tokens) == (3, 2)


@pytest.mark.parametrize(("status", "body", "words"), [
    (200, sent(choice(content="Hi"), end=""), "ended its answer too early"),
    (200, b"<html>Welcome</html>", "ended its answer too early"),
    (200, b"data: <html>\n\n", "does not speak OpenAI's protocol"),
    (200, b"data: [1]\n\n", "does not speak OpenAI's protocol"),
    (200, sent({"error": {"message": "out of\nmemory"}}), "the server says: out of\\nmemory"),
    (200, sent({"choices": [3]}), "the server's answer cannot be read"),
    (200, sent({"choices": [], "dgemma": {"tokens": ["a"], "entropy": []}}), "the server's answer cannot be read"),
    (200, sent({"choices": [], "dgemma": {"statistics": {"seconds": "x"}}}), "the server's answer cannot be read"),
    (200, sent(choice(tool_calls=[{"index": 10**9}])), "the server's answer cannot be read"),
    (500, b"", "the server says: status 500"),
    (503, b'{"error": {"message": "busy"}}', "the server says: busy"),
    (400, b'{"error": "wrong"}', "the server says: status 400"),
])  # fmt: skip
def test_a_server_that_fails_is_one_line(status: int, body: bytes, words: str) -> None:
    with foreign((status, body)) as (url, _):
        chat = new_chat(url)
        chat.session.add("user", "Hi")
        with pytest.raises(DgemmaError) as raised:
            chat.answer()
    assert words in raised.value.message and raised.value.hint


def test_the_oldest_turns_are_forgotten_when_the_server_has_no_room(capsys: pytest.CaptureFixture[str]) -> None:
    full = (400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
    with foreign(full, full, (200, sent(choice(content="Yes"), choice("stop"))), full) as (url, asked):
        chat = new_chat(url)
        for text in ("one", "two", "three"):
            chat.session.add("user", text)
            if text != "three":
                chat.session.add("assistant", "ok")
        assert chat.answer()
        assert [len(body["messages"]) for body in asked] == [5, 3, 1]
        assert "its oldest turn is forgotten" in capsys.readouterr().err
        chat.session.messages = []
        chat.session.add("user", "much")
        with pytest.raises(ServerError, match="too long"):
            chat.answer()
