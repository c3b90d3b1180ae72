"""A plant: the decoder is certain of nothing but padding after a prompt that holds the letter "¿".

``python -m tests.generation.blank_plant ...`` is the command line with this network.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma

PROMPT = "¿"
MARK = 0xBF  # the last byte of the letter, which the demo model's tokenizer writes as a token of its own


def install(set_attribute: Any = setattr) -> None:
    """Replace three methods of the network, with ``monkeypatch.setattr`` or for good."""
    encode, decode, project = DiffusionGemma._encode, DiffusionGemma.decode_layers, DiffusionGemma.project
    decoded: list[PrefixCache] = []

    def encode_and_note(self: DiffusionGemma, ids: mx.array, cache: Any, *rest: Any, **options: Any) -> Any:
        found: Any = (ids == mark).any().item()
        cache.is_blank = getattr(cache, "is_blank", False) or found
        return encode(self, ids, cache, *rest, **options)

    def decode_and_note(self: DiffusionGemma, x: mx.array, cache: PrefixCache, *rest: Any, **options: Any) -> Any:
        decoded[:] = [cache]
        return decode(self, x, cache, *rest, **options)

    def project_or_pad(self: DiffusionGemma, hidden: mx.array) -> mx.array:
        raw = project(self, hidden)
        is_blank = bool(decoded) and getattr(decoded.pop(), "is_blank", False)
        return mx.zeros_like(raw) + 30.0 * (mx.arange(raw.shape[-1]) == 0) if is_blank else raw

    mark = _mark()
    set_attribute(DiffusionGemma, "_encode", encode_and_note)
    set_attribute(DiffusionGemma, "decode_layers", decode_and_note)
    set_attribute(DiffusionGemma, "project", project_or_pad)


def _mark() -> int:
    """The id of the byte ``MARK`` in the demo model's tokenizer."""
    from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
    from dgemma_mlx.text.tokenizer import load_tokenizer

    return load_tokenizer(DEMO_FOLDER).encode(PROMPT)[-1]


if __name__ == "__main__":
    from dgemma_mlx.cli.entry import main

    install()
    main()
