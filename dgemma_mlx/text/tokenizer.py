"""Conversion between text and token ids.

A checkpoint stores its tokenizer as ``tokenizer.json`` (read by the ``tokenizers`` package) or as ``tokenizer.model``
(read by ``sentencepiece``). ``Tokenizer`` hides the difference.

Text comes from two sources, and each source has its own encoding method. In text that a person typed, a control token
such as ``<|turn>`` is seven ordinary characters: ``Tokenizer.encode``. In text that a chat template wrote, the same
characters are one control id: ``Tokenizer.encode_control``. Both methods parse ordinary added tokens (HTML tags, runs
of newlines), as the reference (transformers) does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.backends import Backend, JsonBackend, SentencePieceBackend
from dgemma_mlx.text.tokenizer_config import listed_tokens, named_tokens, read_tokenizer_config

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")
# All characters below U+10000, and of the others enough for each byte that UTF-8 writes them with.
_CODES = (*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 257))


class Tokenizer:
    """A Gemma tokenizer: text -> token ids, and token ids -> text.

    Gemma tokenizers write a space as ``▁``, add no space before the text, and encode characters outside the vocabulary
    as byte-fallback tokens (``<0xE2>``), one per UTF-8 byte. ``load_tokenizer`` creates a tokenizer from a checkpoint
    folder:

        tokenizer = load_tokenizer(Path("path/to/checkpoint"))
        ids = tokenizer.encode("Hello <|turn>")           # typed text: no control token
        prompt = tokenizer.encode_control("<|turn>user")  # template text: starts with the id of <|turn>
        tokenizer.decode(ids)                             # "Hello <|turn>"

    Attributes:
        vocab_size: Number of token ids, added tokens included. It may differ from the model's vocabulary size.
        special_ids: Ids of all control tokens, by their text.
        bos_id: Id of the beginning-of-text token, or None when the tokenizer has none.
        eos_id: Id of the end-of-text token, or None when the tokenizer has none.
        pad_id: Id of the padding token, or None when the tokenizer has none.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any], model_size: int | None = None) -> None:
        """Create a tokenizer. Most callers use ``load_tokenizer`` instead.

        ``config`` is the content of ``tokenizer_config.json``, or empty when the checkpoint lacks the file.
        ``model_size`` is the number of ids that the model has, or None when it is unknown.
        """
        names = named_tokens(config)
        self._backend, self._model_size = backend, model_size
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.control_tokens()
        for text in [*names.values(), *listed_tokens(config)]:
            id = backend.find(text)
            if id is not None and len(text) > 1 and not text.isspace():
                self.special_ids[text] = id
        self.bos_id = self.special_ids.get(names.get("bos_token", ""))
        self.eos_id = self.special_ids.get(names.get("eos_token", ""))
        self.pad_id = self.special_ids.get(names.get("pad_token", ""))
        unk_id = self.special_ids.get(names.get("unk_token", ""))
        self._control_ids = frozenset(self.special_ids.values())
        self._forbidden_ids = self._control_ids - {unk_id}  # an unknown character may legitimately encode to <unk>
        self._control_lengths = sorted({len(text) for text in self.special_ids}, reverse=True)
        first_characters = "".join(sorted({text[0] for text in self.special_ids}))
        self._control_start = re.compile(f"[{re.escape(first_characters)}]" if first_characters else r"(?!)")
        self._token_bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Encode text that a person or another program wrote.

        Control tokens in the text become ordinary tokens, so the result contains no control id. The only exception is
        the id of ``<unk>``, for a character that a vocabulary without byte fallback lacks. No bos is added. Lone
        surrogates become U+FFFD.
        """
        ids = []
        for plain, control in self._split(text):
            ids += self._encode_plain(plain)
            ids += self._spell(control)
        return self._within(ids)

    def encode_control(self, text: str, *, ignore: Sequence[str] = ()) -> list[int]:
        """Encode text that a chat template wrote: control tokens in the text become their ids. No bos is added.

        ``ignore`` lists strings to remove from the text. They are removed after the search for control tokens. A
        control token with one of these strings inside is therefore not recognized, and its characters are plain text.
        """
        ids = []
        for plain, control in self._split(text):
            kept = plain
            for mark in ignore:
                kept = kept.replace(mark, "")
            ids += self.encode(kept)
            if control:
                ids.append(self.special_ids[control])
        return self._within(ids)

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Decode ids to text.

        Control tokens are dropped unless ``keep_special`` is set; unknown ids are always dropped. Bytes that are not
        valid UTF-8 become U+FFFD.
        """
        pieces = (self.token_bytes(id, keep_special=keep_special) for id in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def token(self, id: int) -> str:
        """Return the token as the vocabulary spells it (``▁the``, ``<0xE2>``, ``<|turn>``), or "" for an unknown id."""
        return self._backend.token(id) if id >= 0 else ""

    def token_bytes(self, id: int, *, keep_special: bool = False) -> bytes:
        """Return the UTF-8 bytes that the token adds to the decoded text.

        Returns b"" for an unknown id, and for a control token unless ``keep_special`` is set. The bytes of one token
        need not be whole characters.
        """
        if id in self._control_ids:
            return self.token(id).encode() if keep_special else b""
        if id not in self._token_bytes:
            piece = self.token(id)
            byte = _BYTE.fullmatch(piece)
            self._token_bytes[id] = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        return self._token_bytes[id]

    def id_of_bytes(self, data: bytes) -> int | None:
        """Return the id of a token whose ``token_bytes`` equal ``data``, or None when no token has them.

        A byte-fallback token is returned only when no other token has these bytes.
        """
        pieces = [data.decode("utf-8", "replace").replace(" ", "▁")] + [f"<0x{byte:02X}>" for byte in data[:1]]
        ids = (self._backend.find(piece) for piece in pieces)
        return next((id for id in ids if id is not None and data and self.token_bytes(id) == data), None)

    def is_control(self, id: int) -> bool:
        """Return whether the id belongs to a control token."""
        return id in self._control_ids

    @cached_property
    def unwritable_ids(self) -> frozenset[int]:
        """All ids below ``vocab_size`` that do not occur in the ids of any plain text.

        They are the control tokens, ids without a token, byte-fallback tokens whose byte occurs only in characters that
        have a token of their own, and tokens whose text encodes to other tokens. (No longer text contains a token that
        its own text does not encode to: byte-pair merges within the token are the same in both.) The first access
        encodes every token, which takes one to two seconds for 262,144 of them.
        """
        missing = "".join(c for c in map(chr, _CODES) if self._backend.find("▁" if c == " " else c) is None)
        bytes_needed = frozenset((missing + "▁").encode())  # for `encode_exactly`

        def is_written(id: int) -> bool:
            piece = self.token(id)
            byte = _BYTE.fullmatch(piece)
            return int(byte[1], 16) in bytes_needed if byte else piece != "" and self._backend.encodes_to_itself(id)

        return frozenset(id for id in range(self.vocab_size) if id in self._control_ids or not is_written(id))

    def _within(self, ids: list[int]) -> list[int]:
        """Return the ids. Raises ``DgemmaError`` when the model has no embedding for one of them."""
        if self._model_size is not None and ids and max(ids) >= self._model_size:
            raise DgemmaError(
                f"the tokenizer writes the id {max(ids):,}, but the model has only {self._model_size:,} ids",
                "The tokenizer belongs to another model. Fetch the checkpoint again.",
            )
        return ids

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        """Split text at its control tokens and yield pairs (plain text before the token, control token).

        Of overlapping control tokens the leftmost one wins; of those that start at the same character, the longest.
        The control token of the last pair is "".
        """
        done = 0
        for match in self._control_start.finditer(text):
            start = match.start()
            if start < done:
                continue
            candidates = (text[start : start + length] for length in self._control_lengths)
            control = next((candidate for candidate in candidates if candidate in self.special_ids), "")
            if control:
                yield text[done:start], control
                done = start + len(control)
        yield text[done:], ""

    def _encode_plain(self, text: str) -> list[int]:
        """Encode text without control tokens. A control token that normalization produces is spelled out."""
        if not text:
            return []
        ids = self._backend.encode(_SURROGATE.sub("\ufffd", text))
        if self._forbidden_ids.isdisjoint(ids):
            return ids
        return [n for id in ids for n in (self._spell(self.token(id)) if id in self._forbidden_ids else (id,))]

    def _spell(self, control: str) -> list[int]:
        """Encode a control token's text ("" or one control token) as ordinary tokens."""
        if not control:
            return []
        ids = self._backend.spell(control)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary merges these characters into the control token, so encode them in two parts.
        return self.encode(control[:1]) + self.encode(control[1:])


def load_tokenizer(folder: Path, model_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder from ``tokenizer.json``, or else from ``tokenizer.model``.

    ``model_size`` is the number of ids that the model has; the tokenizer then raises ``DgemmaError`` for a text that
    needs other ids. Raises ``DgemmaError`` when the folder has neither file, when the file is damaged, or when it is
    not a Gemma tokenizer.
    """
    config = read_tokenizer_config(folder)
    if (folder / "tokenizer.json").exists():
        return Tokenizer(JsonBackend(folder / "tokenizer.json"), config, model_size)
    if (folder / "tokenizer.model").exists():
        return Tokenizer(SentencePieceBackend(folder / "tokenizer.model"), config, model_size)
    raise DgemmaError(
        f"{folder} has no tokenizer",
        "A checkpoint folder contains tokenizer.json or tokenizer.model. Check that the download is complete.",
    )
