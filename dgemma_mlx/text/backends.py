"""The two libraries that read a checkpoint's tokenizer, ``tokenizers`` and ``sentencepiece``, with one interface."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dgemma_mlx.checks import reason
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.text.pieces import load_tokenizer_json
from dgemma_mlx.text.tokenizer_config import DAMAGED_HINT

if TYPE_CHECKING:
    import tokenizers

# Some files do not mark control tokens ("special": false; sentencepiece has no mark for them at all), so the shape of
# the text decides as well. HTML tags such as <table> or <b> are ordinary text and must not match.
_CONTROL = re.compile(
    r"<\|[^<>]+>|<[^<>]+\|>|\[multimodal\]"
    r"|<(?:bos|eos|pad|unk|mask|(?:start|end)_of_\w+|unused\d+|\w+_soft_token)>"
)
_MAX_UNUSED = 6_500  # Gemma numbers its unused tokens from 0 to 6,241


class Backend(Protocol):
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

    def encodes_to_itself(self, id: int) -> bool:
        """Return whether the text of this token encodes to this token alone. It is an ordinary token of characters."""


class JsonBackend:
    """A ``tokenizer.json`` file, read by the ``tokenizers`` package.

    Attributes:
        vocab_size: Number of token ids, added tokens included.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ``DgemmaError`` when it is damaged or is not a Gemma tokenizer."""
        try:
            self._tokenizer, self._pieces = load_tokenizer_json(path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain Exception, or a panic of the Rust library, which is no Exception
            raise DgemmaError(f"cannot read {path}: {reason(error)}", DAMAGED_HINT) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = self._tokenizer.decoder
        state = {} if decoder is None else parse_json(decoder.__getstate__())
        steps = [step["type"] for step in state.get("decoders", [state]) if step]
        if "Replace" not in steps or not {"Replace", "ByteFallback", "Fuse"}.issuperset(steps):
            raise DgemmaError(
                f"{path} is not a Gemma tokenizer: its decoder is {', '.join(steps) or 'missing'}",
                "Only tokenizers with byte fallback that write spaces as '▁' are supported.",
            )
        self.vocab_size = len(self._pieces.tokens) if self._pieces else self._tokenizer.get_vocab_size()
        self._added = self._tokenizer.get_added_tokens_decoder()
        starts = {re.escape(token.content[:2]) for token in self._added.values()}
        self._added_start = re.compile("|".join(sorted(starts)) or r"(?!)")  # is in every text with an added token

    def control_tokens(self) -> dict[str, int]:
        """Return the added tokens that are marked as special or have the shape of a control token: text -> id.

        ``<unused0>`` and the like are control tokens whether or not the file lists them as added tokens.
        """
        unused = (f"<unused{number}>" for number in range(_MAX_UNUSED))
        found = {text: id for text in unused if (id := self.find(text)) is not None}
        for id, token in self._added.items():
            if len(token.content) > 1 and (token.special or _CONTROL.fullmatch(token.content)):
                found[token.content] = id
        return found

    def find(self, token: str) -> int | None:
        """Return the id of the token with this text, or None when the vocabulary lacks it."""
        return self._pieces.ids.get(token) if self._pieces else self._tokenizer.token_to_id(token)

    def token(self, id: int) -> str:
        """Return the token's text as the vocabulary spells it, or "" for an unknown id."""
        if self._pieces:
            return self._pieces.tokens[id] if 0 <= id < self.vocab_size else ""
        return self._tokenizer.id_to_token(id) or ""

    def encode(self, text: str) -> list[int]:
        """Encode text without bos or eos. Control tokens in the text are parsed."""
        try:
            return self._reader(text).encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as when the file is read
            raise DgemmaError(f"the tokenizer failed: {reason(error)}", DAMAGED_HINT) from error

    def spell(self, text: str) -> list[int]:
        """Encode the text of a control token as ordinary tokens.

        The steps of the pipeline run one by one, because ``Tokenizer.encode`` always parses added tokens.
        """
        tokenizer = self._reader(text)
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]

    def encodes_to_itself(self, id: int) -> bool:
        """Return whether the text of this token encodes to this token alone."""
        piece = self.token(id)
        text = piece.replace("▁", " ")
        if " " in piece or self._added_start.search(text):  # elsewhere the model alone, which is faster, decides
            return self.encode(text) == [id]
        return [token.id for token in self._reader(piece).model.tokenize(piece)] == [id]

    def _reader(self, text: str) -> tokenizers.Tokenizer:
        """Return the tokenizer, with all pieces that the text needs."""
        if self._pieces:
            self._pieces.extend(text)
        return self._tokenizer


class SentencePieceBackend:
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
            raise DgemmaError(f"cannot read {path}: {reason(error)}", DAMAGED_HINT) from None
        if self.vocab_size == 0:
            raise DgemmaError(f"cannot read {path}: the file is empty", DAMAGED_HINT)

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

    def encodes_to_itself(self, id: int) -> bool:
        """Return whether the text of this token encodes to this token alone."""
        return self.encode(self.token(id).replace("▁", " ")) == [id]
