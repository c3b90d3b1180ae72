"""A prompt of ``generate`` as the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dgemma_mlx.cli.images import kept_image
from dgemma_mlx.cli.log.options import ConversationOptions
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.parameters import AnswerOptions, ModelOptions
from dgemma_mlx.cli.settings import Settings


def begun(
    options: ConversationOptions, settings: Settings, answer: AnswerOptions, model: ModelOptions, system: str | None
) -> tuple[Session, ModelOptions]:
    """Return the conversation that the options choose, or a new one, and the options of the model that answers.

    A conversation that goes on has its own system prompt and model, unless options name others. ``system`` is the
    system prompt of the options or the settings. Raises `DgemmaError` as ``ConversationOptions.open`` does.
    """
    from dgemma_mlx.checkpoint.hub import full_name

    found = options.open(settings)
    session = Session(name=options.session) if found is None else found
    if found is None or answer.system is not None:
        session.system = system
    name = settings.pick("model", session.model if model.model is None else model.model)
    session.model = full_name(name)
    return session, replace(model, model=name)


def asked(
    session: Session, prompt: str, images: Sequence[Mapping[str, Any]] = ()
) -> str | list[dict[str, Any]]:
    """Add the prompt to the conversation, with its images. Return what the model is asked, without the system prompt.

    ``images`` are parts of a message's content.
    """
    earlier = replace(session, system=None).prompt()
    session.add("user", prompt, images=[kept_image(image) for image in images])
    content = [*images, {"type": "text", "text": prompt}] if images else prompt
    return [*earlier, {"role": "user", "content": content}] if earlier or images else prompt
