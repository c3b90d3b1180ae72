"""A loaded checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig
from dgemma_mlx.checks import check_text, shown
from dgemma_mlx.errors import DgemmaError, PromptTooLongError
from dgemma_mlx.generation.pictures import PictureEncoder, PromptIds, read_pictures, with_pictures
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text.chat import ChatTemplate, encode_checked
from dgemma_mlx.text.images import Image, with_images
from dgemma_mlx.text.messages import Message, conversation
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.text.tools import Tool, ToolChoice, chosen, declarations

_BLOCK = 64  # with fewer positions, rarely chosen experts leave MLX's fast path


@dataclass(frozen=True)
class ModelText:
    """What a checkpoint says about prompts and answers: a ``Model`` without its network.

    It takes little memory, stays when the network is unloaded, and any thread may use it at any time.

    Attributes:
        name: The name under which the checkpoint was asked for.
        folder: The folder of the checkpoint.
        config: What ``config.json`` says.
        generation: What ``generation_config.json`` says: the parameters of the denoising loop.
        tokenizer: The checkpoint's tokenizer.
    """

    name: str
    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    tokenizer: Tokenizer

    def encode_prompt(
        self, prompt: str | Sequence[Message], *, system: str | None = None, thinking: bool = False, raw: bool = False,
        tools: Sequence[Tool] | None = None, tool_choice: ToolChoice | None = None,
        images: Sequence[Image] | None = None,
    ) -> PromptIds:
        """Return the ids (P) of a prompt, with its pictures.

        A string is one user turn of the checkpoint's chat template; with ``raw`` it is plain text after a
        beginning-of-text id. A list holds the messages of a conversation (see ``text.messages.conversation``).
        ``images`` stand before the text of the last user message.
        ``system`` adds a system prompt, and ``thinking`` lets the model think first. ``tools`` are those that the model
        may call; with a ``tool_choice`` of "none" the prompt leaves them out, and other choices do not change it.
        Raises ``DgemmaError`` (exit code 2) for anything else, and for images that cannot be read.
        """
        if raw:
            if not isinstance(prompt, str) or system is not None or tools or tool_choice is not None or images:
                raise DgemmaError(
                    "a raw prompt is one text", "It takes no messages, system prompt, tools or images.", exit_code=2
                )
            ids = self.tokenizer.encode(prompt)
            return PromptIds(ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids])
        if not isinstance(prompt, (str, Sequence)):
            raise DgemmaError(f"not a prompt: {shown(prompt)}", "It is a text, or a list of messages.", exit_code=2)
        messages = with_images(prompt, images)
        if system is not None:
            check_text("the system prompt", system)
            messages = [{"role": "system", "content": system}, *messages]
        offered = None if chosen(declarations(tools), tool_choice).names == () else tools
        shown_messages, pictures = read_pictures(conversation(messages), self.config, self.name)
        encoded = encode_checked(
            self.tokenizer, self.template, shown_messages, declarations(offered), enable_thinking=thinking,
            add_generation_prompt=True,
        )  # fmt: skip
        return with_pictures(encoded, pictures, self.config)

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template, read when it is first needed: a raw prompt needs none."""
        return ChatTemplate.load(self.folder)

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raise ``DgemmaError`` when the prompt is empty, or leaves no room for a canvas after it."""
        if not ids:
            raise DgemmaError("the prompt is empty", "Say what you want to know.", exit_code=2)
        limit = self.config.text.max_position_embeddings
        if len(ids) + self.config.canvas_length > limit:
            raise PromptTooLongError(len(ids), self.config.canvas_length, limit)


@dataclass(frozen=True)
class Model(ModelText):
    """A loaded checkpoint: everything that generation needs. ``load`` makes it.

    Attributes:
        network: The text network.
        pictures: The vision tower; None if the checkpoint has none.
        adapter: The folder of the adapter that the network has, or None.
    """

    network: DiffusionGemma
    pictures: PictureEncoder | None = None
    adapter: Path | None = None

    def features_of(self, prompts: Iterable[PromptIds]) -> Callable[[int], mx.array] | None:
        """Return a function from a picture's key to its features (n, M), for the pictures of prompts.

        Returns None when there are no pictures.
        """
        pictures, encoder = {key: each for ids in prompts for key, each in ids.pictures.items()}, self.pictures
        if not pictures:
            return None
        assert encoder is not None, "read_pictures has refused it"
        return lambda key: encoder.features(pictures[key])

    def without_network(self) -> ModelText:
        """Return what is left of the model when its network is unloaded."""
        return ModelText(self.name, self.folder, self.config, self.generation, self.tokenizer)

    def weight_bytes(self) -> int:
        """Return the bytes of memory that the network's weights take."""
        parameters: Any = tree_flatten(self.network.parameters())
        return sum(array.nbytes for _, array in parameters)


def block_length(needed: int, canvas_length: int) -> int:
    """Return the length of a canvas that holds ``needed`` positions: whole blocks of 64, at most ``canvas_length``."""
    return min(canvas_length, -(-needed // _BLOCK) * _BLOCK)
