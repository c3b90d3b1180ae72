"""Encoding of text that must come back from its ids byte for byte."""

from __future__ import annotations

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer


def encode_exactly(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text that a person wrote, so that ``Tokenizer.decode`` returns the same text, byte for byte.

    ``Tokenizer.encode`` reads U+2581 as a space, because vocabularies write a space as ``▁``. Here its three bytes are
    byte-fallback tokens. Raises ``DgemmaError`` (exit code 2) when the text does not come back: for lone surrogates,
    and for characters that the vocabulary lacks or that the tokenizer replaces.
    """
    first, *others = text.split("▁")
    spelled = [id for byte in "▁".encode() if (id := tokenizer.id_of_bytes(bytes([byte]))) is not None]
    ids = tokenizer.encode(first)
    for other in others:
        ids += spelled + tokenizer.encode(other)
    back = tokenizer.decode(ids)
    if back != text:
        place = next((i for i, pair in enumerate(zip(text, back, strict=False)) if len(set(pair)) > 1), len(back))
        raise DgemmaError(
            f"this model's tokenizer cannot keep {text[place : place + 1]!a}, character {place + 1:,} of {shown(text)}",
            "Leave the character out.", exit_code=2,
        )  # fmt: skip
    return ids
