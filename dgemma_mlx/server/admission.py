"""Admission: which requests wait, which work at a time, and which are turned away."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dgemma_mlx.generation.memory import Need
from dgemma_mlx.server.errors import ApiError

_RETRY_AFTER = 5  # seconds; about as long as a short answer takes


class Admission:
    """Lets requests begin in the order of their arrival, as long as the memory for all of them is there.

    A request that is alone always begins. The event loop is the only one that calls the methods; any thread may read
    the attributes.

    Attributes:
        need: Memory of the requests that have begun.
    """

    def __init__(self, most: int, limit: Callable[[], float]) -> None:
        """``most`` bounds the requests that wait or work; ``limit`` returns the bytes for all that work at a time."""
        self._most, self._limit = most, limit
        self._entered: set[Place] = set()
        self._waiting: list[Place] = []
        self._begun: set[Place] = set()
        self._elsewhere: set[Place] = set()
        self.need = Need(0, 0)

    @property
    def running(self) -> int:
        """Number of requests that have begun and not ended, with those that work elsewhere."""
        return len(self._begun) + len(self._elsewhere)

    @property
    def waiting(self) -> int:
        """Number of requests that have not begun."""
        return len(self._entered) - self.running

    @property
    def here(self) -> int:
        """Number of requests that wait, and of those that work but not elsewhere."""
        return len(self._entered) - len(self._elsewhere)

    def enter(self) -> Place:
        """Return a place for a request. Raises ``ApiError`` (503) when all are taken."""
        if len(self._entered) >= self._most:
            raise ApiError(
                503, f"the server is busy with {len(self._entered)} requests. Try again later", "server_error",
                code="overloaded", headers={"retry-after": str(_RETRY_AFTER)},
            )  # fmt: skip
        place = Place(self)
        self._entered.add(place)
        return place

    def _wait(self, place: Place) -> None:
        self._waiting.append(place)
        self._admit()

    def _leave(self, place: Place) -> None:
        self._entered.discard(place)
        self._begun.discard(place)
        self._elsewhere.discard(place)
        if place in self._waiting:
            self._waiting.remove(place)
        self._admit()

    def _admit(self) -> None:
        """Let requests begin, the first one that waits first."""
        self.need = _all(place.need for place in self._begun)
        while self._waiting and (not self._begun or _all((self.need, self._waiting[0].need)).total <= self._limit()):
            place = self._waiting.pop(0)
            self._begun.add(place)
            self.need = _all((self.need, place.need))
            place.begin()


def _all(needs: Iterable[Need]) -> Need:
    """Return the memory of several requests, of which one works at a time, and the others hold what they keep."""
    kept, working = zip((0, 0), *needs, strict=True)  # columns
    return Need(sum(kept), max(working))


class Place:
    """The place of one request in the queue, from its arrival to its end.

    Attributes:
        need: Memory of the request.
        begin: Begins the request. Called once, when there is room.
        cancel: Cancels the request, once it has begun.
    """

    need: Need
    begin: Callable[[], None]
    cancel: Callable[[], None]

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    @property
    def has_begun(self) -> bool:
        """Whether the request has begun."""
        return self in self._admission._begun

    def wait(self, need: Need, begin: Callable[[], None]) -> None:
        """Call ``begin`` as soon as there is room for the request, which may be now."""
        self.need, self.begin = need, begin
        self._admission._wait(self)

    def work_elsewhere(self) -> None:
        """Note that the request takes no memory here, because another machine answers it."""
        self._admission._elsewhere.add(self)

    def leave(self) -> None:
        """Give the place to others. A request that waits then never begins; a second call does nothing."""
        self._admission._leave(self)
