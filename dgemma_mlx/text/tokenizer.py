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
from pathlib import Path
from typing import Any, Protocol

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json

_DAMAGED_HINT = "The file may be truncated, or a Git LFS pointer; download it again."
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Some files do not mark control tokens ("special": false; sentencepiece has no mark for them at all), so the shape of
# the text decides as well. HTML tags such as <table> or <b> are ordinary text and must not match.
_CONTROL = re.compile(
    r"<\|[^<>]+>|<[^<>]+\|>|\[multimodal\]"
    r"|<(?:bos|eos|pad|unk|mask|(?:start|end)_of_\w+|unused\d+|\w+_soft_token)>"
)
_GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


class _Backend(Protocol):
    """Interface that ``Tokenizer`` needs from a tokenizer library.

    Attributes:
        vocab_size: Number of token ids, added tokens included.
    """

    vocab_size: int

    def control_tokens(self) -> dict[str, int]:
        """Return the control tokens that the tokenizer file itself defines: text -> id."""

    def find(self, token: str) -> int | None:
        """Return the id of the token with this text, or None when the vocabulary lacks it."""

    def token(self, id: int) -> str:
        """Return the token's text as the vocabulary spells it, or "" for an unknown id."""

    def encode(self, text: str) -> list[int]:
        """Encode text without adding bos or eos. The backend may parse control tokens in the text."""

    def spell(self, text: str) -> list[int]:
        """Encode the text of one control token as ordinary tokens."""


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

    def __init__(self, backend: _Backend, config: Mapping[str, Any]) -> None:
        """Create a tokenizer. Most callers use ``load_tokenizer`` instead.

        ``config`` is the content of ``tokenizer_config.json``, or empty when the checkpoint lacks the file.
        """
        names = named_tokens(config)
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.control_tokens()
        for text in [*names.values(), *_listed_tokens(config)]:
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
        return ids

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
        return ids

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Decode ids to text.

        Control tokens are dropped unless ``keep_special`` is set; unknown ids are always dropped. Bytes that are not
        valid UTF-8 become U+FFFD.
        """
        pieces = (self.token_bytes(id, keep_special=keep_special) for id in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def token(self, id: int) -> str:
        """Return the token as the vocabulary spells it (``▁the``, ``<0xE2>``, ``<|turn>``), or "" for an unknown id."""
        return self._backend.token(id)

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


class _JsonBackend:
    """A ``tokenizer.json`` file, read by the ``tokenizers`` package.

    Attributes:
        vocab_size: Number of token ids, added tokens included.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ``DgemmaError`` when it is damaged or is not a Gemma tokenizer."""
        import json

        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise DgemmaError(f"cannot read {path}: {error}", _DAMAGED_HINT) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = self._tokenizer.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        steps = [step["type"] for step in state.get("decoders", [state]) if step]
        if "Replace" not in steps or not {"Replace", "ByteFallback", "Fuse"}.issuperset(steps):
            raise DgemmaError(
                f"{path} is not a Gemma tokenizer: its decoder is {', '.join(steps) or 'missing'}",
                "Only tokenizers with byte fallback that write spaces as '▁' are supported.",
            )
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def control_tokens(self) -> dict[str, int]:
        """Return the added tokens that are marked as special or have the shape of a control token: text -> id."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {
            token.content: id
            for id, token in added
            if len(token.content) > 1 and (token.special or _CONTROL.fullmatch(token.content))
        }

    def find(self, token: str) -> int | None:
        """Return the id of the token with this text, or None when the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def token(self, id: int) -> str:
        """Return the token's text as the vocabulary spells it, or "" for an unknown id."""
        return self._tokenizer.id_to_token(id) or ""

    def encode(self, text: str) -> list[int]:
        """Encode text without bos or eos. Control tokens in the text are parsed."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, text: str) -> list[int]:
        """Encode the text of a control token as ordinary tokens.

        The steps of the pipeline run one by one, because ``Tokenizer.encode`` always parses added tokens.
        """
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]


class _SentencePieceBackend:
    """A ``tokenizer.model`` file, read by the ``sentencepiece`` package.

    Attributes:
        vocab_size: Number of token ids.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ``DgemmaError`` when it is damaged or empty."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self.vocab_size = self._model.GetPieceSize()
        except (OSError, RuntimeError) as error:
            raise DgemmaError(f"cannot read {path}: {error}", _DAMAGED_HINT) from None
        if self.vocab_size == 0:
            raise DgemmaError(f"cannot read {path}: the file is empty", _DAMAGED_HINT)

    def control_tokens(self) -> dict[str, int]:
        """Return the tokens that are marked as control or have the shape of a control token: text -> id."""
        pieces = self._model.IdToPiece(list(range(self.vocab_size)))
        return {
            piece: id
            for id, piece in enumerate(pieces)
            if len(piece) > 1 and (self._model.IsControl(id) or _CONTROL.fullmatch(piece))
        }

    def find(self, token: str) -> int | None:
        """Return the id of the token with this text, or None when the vocabulary lacks it."""
        id = self._model.PieceToId(token)
        return id if self._model.IdToPiece(id) == token else None  # sentencepiece returns <unk> for unknown text

    def token(self, id: int) -> str:
        """Return the token's text as the vocabulary spells it, or "" for an unknown id."""
        return self._model.IdToPiece(id) if 0 <= id < self.vocab_size else ""

    def encode(self, text: str) -> list[int]:
        """Encode text without bos or eos. User-defined symbols in the text are parsed."""
        return list(self._model.EncodeAsIds(text))

    def spell(self, text: str) -> list[int]:
        """Encode the text of a control token as ordinary tokens.

        The text is encoded in two parts, because sentencepiece always parses its user-defined symbols.
        """
        return self.encode(text[:1]) + self.encode(text[1:])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder from ``tokenizer.json``, or else from ``tokenizer.model``.

    Raises ``DgemmaError`` when the folder has neither file, when the file is damaged, or when it is not a Gemma
    tokenizer.
    """
    config = read_tokenizer_config(folder)
    if (folder / "tokenizer.json").exists():
        return Tokenizer(_JsonBackend(folder / "tokenizer.json"), config)
    if (folder / "tokenizer.model").exists():
        return Tokenizer(_SentencePieceBackend(folder / "tokenizer.model"), config)
    raise DgemmaError(
        f"{folder} has no tokenizer",
        "A checkpoint folder contains tokenizer.json or tokenizer.model. Check that the download is complete.",
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json`` of a checkpoint folder; return an empty dict when the file does not exist.

    Raises ``DgemmaError`` when the file is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the named tokens (``bos_token``, ``eos_token``, ...) of ``tokenizer_config.json``.

    Names that the file does not define have Gemma's own tokens. A name that the file sets to null is left out.
    """
    names = {**_GEMMA_NAMES, **{name: value for name, value in config.items() if name.endswith("_token")}}
    texts = {name: _token_text(value) for name, value in names.items()}
    return {name: text for name, text in texts.items() if text}


def _listed_tokens(config: Mapping[str, Any]) -> list[str]:
    """Return the texts of the control tokens that ``tokenizer_config.json`` lists without a name."""
    texts = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name) or []
        texts += [_token_text(value) for value in (listed.values() if isinstance(listed, dict) else listed)]
    return texts


def _token_text(value: Any) -> str:
    """Return the text of a token entry, which is a string or ``{"content": text, ...}``; "" for any other value."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
