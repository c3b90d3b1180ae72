"""Many clients at once, half of which break off: whether every answer is right, and whether memory stays flat."""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import dgemma_mlx

SERVER = """
import sys
from dgemma_mlx import load
from dgemma_mlx.server.listen import listen
from dgemma_mlx.server.settings import ServerSettings
listen(lambda: load("demo"), ServerSettings("demo", port=0, max_queue=200), lambda port: print(port, flush=True))
"""
SYSTEM = "Hello there. My name is Ana. " * 35  # 531 tokens, enough for a mark that conversations share
AT_ONCE = 8  # of the requests after the load
Answer = tuple[str, str]  # the text and the finish reason


@dataclass(frozen=True)
class Asked:
    """A request, and the answer that ``generate`` gives to it."""

    body: dict[str, Any]
    answer: Answer


@dataclass
class Outcome:
    """What came of all requests.

    Attributes:
        counts: Number of requests by what came of them.
        faults: What went wrong, as text.
        memory: Resident and anonymous bytes of the server over time, with the seconds since the start.
        seconds: Time of each whole answer.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def questions(count: int) -> list[Asked]:
    """Return requests of several kinds, with the answers of ``generate``."""
    model, draw, found = dgemma_mlx.load("demo"), random.Random(1), []
    for number in range(count):
        a, b, c = (draw.randrange(2, 60) for _ in range(3))
        text = (f"Sort {a} {b} {c}", f"What is {a} + {b}?", f"Count from {a} to {a + b % 30}.")[number % 3]
        messages = [{"role": "user", "content": text}]
        if number % 4 == 1:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        if number % 4 == 2:
            more = [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": f"Sort {c} {b} {a}"}]
            messages += more
        done = dgemma_mlx.generate(model, messages, seed=number, max_tokens=200)
        body = {"messages": messages, "seed": number, "max_tokens": 200, "stream": number % 2 == 0}
        found.append(Asked(body, (done.text, done.finish_reason)))
    return found


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """Run a server in a process of its own. Yield its port and its process id."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0, f"the server ended with {process.returncode}"


def load(seconds: float, clients: int, requests: int, kinds: int = 60) -> Outcome:
    """Put load on a server for some seconds, then send further requests that all stay to the end."""
    asked, outcome = questions(kinds), Outcome()
    with server() as (port, pid), watched(pid, outcome):
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                one(port, draw.choice(asked), outcome, draw if number % 2 else None)

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(client, range(clients)))
        outcome.counts["after the load"] = requests
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda number: one(port, asked[number % kinds], outcome, None), range(requests)))
        time.sleep(1.0)
        check_idle(port, outcome)
    return outcome


def one(port: int, asked: Asked, outcome: Outcome, leaving: random.Random | None) -> None:
    """Send one request and compare its answer, or with ``leaving`` break off at some moment."""
    connection, began = http.client.HTTPConnection("127.0.0.1", port, timeout=300), time.perf_counter()
    body = json.dumps(asked.body).encode()
    try:
        if leaving is not None:
            leave(connection, body, leaving)
            outcome.counts["broken off"] += 1
            return
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {data[:200]!r}")
        found = streamed(data) if asked.body["stream"] else whole(data)
        if found != asked.answer:
            raise ValueError(f"{asked.body['messages'][-1]} seed {asked.body['seed']}: {found}, not {asked.answer}")
        outcome.counts["answered"] += 1
        outcome.seconds.append(time.perf_counter() - began)
    except (OSError, http.client.HTTPException, ValueError) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def leave(connection: http.client.HTTPConnection, body: bytes, draw: random.Random) -> None:
    """Break off: within the body, while waiting, or while the answer is read."""
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(len(body)))
    connection.endheaders()
    part = len(body) if draw.random() < 0.9 else draw.randrange(len(body))
    connection.send(body[:part])
    time.sleep(draw.choice((0.0, 0.01, 0.2, 1.0, 5.0)) * draw.random())
    if part == len(body) and draw.random() < 0.5:
        response = connection.getresponse()
        response.read(draw.randrange(1, 400))


def whole(data: bytes) -> Answer:
    """Return the answer of a response in one piece."""
    choice = json.loads(data)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def streamed(data: bytes) -> Answer:
    """Return the answer of a stream, which must end as it should."""
    lines = [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]
    if lines[-1:] != ["[DONE]"]:
        raise ValueError(f"the stream breaks off: {data[-200:]!r}")
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    (reason,) = {choice["finish_reason"] for choice in choices} - {None}
    return "".join(choice["delta"].get("content") or "" for choice in choices), reason


@contextmanager
def watched(pid: int, outcome: Outcome) -> Iterator[None]:
    """Read the memory of a process every half second while the block runs, where the system tells it."""
    ended, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while Path(f"/proc/{pid}/smaps_rollup").exists() and not ended.wait(0.5):
            outcome.memory.append((time.monotonic() - began, *memory(pid)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def memory(pid: int) -> tuple[int, int]:
    """Return the resident and the anonymous bytes of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(re.findall(r"^(Rss|Anonymous):\s+(\d+) kB", text, re.MULTILINE))
    return int(found["Rss"]) * 1024, int(found["Anonymous"]) * 1024


def check_idle(port: int, outcome: Outcome) -> None:
    """Note as a fault what still runs or waits."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    health = json.loads(connection.getresponse().read())
    connection.close()
    if health["running"] or health["waiting"]:
        outcome.faults.append(f"not idle at the end: {health}")


def report(outcome: Outcome) -> bool:
    """Print the figures, and return whether all is as it should be."""
    print(", ".join(f"{count} {what}" for what, count in outcome.counts.items()), f"; {len(outcome.faults)} faults")
    for fault in outcome.faults[:20]:
        print("  fault:", fault)
    ordered = sorted(outcome.seconds)
    print(f"seconds of an answer: median {median(ordered):.2f}, 99 % {ordered[int(0.99 * len(ordered))]:.2f}")
    if not outcome.memory:
        print("this system does not tell the memory of a process")
        return not outcome.faults
    # The first fifth warms up: libraries, the pool of threads, MLX's cache of buffers.
    samples = outcome.memory[len(outcome.memory) // 5 :]
    parts = [samples[i * len(samples) // 4 : (i + 1) * len(samples) // 4] for i in range(4)]
    is_flat = True
    for place, name in ((1, "resident"), (2, "anonymous")):
        medians = [median(sample[place] for sample in part) / 1e6 for part in parts]
        print(f"{name} memory, medians of four quarters: {', '.join(f'{value:.0f}' for value in medians)} MB, "
              f"at most {max(sample[place] for sample in samples) / 1e6:.0f} MB")  # fmt: skip
        is_flat = is_flat and medians[3] <= 1.05 * medians[0]
    if not is_flat:
        print("  fault: memory grows")
    return is_flat and not outcome.faults
