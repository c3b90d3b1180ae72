"""One thread that owns MLX: it loads the model and runs every request. Other threads send requests and read events.

MLX binds what is lazy to the thread that made it, and one thread at a time may use a network. A program with several
threads, such as a server, therefore gives all work to a ``Worker``. A program with one thread needs none.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from traceback import clear_frames
from typing import Any, Generic, TypeVar

import mlx.core as mx

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.wired import wired_memory

T = TypeVar("T")

# Called on the worker's thread with the model and with a function that says whether to stop; yields the events.
Request = Callable[[Model, Callable[[], bool]], Iterable[T]]


class Worker:
    """A thread that loads a model and runs requests, one after the other, in the order of their submission.

        with Worker(lambda: load("demo")) as worker:
            request = lambda model, cancelled: stream(model, "Sort 7 3 5", cancelled=cancelled)
            for event in worker.submit(request):
                ...

    All methods may be called from any thread.
    """

    def __init__(self, load: Callable[[], Model]) -> None:
        """Start the thread, which calls ``load`` first."""
        self._model: Future[Model] = Future()
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()  # None ends the thread
        self._lock, self._closing = threading.Lock(), threading.Event()
        # The thread must not refer to the worker, so that a worker nobody refers to is closed.
        thread = threading.Thread(
            target=_run, args=(load, self._model, self._jobs, self._closing), name="dgemma-mlx", daemon=True
        )
        thread.start()
        self._close = weakref.finalize(self, _close, thread, self._jobs, self._closing)  # also when Python exits

    @property
    def model(self) -> Model:
        """The model, once it is loaded. Waits for it, and raises what ``load`` has raised."""
        return self._model.result()

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
        job: _Job[T] = _Job(request, receive)
        with self._lock:
            if self._closing.is_set():
                raise DgemmaError("the worker is closed", "Make a new Worker.")
            self._jobs.put(job)
        return job.cancelled.set

    def close(self) -> None:
        """Cancel all requests, wait until they have ended, and end the thread. A second call does nothing."""
        with self._lock:
            self._closing.set()
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


@dataclass
class _Job(Generic[T]):
    """A request in the queue.

    Attributes:
        request: The request.
        receive: Takes the events, and an ``End`` after the last one.
        cancelled: Set when the request should end.
    """

    request: Request[T]
    receive: Callable[[T | End], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


def _run(
    load: Callable[[], Model], loaded: Future[Model], jobs: SimpleQueue[_Job[Any] | None], closing: threading.Event
) -> None:
    """Load the model and run all jobs: the whole life of the thread."""
    with wired_memory():
        try:
            loaded.set_result(load())
        except BaseException as error:
            loaded.set_exception(error)
            _forget_locals(error)
        while (job := jobs.get()) is not None:
            job.receive(End(_run_job(job, loaded, closing)))
            del job  # an ended request must not stay alive while the thread waits for the next one
        mx.synchronize()
    mx.clear_streams()  # left to the end of the thread, they abort the process when it exits soon afterwards (MLX 0.32)


def _run_job(job: _Job[Any], loaded: Future[Model], closing: threading.Event) -> BaseException | None:
    """Run one job, and return what it has raised."""
    try:
        for event in _events(job, loaded, closing):
            job.receive(event)
    except BaseException as error:
        _forget_locals(error)
        return error
    return None


def _events(job: _Job[T], loaded: Future[Model], closing: threading.Event) -> Iterator[T]:
    """Yield the events of a job. As this is a generator, a ``StopIteration`` of the request becomes an error."""
    yield from job.request(loaded.result(), lambda: job.cancelled.is_set() or closing.is_set())


def _forget_locals(error: BaseException) -> None:
    """Clear the local variables of the frames that an exception refers to, on the thread that they belong to.

    A stream among them would stay open as long as the caller keeps the exception, with the lease of its prompt cache,
    and would then be closed on the caller's thread, which must not evaluate what it computes.
    """
    part: BaseException | None = error
    while part is not None:
        clear_frames(part.__traceback__)
        part = part.__context__


def _close(thread: threading.Thread, jobs: SimpleQueue[_Job[Any] | None], closing: threading.Event) -> None:
    """End the thread after its jobs, which are cancelled."""
    closing.set()
    jobs.put(None)
    if thread is not threading.current_thread():  # a request may hold the last reference to its worker
        thread.join()
