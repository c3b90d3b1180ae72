"""The other machines behind the server, each with the whole model: which of them answers a question, and its events.

Rank 0 has the HTTP server and answers as well. A question goes to the machine with the fewest; of several, to the one
that may have encoded the longest part of its prompt before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from queue import SimpleQueue
from typing import Any

from dgemma_mlx.distributed.channel import Channel, MachineLostError, Message
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.team import committed_from, done_from, draft_from, request_message
from dgemma_mlx.generation.worker import End
from dgemma_mlx.server.admission import Admission
from dgemma_mlx.server.question import Question

Receive = Callable[[Any], None]  # takes the events of an answer, and an End after the last one, on any thread
Begin = Callable[[Receive], Callable[[], None]]  # begins an answer, and returns a function that cancels it


class Machine:
    """Another machine.

    Attributes:
        rank: Its rank.
        admission: Its requests that wait and work. For the event loop only.
        prompts: The prompts that it has answered last. For the event loop only.
        room: Bytes for its requests; None until it is ready, and after it is lost.
        requests: Its requests by their numbers. ``Machines`` guards them.
        outbox: What is to be sent to it.
    """

    def __init__(self, rank: int, most: int, prompts: int) -> None:
        """``most`` bounds the requests, ``prompts`` the prompts that are remembered."""
        self.rank = rank
        self.room: float | None = None
        self.admission = Admission(most, lambda: self.room or 0)
        self.prompts: deque[Sequence[int]] = deque(maxlen=prompts)
        self.requests: dict[int, _Request] = {}
        self.outbox: SimpleQueue[Message] = SimpleQueue()


class _Request:
    """A request that another machine answers."""

    def __init__(self, receive: Receive, begin_here: Begin, tell_cancelled: Callable[[], None]) -> None:
        self._receive, self._begin_here, self._cancel = receive, begin_here, tell_cancelled
        self._lock = threading.Lock()
        self._has_committed = self._is_cancelled = False

    def hear(self, message: Message) -> bool:
        """Take a message about the answer. Return whether it is the last one."""
        item = event_from(message)
        self._has_committed = self._has_committed or isinstance(item, Committed)
        self._receive(item)
        return isinstance(item, End)

    def lose(self, error: MachineLostError) -> None:
        """Ask this machine instead, unless the client has seen a part of the answer."""
        with self._lock:
            if self._is_cancelled:
                end: BaseException = Cancelled()
            elif self._has_committed:
                end = DgemmaError(f"{error.message} in the middle of the answer", "Ask again.")
            else:
                try:
                    self._cancel = self._begin_here(self._receive)
                    return
                except DgemmaError:  # the server ends
                    end = Cancelled()
        self._receive(End(end))

    def cancel(self) -> None:
        """Ask whoever answers to stop."""
        with self._lock:
            self._is_cancelled = True
            self._cancel()


class Machines:
    """The other machines behind a server.

    Attributes:
        machines: Each of them.
    """

    def __init__(
        self, channel: Channel, most: int, prompts: int, lost: Callable[[MachineLostError], None] = lambda _: None
    ) -> None:
        """``most`` and ``prompts`` are those of each ``Machine``; ``lost`` is told of those that are lost."""
        self._channel, self._lost = channel, lost
        self._numbers = count()
        self._lock = threading.Lock()
        self._own_prompts: deque[Sequence[int]] = deque(maxlen=prompts)
        self.machines = [Machine(rank, most, prompts) for rank in channel.peers]
        for machine in self.machines:
            threading.Thread(target=self._read, args=(machine,), daemon=True).start()
            threading.Thread(target=self._write, args=(machine,), daemon=True).start()

    def choose(self, ids: Sequence[int], here: int) -> Machine | None:
        """Return the machine that answers a prompt (P), or None for this one, which has ``here`` requests.

        For the event loop only.
        """
        chosen, prompts = None, self._own_prompts
        least = here, -_common(ids, prompts)
        for machine in self.machines:
            standing = machine.admission.here, -_common(ids, machine.prompts)
            if machine.room is not None and standing < least:
                chosen, prompts, least = machine, machine.prompts, standing
        prompts.append(ids)
        return chosen

    def submit(self, machine: Machine, message: Message, receive: Receive, begin_here: Begin) -> Callable[[], None]:
        """Let a machine answer, and return a function that cancels the answer.

        ``begin_here`` lets this machine answer, in case that the other one is lost.
        """
        number = next(self._numbers)
        request = _Request(receive, begin_here, lambda: machine.outbox.put({"cancel": number}))
        with self._lock:
            is_lost = machine.room is None
            if not is_lost:
                machine.requests[number] = request
        if is_lost:
            request.lose(MachineLostError(machine.rank, f"{self._channel.peers[machine.rank]} has ended"))
        else:
            machine.outbox.put({"ask": number, **message})
        return request.cancel

    def _read(self, machine: Machine) -> None:
        """Read what a machine says until it is lost."""
        try:
            machine.room = self._channel.receive(machine.rank)["room"]
            while True:
                message = self._channel.receive(machine.rank)
                if machine.requests[message["number"]].hear(message):
                    with self._lock:
                        del machine.requests[message["number"]]
        except MachineLostError as error:
            with self._lock:
                machine.room, requests = None, machine.requests
                machine.requests = {}
            self._lost(error)
            for request in requests.values():
                request.lose(error)

    def _write(self, machine: Machine) -> None:
        """Send what is to be sent until the machine is lost. The event loop must not wait for one that is stopped."""
        try:
            while True:
                self._channel.send(machine.outbox.get(), machine.rank)
        except MachineLostError:  # the other thread says so
            return


def _common(ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> int:
    """Return how many ids the prompt shares from its beginning with one of the others, at most."""

    def with_one(other: Sequence[int]) -> int:
        shorter = min(len(ids), len(other))
        return next((place for place in range(shorter) if ids[place] != other[place]), shorter)

    return max(map(with_one, prompts), default=0)


def message_of(question: Question, options: GenerationOptions, wanted: int) -> Message:
    """Return what another machine is told of a question, of which ``wanted`` tokens may be written, as JSON.

    Raises ``DgemmaError`` for a prompt with a video.
    """
    return {
        **request_message({"prompt": question.prompt}), "raw": question.raw, "thinking": question.thinking,
        "tools": question.tools, "tool_choice": question.tool_choice, "response_format": options.response_format,
        "max_tokens": wanted, "seed": question.seed, "temp": options.temp, "speed": options.speed,
        "drafts": question.drafts,
    }  # fmt: skip


def event_from(message: Message) -> Draft | Committed | Done | End:
    """Return the event that a message of ``server.follower`` holds."""
    kind, value = message["kind"], message["event"]
    if kind == "draft":
        return draft_from(value)
    if kind == "committed":
        return committed_from(value)
    if kind == "done":
        return done_from(value)
    if kind == "cancelled":
        return End(Cancelled())
    return End(None if value is None else DgemmaError(*value))
