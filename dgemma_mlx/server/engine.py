"""The model as the server's handlers see it: questions in, updates out, on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from traceback import format_exception
from typing import Any, TypeVar

from dgemma_mlx.distributed.channel import Message
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Encoded, Event
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.memory import Need, Work, answer_need, device_limit, fitting_budget
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import most_patches
from dgemma_mlx.generation.prompt_cache_folder import PromptCacheFolder
from dgemma_mlx.generation.prompt_caches import PromptCaches
from dgemma_mlx.generation.request import Asked, ask, begin, new_answer
from dgemma_mlx.generation.worker import End, Request, Worker
from dgemma_mlx.infill.fill import Filled
from dgemma_mlx.server.admission import Admission, Place
from dgemma_mlx.server.answering import Answering, Inbox, call_soon, failure
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.images import ImageReader
from dgemma_mlx.server.machines import Begin, Machine, Machines, Receive, message_of
from dgemma_mlx.server.metrics import Metrics
from dgemma_mlx.server.question import Question
from dgemma_mlx.server.settings import ServerSettings
from dgemma_mlx.server.tally import Use, current_tally

T = TypeVar("T")


class Engine:
    """The model behind the server.

    Attributes:
        settings: The server's settings.
        text: The model without its network, once it is loaded.
        metrics: What the server has done.
        admission: The requests that wait and work.
        caches: The prompt caches.
        images: What reads the images of requests.
    """

    text: ModelText

    def __init__(
        self, load: Callable[[], Model], settings: ServerSettings, metrics: Metrics,
        folder: PromptCacheFolder | None = None, machines: Machines | None = None,
    ) -> None:  # fmt: skip
        """Begin the thread of the model. ``folder`` keeps the prompt caches across restarts; ``close`` closes it.

        ``machines`` are others that answer as well.
        """
        self.settings, self.metrics = settings, metrics
        self._load = load
        self.admission = Admission(settings.max_queue, self._room)
        self.caches = PromptCaches(settings.prompt_caches, self._room_for_caches)
        self.images = ImageReader(settings)
        self._folder, self._machines = folder, machines
        self._weights = 0  # bytes
        self._model: Model | None = None  # for the worker's thread
        self._worker = Worker(self._loaded, keep_alive=settings.keep_alive, unload=self._unload)
        # Prompts are encoded and constraints compiled here, so that neither the event loop nor MLX's thread waits.
        self._readers = ThreadPoolExecutor(2, "dgemma-mlx-read")
        self._is_closed = False

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._worker.is_loaded

    @property
    def is_ready(self) -> bool:
        """Whether the model has been loaded once, so that questions can be read."""
        return hasattr(self, "text")

    def start(self) -> None:
        """Begin to load the model."""
        self._first_load = asyncio.ensure_future(asyncio.to_thread(self._read_text))

    async def ready(self) -> None:
        """Wait until the model has been loaded once. Raises what loading has raised."""
        await asyncio.shield(self._first_load)

    async def close(self) -> None:
        """Cancel all work, and end the thread of the model. A second call does nothing."""
        self._is_closed = True
        await asyncio.to_thread(self._worker.close)
        await asyncio.to_thread(self._readers.shutdown)
        self.images.close()
        if self._folder is not None:
            self._folder.close()

    async def read(self, work: Callable[[ModelText], T]) -> T:
        """Run work that needs no network, such as counting the tokens of a prompt, beside the work of the model.

        Raises ``ApiError`` (400) for the errors of the request, and (503) when the server ends.
        """
        if self._is_closed:
            raise failure(Cancelled())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, work, self.text)
        except DgemmaError as error:
            raise ApiError.refused(error) from None

    async def ask(self, question: Question) -> Answering:
        """Check and queue a question. Raises ``ApiError`` before any work when it is at fault, or there is no room."""
        place = self.admission.enter()
        try:
            return await self._ask(question, place)
        except BaseException:
            place.leave()
            raise

    async def _ask(self, question: Question, place: Place) -> Answering:
        """Check a question, and let it begin once there is room."""

        def prepare(text: ModelText) -> tuple[Asked, int, GenerationOptions, Message | None]:
            options = GenerationOptions(
                speed=question.speed or self.settings.speed, temp=question.temp,
                memory_limit=self.settings.memory_limit, response_format=question.response_format,
            )  # fmt: skip
            asked = ask(
                text, question.prompt, options, None, question.thinking, question.raw, question.tools,
                question.tool_choice,
            )
            # Refused here when it would never fit. Other answers and idle prompt caches are left out: they end.
            work = Work(patches=most_patches([asked.ids]))
            fitting_budget(text.config, self._weights, len(asked.ids), self.settings.memory_limit, work)
            room = text.config.text.max_position_embeddings - len(asked.ids)
            wanted = min(question.max_tokens or self.settings.max_tokens or room, room)
            new_answer(text, asked, question.seed, wanted, options)  # raises what is known before any work
            return asked, wanted, options, self._message(question, options, wanted)

        asked, wanted, options, message = await self.read(prepare)
        inbox = Inbox(question)

        def request(model: Model, cancelled: Callable[[], bool]) -> Iterator[Event | Encoded]:
            own = place.need.kept if place.has_begun else 0  # for one that another machine was to answer, nothing
            chosen = replace(options, cancelled=cancelled, memory_limit=self._limit(self.admission, own))
            with self.caches.lease(asked.ids) as prompt_cache:
                runner = begin(model, [asked], [question.seed], [wanted], chosen, prompt_cache)
                for _, event in runner.events():
                    yield event

        current_tally().prompts.append(question.prompt)
        need = answer_need(self.text.config, len(asked.ids), most_patches([asked.ids]))
        begin_here = partial(self._begin, request)
        machine = None
        if self._machines is not None and message is not None:
            machine = self._machines.choose(asked.ids, self.admission.here - 1)  # without this request
        if machine is None or message is None:
            inbox.cancel = self._submit(place, need, inbox.receive, begin_here)
        else:
            begin_there = partial(self._begin_there, machine, message, need, begin_here)
            place.work_elsewhere()
            inbox.cancel = self._submit(place, need, inbox.receive, begin_there, machine.admission.enter())
        return Answering(len(asked.ids), inbox, inbox.cancel)

    async def run(self, work: Callable[[Model, Callable[[], bool]], T]) -> T:
        """Run work on the model that is no answer, such as ``fill``, in its turn, and return its result."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def receive(item: Any) -> None:
            call_soon(future.get_loop(), _settle, future, item)

        begin = partial(self._begin, lambda model, cancelled: [work(model, cancelled)])
        cancel = self._submit(self.admission.enter(), Need(0, 0), receive, begin)
        try:
            return await future
        finally:
            cancel()

    def _message(self, question: Question, options: GenerationOptions, wanted: int) -> Message | None:
        """Return what another machine is told of a question; None when no other can answer it."""
        if self._machines is None:
            return None
        try:
            return message_of(question, options, wanted)
        except DgemmaError:  # a video
            return None

    def _begin(self, request: Request[Any], receive: Receive) -> Callable[[], None]:
        """Let this machine work on a request, and return what cancels it. Raises ``DgemmaError`` when it ends."""
        return self._worker.submit_to(receive, request)

    def _begin_there(
        self, machine: Machine, message: Message, need: Need, begin_here: Begin, receive: Receive
    ) -> Callable[[], None]:
        """Let another machine answer a question, and return what cancels the answer."""
        assert self._machines is not None
        memory = {"memory_limit": self._limit(machine.admission, need.kept), "need": machine.admission.need.total}
        return self._machines.submit(machine, message | memory, receive, begin_here)

    def _limit(self, admission: Admission, own: int) -> int | None:
        """Return the memory limit of a request that keeps ``own`` bytes: what others keep is not there for it."""
        limit = self.settings.memory_limit
        return None if limit is None else limit - (admission.need.kept - own)

    def _submit(
        self, place: Place, need: Need, receive: Receive, begin: Begin, there: Place | None = None
    ) -> Callable[[], None]:
        """Let a request begin once there is room, and return a function for the event loop that cancels it.

        ``there`` is its place on another machine that works on it, or None.
        """
        loop, tally = asyncio.get_running_loop(), current_tally()
        working = there or place

        def leave() -> None:
            working.leave()
            place.leave()

        def receive_there(item: Any) -> None:
            if isinstance(item, (Done, Filled)):
                tally.uses.append(use := Use.of(item))
                call_soon(loop, self.metrics.add_answer, use)
            elif isinstance(item, End):
                self._report(item.error)
                call_soon(loop, leave)
            receive(item)

        def start() -> None:
            try:
                working.cancel = begin(receive_there)
            except DgemmaError:  # the worker is closed
                receive_there(End(Cancelled()))

        def cancel() -> None:
            if working.has_begun:
                working.cancel()
            else:
                leave()

        working.wait(need, start)
        return cancel

    def _loaded(self) -> Model:
        """Load the model and its prompt caches, on the worker's thread."""
        began = time.perf_counter()
        self._model = model = self._load()
        self._weights = model.weight_bytes()
        if self._folder is not None:
            self.caches.keep(self._folder.read(model))
            self.caches.trim()
        if self.is_ready:
            self._log(f"the model is loaded again, in {time.perf_counter() - began:.1f} s")
        return model

    def _unload(self) -> None:
        """Write the prompt caches, and let go of the model, on the worker's thread."""
        if self._folder is not None and self._model is not None:
            self._folder.write(self._model, self.caches.idle())
        self.caches.clear()
        self._model = None

    def _read_text(self) -> None:
        """Wait until the model is loaded, and remember what it says about prompts, but not its network."""
        self.text = self._worker.model.without_network()

    def _report(self, error: BaseException | None) -> None:
        """Log what has gone wrong in the program itself. Other errors are told to the client only."""
        if error is not None and not isinstance(error, (DgemmaError, Cancelled)):
            self._log("".join(format_exception(error)).rstrip())

    def _log(self, text: str) -> None:
        self.settings.log(f"{time.strftime('%H:%M:%S')} {text}")

    def _room(self) -> float:
        """Return the bytes that answers and prompt caches may take. Prompt caches give way to answers."""
        limit = self.settings.memory_limit
        return (device_limit() if limit is None else limit) - self._weights

    def _room_for_caches(self) -> float:
        """Return the bytes for prompt caches that no answer uses."""
        return self._room() - self.admission.need.total


def _settle(future: asyncio.Future[Any], item: Any) -> None:
    """Give a future what the worker has sent, unless nobody waits for it any more."""
    if future.done():
        return
    if not isinstance(item, End):
        future.set_result(item)
    elif item.error is not None:
        future.set_exception(failure(item.error))
