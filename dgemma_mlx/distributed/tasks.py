"""Independent tasks, spread over several machines that all have the same model.

Rank 0 hands out the tasks and works on them as well. A machine gets its next task when it has answered the one before,
so a faster machine does more. The task of a machine that is lost is done by another one.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dgemma_mlx.distributed.channel import Channel, MachineLostError, Message
from dgemma_mlx.errors import DgemmaError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Work(Generic[T, R]):
    """How a kind of task is done.

    Attributes:
        do: Does a task on this machine. It runs on the thread that asks for the results.
        pack: Returns a task as JSON, or raises ``DgemmaError`` for one that only this machine can do.
        unpack: Returns the result of a task, given the answer of another machine.
        hear: Takes what other machines say of a task before they answer it, on a thread of the pool.
    """

    do: Callable[[T], R]
    pack: Callable[[T], Message]
    unpack: Callable[[T, Message], R]
    hear: Callable[[T, Message], None] = lambda task, note: None


class _Job(Generic[T, R]):
    """A task on its way.

    Attributes:
        task: The task.
        work: How it is done.
        answer: The answer of another machine, or None.
        result: A list with the result, once this machine has done the task.
    """

    def __init__(self, task: T, work: Work[T, R]) -> None:
        self.task, self.work = task, work
        self.answer: Message | None = None
        self.result: list[R] = []

    @property
    def is_done(self) -> bool:
        return self.answer is not None or bool(self.result)

    def value(self) -> R:
        """Return the result. Raises the ``DgemmaError`` that the other machine has raised."""
        if self.answer is None:
            return self.result[0]
        if "error" in self.answer:
            raise DgemmaError(*self.answer["error"])
        return self.work.unpack(self.task, self.answer)


class Pool:
    """The machines that work together. Rank 0 has one for as long as it works; on one machine, it does all itself."""

    def __init__(
        self, channel: Channel | None = None, lost: Callable[[MachineLostError], None] = lambda _: None
    ) -> None:
        """Wait, in threads, for the other machines to be ready, which each of them says in its first message.

        ``lost`` is told, on any thread, of a machine that is lost.
        """
        self._channel, self._lost = channel, lost
        self._change = threading.Condition()
        self._waiting: deque[_Job[Any, Any]] = deque()  # for whoever is idle
        self._own: deque[_Job[Any, Any]] = deque()  # for this machine only
        self._bound: dict[int, _Job[Any, Any]] = {}  # for one of the others only, by rank
        self._losses: dict[int, MachineLostError] = {}
        for rank in () if channel is None else channel.peers:
            threading.Thread(target=self._hand_out, args=(rank,), daemon=True).start()

    @property
    def size(self) -> int:
        """The number of machines that answer, with this one."""
        return 1 if self._channel is None else 1 + len(self._channel.alive)

    @property
    def names(self) -> list[str]:
        """The names of the machines, by rank, lost ones among them."""
        others = () if self._channel is None else self._channel.peers.values()
        return [f"{socket.gethostname()} (rank 0)", *map(str, others)]

    def results(self, tasks: Sequence[T], work: Work[T, R]) -> Iterator[R]:
        """Do tasks, and yield their results in order, each as soon as it and those before it are there.

        Raises what ``work.do`` raises here or, if it is a ``DgemmaError``, on another machine.
        """
        jobs = [_Job(task, work) for task in tasks]
        with self._change:
            self._waiting.extend(jobs)
            self._change.notify_all()
        try:
            for job in jobs:
                while (own := self._next_own(job)) is not None:
                    own.result = [work.do(own.task)]
                yield job.value()
        finally:
            with self._change:
                self._waiting.clear()
                self._own.clear()

    def on_each(self, task: T, work: Work[T, R]) -> list[R]:
        """Do the same task on every machine at the same time, and return the results by rank.

        Raises ``MachineLostError`` when one is lost, and as ``results`` does.
        """
        jobs = {} if self._channel is None else {rank: _Job(task, work) for rank in self._channel.peers}
        with self._change:
            self._bound.update(jobs)
            self._change.notify_all()
        own = work.do(task)
        with self._change:
            for rank, job in jobs.items():
                while not job.is_done:
                    if rank in self._losses:
                        raise self._losses[rank]
                    self._change.wait()
        return [own, *(job.value() for job in jobs.values())]

    def say(self, note: Message) -> None:
        """Say something to all other machines, about the tasks that they do. Those that are lost do not hear it."""
        if self._channel is not None:
            for rank in self._channel.alive:
                try:
                    self._channel.send({"note": note}, rank)
                except MachineLostError:  # its thread says so
                    continue

    def _next_own(self, wanted: _Job[Any, Any]) -> _Job[Any, Any] | None:
        """Wait for a task for this machine, and return it; return None once the wanted one is done."""
        with self._change:
            while not wanted.is_done:
                if queue := self._own or self._waiting:
                    return queue.popleft()
                self._change.wait()
        return None

    def _hand_out(self, rank: int) -> None:
        """Give tasks to another machine until it is lost."""
        assert self._channel is not None
        job: _Job[Any, Any] | None = None
        is_bound = False
        try:
            self._channel.receive(rank)
            while True:
                with self._change:
                    while not (rank in self._bound or self._waiting):
                        self._change.wait()
                    is_bound = rank in self._bound
                    job = self._bound.pop(rank) if is_bound else self._waiting.popleft()
                answer = self._answer(rank, job)
                with self._change:
                    if answer is None:
                        self._own.append(job)
                    else:
                        job.answer = answer
                    job = None
                    self._change.notify_all()
        except MachineLostError as error:
            self._losses[rank] = error
            self._lost(error)
        finally:  # also after a fault in this program, which must not let the others wait
            with self._change:
                if job is not None and not is_bound:  # one that is bound to this machine is for no other
                    self._waiting.appendleft(job)
                self._change.notify_all()

    def _answer(self, rank: int, job: _Job[Any, Any]) -> Message | None:
        """Let another machine do a task; return None when it cannot. Raises ``MachineLostError``."""
        assert self._channel is not None
        try:
            message = job.work.pack(job.task)
        except DgemmaError:
            return None
        self._channel.send({"task": message}, rank)
        while "note" in (answer := self._channel.receive(rank)):
            job.work.hear(job.task, answer["note"])
        return answer


Do = Callable[[Message], Message]


def do_tasks(channel: Channel, do: Do) -> Message:
    """Do what rank 0 hands out, on another machine. Return its first message that is no task: other work.

    Raises ``MachineLostError`` when rank 0 has ended.
    """
    channel.send({"ready": True})
    while True:
        message = channel.receive()
        if "note" in message:  # about a task that is done
            continue
        if "task" not in message:
            return message
        try:
            answer = do(message["task"])
        except DgemmaError as error:
            answer = {"error": [error.message, error.hint, error.exit_code]}
        channel.send(answer)
        channel.done += 1
