"""A server in a process of its own: it starts, loads, and ends on a signal, whatever it is doing."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from dgemma_mlx import DgemmaError
from dgemma_mlx.server.listen import listen
from dgemma_mlx.server.settings import ServerSettings
from tests.waiting import wait_until

# The scripted model writes for a long time; each of its steps and each part of a prompt takes a while.
PROGRAM = """
import sys, time
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.server.listen import listen
from dgemma_mlx.server.settings import ServerSettings
from tests.server.scripted import ScriptedNetwork, scripted_model

kind = sys.argv[1]

def load():
    if kind == "slow-load":
        time.sleep(600)
    if kind == "no-model":
        raise DgemmaError("there is no such model", "Name another one.")
    model = scripted_model(lambda prompt: " ".join(map(str, range(9000 if "long" in prompt else 20))))
    extend, project = ScriptedNetwork.extend, ScriptedNetwork.project
    def slow_extend(*arguments):
        time.sleep(600 if kind == "hang" else 0.02)
        extend(*arguments)
    def slow_project(*arguments):
        time.sleep(0.02)
        return project(*arguments)
    ScriptedNetwork.extend, ScriptedNetwork.project = slow_extend, slow_project
    return model

try:
    listen(load, ServerSettings("demo", port=int(sys.argv[2])), lambda port: print(port, flush=True))
except DgemmaError as error:
    sys.exit(f"{error.message}. {error.hint}")
"""


@contextlib.contextmanager
def program(kind: str = "", port: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def get(address: str, key: str) -> object:
    """Return a value of the server's health, or None when it does not listen yet."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/health").json()[key]
    return None


def asking(address: str, text: str = "long") -> contextlib.AbstractContextManager[httpx.Response]:
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    return httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_idle_server_ends_with_0_and_says_nothing(number: int) -> None:
    with program() as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.communicate() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["long", "long " * 400], ids=["denoising", "prefill"])
def test_an_answer_that_is_not_finished_in_time_is_cancelled(text: str) -> None:
    with program() as process:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with asking(address, text) as response:
            wait_until(lambda: get(address, "running") == 1)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                response.read()
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_second_signal_cancels_what_is_written_at_once() -> None:
    with program() as process:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with asking(address) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.TransportError):
                assert "[DONE]" not in "".join(lines)
        assert process.wait(20) == 0


def test_an_answer_that_is_finished_soon_after_a_signal_is_whole() -> None:
    with program() as process:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with asking(address, "short") as response:
            process.send_signal(signal.SIGTERM)
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and "19" in "".join(lines)
        assert process.wait(20) == 0
        assert process.communicate() == ("", "")


@pytest.mark.slow
def test_a_server_whose_thread_hangs_ends_all_the_same() -> None:
    with program("hang") as process:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with contextlib.suppress(httpx.TransportError), asking(address):
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def test_health_answers_and_a_signal_ends_the_server_while_the_model_is_loaded() -> None:
    port = free_port()
    with program("slow-load", port) as process:
        wait_until(lambda: get(f"http://127.0.0.1:{port}", "status") == "loading")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.communicate() == ("", "")


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line() -> None:
    with program("no-model") as process:
        assert process.communicate(timeout=20) == ("", "there is no such model. Name another one.\n")
        assert process.returncode == 1


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, program("slow-load", taken.getsockname()[1]) as process:
        out, line = process.communicate(timeout=20)
        assert (out, process.returncode, line.count("\n")) == ("", 1, 1)
        assert f"port {taken.getsockname()[1]}: Address already in use. End" in line


def test_an_address_of_another_machine_is_told_with_a_hint_of_its_own() -> None:
    settings = ServerSettings("demo", host="192.0.2.1", port=0, api_key="secret")
    with pytest.raises(DgemmaError, match=r"cannot listen on '192\.0\.2\.1'") as caught:
        listen(lambda: pytest.fail("loaded"), settings, print)
    assert caught.value.hint == "Name an address of this machine with --host, such as 127.0.0.1."
