"""Incremental decoding of token ids that arrive in pieces. A piece never ends inside a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from dgemma_mlx.text.tokenizer import Tokenizer


class Detokenizer:
    """An incremental decoder: token ids -> text, in time linear in the number of ids.

    A character may consist of up to four byte-fallback tokens. The decoder holds an incomplete character back until its
    last byte arrives. The concatenation of everything that ``feed`` and ``finish`` return equals ``Tokenizer.decode``
    of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool = False) -> None:
        """Create a decoder. ``keep_special`` keeps control tokens in the text, as in ``Tokenizer.decode``."""
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        token_bytes = self._tokenizer.token_bytes
        return self._decoder.decode(b"".join(token_bytes(id, keep_special=self._keep_special) for id in ids))

    def finish(self) -> str:
        """End the text: return U+FFFD for an incomplete character, else "". The next ``feed`` begins a new text."""
        return self._decoder.decode(b"", final=True)
