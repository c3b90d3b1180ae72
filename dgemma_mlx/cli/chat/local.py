"""A conversation with a model that is loaded in this process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dgemma_mlx.checkpoint.config import LOOP_FIELDS
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.loading import in_bytes
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_mlx.checkpoint.config import GenerationConfig
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.prompt_cache import PromptCache


class LocalChat(Chat):
    """A conversation with a loaded model.

    Attributes:
        model: The model that answers.
    """

    def __init__(
        self, model: Model, session: Session, defaults: dict[str, Any], *, draw: bool,
        cache: PromptCache | None = None, opener: Callable[[str | None], Callable[[], Model]] | None = None,
    ) -> None:
        """``defaults`` are the settings that ``/set`` has not changed. ``cache`` holds the prompt encoded so far.

        ``opener`` returns a function that loads the model with a name, and raises `DgemmaError` where there is none.
        Without it the model cannot be switched.
        """
        from dgemma_mlx.generation.prompt_cache import PromptCache

        super().__init__(session, defaults, draw=draw)
        self.model = model
        self._cache = cache or PromptCache()
        self._opener = opener

    @property
    def model_name(self) -> str:
        """Name of the loaded model."""
        return self.model.name

    @property
    def positions(self) -> int:
        """Number of positions that the model supports."""
        return self.model.config.text.max_position_embeddings

    @property
    def used(self) -> int | None:
        """Number of positions that the conversation takes; None when it has images that the model does not read."""
        try:
            return len(self.model.encode_prompt(self.session.prompt())) if self.session.messages else 0
        except DgemmaError:  # the next answer says why
            return None

    def models(self) -> list[tuple[str, str]]:
        """Return the demo and the models in the Hub's cache, with their sizes."""
        from dgemma_mlx.checkpoint.cached import cached_models
        from dgemma_mlx.checkpoint.hub import DEMO

        whole = (model for model in cached_models() if model.state == "whole")
        return [(DEMO, "built in"), *((model.name, size(model.bytes_on_disk)) for model in whole)]

    def switch(self, name: str) -> None:
        """Load another model, after the memory of this one is free. When that fails, load this one again."""
        if self._opener is None:
            hint = "The file holds the prompt of one model. Start another chat with -m."
            raise DgemmaError("/model cannot be combined with --prompt-cache", hint)
        from dgemma_mlx.checkpoint.hub import full_name

        load, load_again = self._opener(name), self._opener(self.session.model)
        self._release()
        try:
            self.model = load()
            self.check()
        except BaseException:
            self._release()
            self.model = load_again()
            raise
        self.session.model = full_name(name)

    def _release(self) -> None:
        """Drop the model and the encoded prompt, which refer to its weights."""
        from dgemma_mlx.generation.prompt_cache import PromptCache

        self._cache = PromptCache()
        with suppress(AttributeError):  # the other model was never there
            del self.model

    def generation(self) -> GenerationConfig:
        """Return the parameters of the denoising loop. Raises `DgemmaError` when they contradict each other."""
        return self.model.generation.override(**{name: self.setting(name) for name in LOOP_FIELDS})

    def check(self) -> None:
        """Raise `DgemmaError` when parameters of the denoising loop contradict each other."""
        self.generation()

    def value_in_force(self, name: str) -> Any:
        """Return the value of a setting: the checkpoint's own value when nothing else was chosen."""
        value = self.setting(name)
        return getattr(self.model.generation, name, None) if value is None else value

    def tokens_of(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.model.tokenizer.encode(text))

    @property
    def reads_images(self) -> bool:
        """Whether the checkpoint has a vision tower."""
        return self.model.config.vision is not None

    def look(self, part: Mapping[str, Any]) -> int:
        """Return the number of tokens of an image or video, a part of a message."""
        return sum(id < 0 for id in self.model.encode_prompt([{"role": "user", "content": [part]}]))

    def _run(self, seed: int | None, cancelled: Callable[[], bool]) -> Done:
        """Generate an answer and show it."""
        from dgemma_mlx.generation.api import stream

        self._make_room()
        view = self._view(self.model.tokenizer, self.model.generation.eos_token_ids)
        events = stream(
            self.model, self.session.prompt(), max_tokens=self.setting("max_tokens"), seed=seed,
            temp=self.setting("temp"), thinking=self.setting("thinking"), generation=self.generation(),
            speed=self.setting("speed"), verify=self.setting("verify"),
            memory_limit=in_bytes(self.setting("memory_limit")), prompt_cache=self._cache, cancelled=cancelled,
            encoded=None if view is None else view.encoded,
        )  # fmt: skip
        return self._show(events, view)

    def _make_room(self) -> None:
        """Drop the oldest turns when the conversation and an answer no longer fit into the model's positions.

        Raises `DgemmaError` when the last message alone does not fit.
        """
        positions, canvas = self.model.config.text.max_position_embeddings, self.model.config.canvas_length
        answer = max(canvas, min(self.setting("max_tokens"), positions // 4))
        starts = self.session.questions

        def length(turn: int) -> int:
            """Return the number of tokens of the conversation from this turn on."""
            return len(self.model.encode_prompt(self.session.prompt(starts[turn]), thinking=self.setting("thinking")))

        if length(0) <= positions - answer:
            return
        last = len(starts) - 1
        if (alone := length(last)) > positions - canvas:
            raise DgemmaError(
                f"the message is too long: its {alone:,} tokens and a canvas of {canvas} exceed the model's limit of "
                f"{positions:,} positions", "Send less of it. The conversation has not changed.",
            )  # fmt: skip
        dropped = bisect_left(range(last), True, key=lambda turn: length(turn) <= positions - answer)
        if dropped:
            self._forget(dropped)
