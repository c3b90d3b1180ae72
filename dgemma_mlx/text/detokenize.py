"""Token ids that arrive in pieces -> text, without ever cutting a character in two."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from dgemma_mlx.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text as they arrive, in time linear in their number.

    One character may take up to four byte-fallback tokens; what has arrived of it is held back until it is
    complete. All that ``feed`` and ``finish`` return, joined, equals ``tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        token_bytes = self._tokenizer.token_bytes
        return self._decoder.decode(b"".join(token_bytes(id, keep_special=self._keep_special) for id in ids))

    def finish(self) -> str:
        """U+FFFD for a character that stayed incomplete, else "". The next feed starts afresh."""
        return self._decoder.decode(b"", final=True)
