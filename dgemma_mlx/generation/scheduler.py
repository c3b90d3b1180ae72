"""Which of several requests goes on next, when all of them take turns on one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

_LONGEST_WAITING = 4  # every fourth turn goes to the request that waits longest


@dataclass(eq=False)
class Standing:
    """What the order of turns depends on, for one request.

    Attributes:
        written: Number of tokens that are written.
        to_encode: Number of positions of the prompt that are not encoded yet; 0 before the first turn.
        arrival: Number in the order of arrival, which the scheduler gives; 0 before it has arrived.
    """

    written: int = 0
    to_encode: int = 0
    arrival: int = 0


S = TypeVar("S", bound=Standing)


class Scheduler(Generic[S]):
    """Requests that wait for their turn, which is a canvas, or a part of a prompt.

    A turn goes to the request with the fewest tokens written, so that a short answer does not wait for a long one that
    came before it. Of several, it goes to the one with the least left to encode, and then to the first that came.
    Every fourth turn goes to the request that has waited longest, so that each of them goes on.
    """

    def __init__(self) -> None:
        self._turns = self._arrivals = 0
        self._waiting: list[S] = []  # the one that has waited longest is the first

    @property
    def waiting(self) -> tuple[S, ...]:
        """All requests that wait."""
        return tuple(self._waiting)

    def add(self, request: S) -> None:
        """Let a request wait for its next turn."""
        if not request.arrival:
            self._arrivals += 1
            request.arrival = self._arrivals
        self._waiting.append(request)

    def next(self) -> S:
        """Take out the request whose turn it is. There must be one."""
        self._turns += 1
        if self._turns % _LONGEST_WAITING == 0:
            return self._waiting.pop(0)
        chosen = min(self._waiting, key=lambda each: (each.written, each.to_encode, each.arrival))
        self.remove(chosen)
        return chosen

    def remove(self, request: S) -> None:
        """Take out a request that waits."""
        self._waiting.remove(request)
