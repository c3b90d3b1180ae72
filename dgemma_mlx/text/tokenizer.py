"""Text <-> token ids, over ``tokenizer.json`` (tokenizers) or ``tokenizer.model`` (sentencepiece).

Two kinds of text go in: text that people typed, in which a control token such as ``<|turn>`` is just seven
characters (``encode``), and text written by a template, in which it is one id (``encode_control``). Ordinary
added tokens (HTML tags, runs of newlines) are parsed in both, as in the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dgemma_mlx.checkpoint.config import read_json
from dgemma_mlx.errors import DgemmaError

_DAMAGED = "The file may be cut off, or a Git LFS pointer; fetch it again."
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Some files leave control tokens unmarked ("special": false; sentencepiece has no such mark at all), so the
# shape decides too. HTML tags such as <table> or <b> are ordinary text and must not match.
_CONTROL = re.compile(
    r"<\|[^<>]+>|<[^<>]+\|>|\[multimodal\]"
    r"|<(?:bos|eos|pad|unk|mask|(?:start|end)_of_\w+|unused\d+|\w+_soft_token)>"
)
_GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


class _Backend(Protocol):
    """What ``Tokenizer`` needs of a tokenizer library."""

    vocab_size: int

    def control_tokens(self) -> dict[str, int]:
        """The control tokens that the file itself knows of."""

    def find(self, token: str) -> int | None:
        """The id of a token's text."""

    def token(self, id: int) -> str:
        """The token's text as the file has it; "" where the file has no such id."""

    def encode(self, text: str) -> list[int]:
        """Plain encoding, no bos or eos added; it may parse control tokens."""

    def spell(self, text: str) -> list[int]:
        """Encodes the text of one control token as ordinary pieces."""


class Tokenizer:
    """A Gemma tokenizer: byte-fallback pieces, spaces written as ``▁``, no space added in front.

    ``special_ids`` maps the text of every control token to its id; ``bos_id``, ``eos_id`` and ``pad_id`` are
    None where the tokenizer has no such token. Made by ``load_tokenizer``.
    """

    def __init__(self, backend: _Backend, config: Mapping[str, Any]) -> None:
        """``config`` is the content of ``tokenizer_config.json``, or empty."""
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
        unknown = self.special_ids.get(names.get("unk_token", ""))
        self._control = frozenset(self.special_ids.values())
        self._never_typed = self._control - {unknown}  # an unknown character may well encode to <unk>
        self._lengths = sorted({len(text) for text in self.special_ids}, reverse=True)
        firsts = "".join(sorted({text[0] for text in self.special_ids}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)")
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of text that somebody typed. Control tokens in it become ordinary pieces; no bos is added."""
        ids = []
        for plain, control in self._split(text):
            ids += self._encode_plain(plain)
            ids += self._spell(control)
        return ids

    def encode_control(self, text: str, *, ignore: Sequence[str] = ()) -> list[int]:
        """Ids of text that a template wrote: control tokens in it are parsed; no bos is added.

        The strings ``ignore`` are taken out after control tokens were looked for, so that one of them inside
        a control token makes it plain text.
        """
        ids = []
        for plain, control in self._split(text):
            typed = plain
            for mark in ignore:
                typed = typed.replace(mark, "")
            ids += self.encode(typed)
            if control:
                ids.append(self.special_ids[control])
        return ids

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of the ids, control tokens left out by default. Bytes that are no UTF-8 become U+FFFD."""
        pieces = (self.token_bytes(id, keep_special=keep_special) for id in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def token(self, id: int) -> str:
        """The token as the vocabulary has it (``▁the``, ``<0xE2>``, ``<|turn>``); "" for an unknown id."""
        return self._backend.token(id)

    def token_bytes(self, id: int, *, keep_special: bool = False) -> bytes:
        """What the token adds to UTF-8 text: b"" for an unknown id, and for a control token by default."""
        if id in self._control:
            return self.token(id).encode() if keep_special else b""
        if id not in self._bytes:
            piece = self.token(id)
            byte = _BYTE.fullmatch(piece)
            self._bytes[id] = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        return self._bytes[id]

    def id_of_bytes(self, data: bytes) -> int | None:
        """A token that adds these bytes to the text, a byte-fallback one only where there is no other; or None."""
        pieces = [data.decode("utf-8", "replace").replace(" ", "▁")] + [f"<0x{byte:02X}>" for byte in data[:1]]
        ids = (self._backend.find(piece) for piece in pieces)
        return next((id for id in ids if id is not None and data and self.token_bytes(id) == data), None)

    def is_control(self, id: int) -> bool:
        """Whether the id is a control token's."""
        return id in self._control

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        """Cuts text at control tokens, the leftmost and longest first: (text before, control token or "")."""
        done = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < done:
                continue
            candidates = (text[start : start + length] for length in self._lengths)
            control = next((candidate for candidate in candidates if candidate in self.special_ids), "")
            if control:
                yield text[done:start], control
                done = start + len(control)
        yield text[done:], ""

    def _encode_plain(self, text: str) -> list[int]:
        """Encodes text without control tokens. Should normalizing have made one, it is spelled out."""
        if not text:
            return []
        ids = self._backend.encode(_SURROGATE.sub("\ufffd", text))
        if self._never_typed.isdisjoint(ids):
            return ids
        return [n for id in ids for n in (self._spell(self.token(id)) if id in self._never_typed else (id,))]

    def _spell(self, control: str) -> list[int]:
        if not control:
            return []
        ids = self._backend.spell(control)
        if self._control.isdisjoint(ids):
            return ids
        # The vocabulary itself makes the control token of its characters: cut it, so that it cannot.
        return self.encode(control[:1]) + self.encode(control[1:])


class _JsonBackend:
    """``tokenizer.json``, read by the ``tokenizers`` package."""

    def __init__(self, path: Path) -> None:
        import json

        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more special
            raise DgemmaError(f"cannot read {path}: {error}", _DAMAGED) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = self._tokenizer.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        steps = [step["type"] for step in state.get("decoders", [state]) if step]
        if "Replace" not in steps or not {"Replace", "ByteFallback", "Fuse"}.issuperset(steps):
            raise DgemmaError(
                f"{path} is no Gemma tokenizer: it decodes by {', '.join(steps) or 'nothing'}",
                "Only tokenizers with byte fallback and spaces written as '▁' are supported.",
            )
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def control_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {
            token.content: id
            for id, token in added
            if len(token.content) > 1 and (token.special or _CONTROL.fullmatch(token.content))
        }

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, id: int) -> str:
        return self._tokenizer.id_to_token(id) or ""

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, text: str) -> list[int]:
        """Runs the pipeline's steps by hand: only they leave added tokens out."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]


class _SentencePieceBackend:
    """``tokenizer.model``, read by the ``sentencepiece`` package."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self.vocab_size = self._model.GetPieceSize()
        except (OSError, RuntimeError) as error:
            raise DgemmaError(f"cannot read {path}: {error}", _DAMAGED) from None
        if self.vocab_size == 0:
            raise DgemmaError(f"cannot read {path}: it is empty", _DAMAGED)

    def control_tokens(self) -> dict[str, int]:
        pieces = self._model.IdToPiece(list(range(self.vocab_size)))
        return {
            piece: id
            for id, piece in enumerate(pieces)
            if len(piece) > 1 and (self._model.IsControl(id) or _CONTROL.fullmatch(piece))
        }

    def find(self, token: str) -> int | None:
        id = self._model.PieceToId(token)
        return id if self._model.IdToPiece(id) == token else None  # an unknown piece gives the id of <unk>

    def token(self, id: int) -> str:
        return self._model.IdToPiece(id) if 0 <= id < self.vocab_size else ""

    def encode(self, text: str) -> list[int]:
        return list(self._model.EncodeAsIds(text))

    def spell(self, text: str) -> list[int]:
        """Cuts after the first character: sentencepiece always parses its user-defined symbols."""
        return self.encode(text[:1]) + self.encode(text[1:])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads a checkpoint folder's ``tokenizer.json``, or ``tokenizer.model`` where that is all there is.

    Raises ``DgemmaError`` when the folder has neither, or when the file cannot be read.
    """
    config = read_tokenizer_config(folder)
    if (folder / "tokenizer.json").exists():
        return Tokenizer(_JsonBackend(folder / "tokenizer.json"), config)
    if (folder / "tokenizer.model").exists():
        return Tokenizer(_SentencePieceBackend(folder / "tokenizer.model"), config)
    raise DgemmaError(
        f"{folder} has no tokenizer",
        "A checkpoint folder holds tokenizer.json or tokenizer.model; is the download complete?",
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, or an empty dict where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... of ``tokenizer_config.json``; Gemma's own where it does not say."""
    names = {**_GEMMA_NAMES, **{name: value for name, value in config.items() if name.endswith("_token")}}
    texts = {name: _token_text(value) for name, value in names.items()}
    return {name: text for name, text in texts.items() if text}


def _listed_tokens(config: Mapping[str, Any]) -> list[str]:
    """The unnamed control tokens of ``tokenizer_config.json``."""
    texts = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name) or []
        texts += [_token_text(value) for value in (listed.values() if isinstance(listed, dict) else listed)]
    return texts


def _token_text(value: Any) -> str:
    """A token is written as its text or as ``{"content": text, ...}``; other values are no tokens."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
