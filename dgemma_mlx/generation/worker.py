"""One thread that owns MLX: it loads the model and runs every request. Other threads send requests and read events.

MLX binds what is lazy to the thread that made it, and one thread at a time may use a network. A program with several
threads, such as a server, therefore gives all work to a ``Worker``. A program with one thread needs none.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import Any, Generic, TypeVar

import mlx.core as mx

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Encoded
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.scheduler import Scheduler, Standing
from dgemma_mlx.generation.wired import wired_memory

T = TypeVar("T")

# Called on the worker's thread with the model and with a function that says whether to stop; yields the events.
Request = Callable[[Model, Callable[[], bool]], Iterable[T]]


class Worker:
    """A thread that loads a model and runs the requests of all other threads.

        with Worker(lambda: load("demo")) as worker:
            request = lambda model, cancelled: stream(model, "Sort 7 3 5", cancelled=cancelled)
            for event in worker.submit(request):
                ...

    Requests take turns: after a ``Committed`` that is not an answer's last, or an ``Encoded``, another request may go
    on, in the order that ``Scheduler`` describes. A request that yields neither, such as one that yields what ``fill``
    returns, is one turn. Each answer is the one that ``generate`` gives alone. All methods may be called from any
    thread.
    """

    def __init__(
        self, load: Callable[[], Model], *, keep_alive: float | None = None, unload: Callable[[], None] = lambda: None
    ) -> None:
        """Start the thread, which calls ``load`` first.

        After ``keep_alive`` seconds without a request, the thread calls ``unload``, which must let go of everything
        that refers to the network, and frees the model. The next request loads it again. None keeps it until the
        worker is closed, when the same is done.
        """
        self._lock = threading.Lock()
        # The thread must not refer to the worker, so that a worker nobody refers to is closed.
        self._thread = _Thread(load, keep_alive, unload)
        self._thread.start()
        self._close = weakref.finalize(self, self._thread.close)  # also when Python exits

    @property
    def model(self) -> Model:
        """The model, once it is this call's turn. Raises what ``load`` has raised.

        What refers to the model keeps it in memory, even when it is unloaded.
        """
        return next(self.submit(lambda model, _: [model]))

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._thread.is_loaded

    def submit(self, request: Request[T]) -> Submission[T]:
        """Queue a request and return its events.

        ``request(model, cancelled)`` runs on the worker's thread. It returns an iterable, often the result of
        ``stream``, to which it should pass ``cancelled``. Raises ``DgemmaError`` when the worker is closed.
        """
        results: SimpleQueue[T | End] = SimpleQueue()
        return Submission(results, self.submit_to(results.put, request))

    def submit_to(self, receive: Callable[[T | End], None], request: Request[T]) -> Callable[[], None]:
        """Queue a request, and return a function that cancels it.

        ``receive`` is called on the worker's thread with every event, and with an ``End`` after the last one. It must
        not block or raise. Raises ``DgemmaError`` when the worker is closed.
        """
        job: _Job[T] = _Job(request=request, receive=receive)
        with self._lock:
            if self._thread.closing.is_set():
                raise DgemmaError("the worker is closed", "Make a new Worker.")
            self._thread.jobs.put(job)
        return job.cancelled.set

    def close(self) -> None:
        """Cancel all requests, wait until they have ended, and end the thread. A second call does nothing."""
        with self._lock:
            self._thread.closing.set()
        self._close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Submission(Iterator[T]):
    """The events of a request, as an iterator that waits for the next one. It raises what the request has raised.

    A submission that nobody refers to any more is cancelled.
    """

    def __init__(self, results: SimpleQueue[T | End], cancel: Callable[[], None]) -> None:
        self._results, self._cancel = results, cancel
        self._has_ended = False

    def __next__(self) -> T:
        if self._has_ended:
            raise StopIteration
        item = self._results.get()
        if isinstance(item, End):
            self._has_ended = True
            raise StopIteration if item.error is None else item.error
        return item

    def cancel(self) -> None:
        """Ask the request to end. Its remaining events can still be read; an answer's last one is its ``Done``."""
        self._cancel()

    def __del__(self) -> None:
        self.cancel()


@dataclass
class End:
    """The end of a request.

    Attributes:
        error: What the request has raised, or None.
    """

    error: BaseException | None = None


@dataclass(eq=False, kw_only=True)
class _Job(Standing, Generic[T]):
    """A request, and how far it is.

    Attributes:
        request: The request.
        receive: Takes the events, and an ``End`` after the last one.
        cancelled: Set when the request should end.
        events: The events that are still to come.
    """

    request: Request[T]
    receive: Callable[[T | End], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    events: Iterator[T] = field(default_factory=lambda: iter(()))


class _Thread(threading.Thread):
    """The thread that owns MLX.

    Attributes:
        jobs: Requests that the thread has not seen yet. None ends it.
        closing: Set when all requests should end.
        is_loaded: Whether the model is in memory.
    """

    def __init__(self, load: Callable[[], Model], keep_alive: float | None, unload: Callable[[], None]) -> None:
        super().__init__(name="dgemma-mlx", daemon=True)
        self.jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self.closing = threading.Event()
        self._load, self._keep_alive, self._unload = load, keep_alive, unload
        self._model: Model | None = None
        self._failure: BaseException | None = None  # of the first attempt to load
        self._scheduler: Scheduler[_Job[Any]] = Scheduler()
        self._is_last = False  # whether no further job comes

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    def run(self) -> None:
        """Load the model, and let the requests take turns."""
        with wired_memory():
            try:
                self._model = self._load()
            except BaseException as error:
                self._failure = error
                _forget_locals(error)
            while self._wait():
                self._end_cancelled()
                if self._scheduler.waiting:
                    self._take_turn(self._scheduler.next())
            if self.is_loaded:
                self._free_model()
            mx.synchronize()
        # Left to the end of the thread, they abort the process when it exits soon afterwards (MLX 0.32).
        mx.clear_streams()

    def close(self) -> None:
        """End the thread after its requests, which are cancelled."""
        self.closing.set()
        self.jobs.put(None)
        if self is not threading.current_thread():  # a request may hold the last reference to its worker
            self.join()

    def _wait(self) -> bool:
        """Wait until there is a request, and free the model when that takes long. Return False when none will come."""
        self._take_new()
        while not self._scheduler.waiting and not self._is_last:
            try:
                self._take(self.jobs.get(timeout=self._keep_alive if self.is_loaded else None))
            except Empty:
                self._free_model()
        return bool(self._scheduler.waiting)

    def _take_new(self) -> None:
        """Take all requests that were submitted meanwhile."""
        while not self.jobs.empty():
            self._take(self.jobs.get())

    def _take(self, job: _Job[Any] | None) -> None:
        if job is None:
            self._is_last = True
        else:
            job.events = self._events(job)
            self._scheduler.add(job)

    def _events(self, job: _Job[T]) -> Iterator[T]:
        """Yield the events of a job. As this is a generator, a ``StopIteration`` of the request becomes an error."""
        if not self.is_loaded and self._is_cancelled(job):
            raise Cancelled  # nobody waits for what the model would have to be loaded for
        yield from job.request(self._loaded(), lambda: self._is_cancelled(job))

    def _is_cancelled(self, job: _Job[Any]) -> bool:
        return job.cancelled.is_set() or self.closing.is_set()

    def _take_turn(self, job: _Job[Any]) -> None:
        """Run a request until another one may go on, or to its end. Others that are cancelled end meanwhile."""
        while not isinstance(event := self._advance(job), End):
            self._take_new()
            self._end_cancelled()
            if isinstance(event, Encoded):
                job.to_encode = event.total - event.tokens
            elif isinstance(event, Committed) and not event.is_last:
                job.written += len(event.tokens)
            else:
                continue
            self._scheduler.add(job)
            return

    def _end_cancelled(self) -> None:
        """Run the waiting requests that are cancelled to their ends, which are near, so that they hold no memory."""
        for job in self._scheduler.waiting:
            if self._is_cancelled(job):
                self._scheduler.remove(job)
                while not isinstance(self._advance(job), End):
                    pass

    def _advance(self, job: _Job[T]) -> T | End:
        """Run a request to its next event or its end, let its receiver have it, and return it."""
        item: T | End
        try:
            item = next(job.events)
        except StopIteration:
            item = End()
        except BaseException as error:
            _forget_locals(error)
            item = End(error)
        job.receive(item)
        return item

    def _loaded(self) -> Model:
        """Return the model, which is loaded again after it has been freed. Raises what loading raises."""
        if self._failure is not None:
            raise self._failure
        if self._model is None:
            self._model = self._load()
        return self._model

    def _free_model(self) -> None:
        """Free the memory of the model."""
        self._unload()
        self._model = None
        gc.collect()
        mx.clear_cache()


def _forget_locals(error: BaseException) -> None:
    """Clear the local variables of the frames that an exception refers to, on the thread that they belong to.

    A stream among them would stay open as long as the caller keeps the exception, with the lease of its prompt cache,
    and would then be closed on the caller's thread, which must not evaluate what it computes.
    """
    part: BaseException | None = error
    while part is not None:
        clear_frames(part.__traceback__)
        part = part.__context__
