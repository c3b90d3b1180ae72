"""A large BPE vocabulary in a form that loads fast, kept in the user's cache folder.

The ``tokenizers`` package needs two seconds to read the 262,144 pieces and 514,906 merges of Gemma's
``tokenizer.json``, and holds the interpreter's lock meanwhile. A text needs few of them. BPE starts with the characters
of a text and only ever joins neighbours, so all that it looks up are pieces that occur in the text, and merges of two
such pieces into a third. A model of these pieces and of all merges among them, in the same order, therefore encodes the
text to the same ids. ``Pieces`` gives the library such a model and extends it when a text has new pieces.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from dgemma_mlx.files import whole_file
from dgemma_mlx.json_text import parse_json

if TYPE_CHECKING:
    import tokenizers

LARGE = 4 << 20  # bytes of a tokenizer.json from which the form in the cache pays
_FORMAT = 1  # part of the file's name; another one for another content or other conditions in ``_form``
# After so much work, counted in look-ups of a piece, the library gets all pieces, which takes about as long.
_MOST_WORK = 1_500_000
_MODEL_WORK = 20_000  # of a new model
_SPACE = "▁"
_PLAIN_BPE = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": True}
_NORMALIZERS = (None, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})


class Pieces:
    """All pieces and merges of a BPE model, of which a tokenizer gets those that its texts need.

    Attributes:
        tokenizer: The tokenizer, right for the texts that ``extend`` has seen.
        tokens: The pieces by id.
        ids: The ids by piece.
    """

    def __init__(self, skeleton: bytes, tokens: bytes, merges: np.ndarray[Any, Any]) -> None:
        """Create a tokenizer without ordinary pieces.

        ``skeleton`` is its ``tokenizer.json`` with the pieces that every text may need, ``tokens`` are all pieces in
        the order of their ids, separated by NUL, and ``merges`` (3, N) int32 are the ids of left part, right part and
        whole, in the order of their ranks.
        """
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(skeleton.decode())
        self.tokens = tokens.decode().split("\0")
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        self._options = parse_json(self.tokenizer.model.__getstate__())
        self._known = np.zeros(len(self.tokens), dtype=bool)
        self._known[list(self._options["vocab"].values())] = True
        self._merges, self._longest = merges, max(map(len, self.tokens))
        self._has_all, self._work, self._lock = False, 0, Lock()

    def extend(self, text: str) -> None:
        """Give the tokenizer what it needs to encode a text. Any thread may call this."""
        if self._has_all:
            return
        with self._lock:
            self._work += len(text) * self._longest
            if self._work > _MOST_WORK:
                self._add(range(len(self.tokens)))
                self._has_all = True
            elif not self._known[found := self._found(text.replace(" ", _SPACE))].all():
                self._work += _MODEL_WORK
                self._add(found)

    def _found(self, text: str) -> list[int]:
        """Return the ids of all pieces that occur in a text."""
        found: set[str] = set()
        for length in range(1, min(self._longest, len(text)) + 1):
            found |= self.ids.keys() & {text[start : start + length] for start in range(len(text) - length + 1)}
        return [self.ids[piece] for piece in found]

    def _add(self, ids: Sequence[int]) -> None:
        """Give the tokenizer a model of these pieces, of those that it has, and of all merges among them."""
        from tokenizers import models

        known = self._known.copy()
        known[ids] = True
        merges = self._merges[:, known[self._merges[2]]]  # most are left out by their whole already
        left, right, _ = merges[:, known[merges[:2]].all(axis=0)].tolist()
        tokens, options = self.tokens, self._options
        self.tokenizer.model = models.BPE(
            {tokens[id]: id for id in np.flatnonzero(known).tolist()},
            [(tokens[one], tokens[other]) for one, other in zip(left, right, strict=True)],
            unk_token=options["unk_token"], fuse_unk=options["fuse_unk"], byte_fallback=options["byte_fallback"],
            ignore_merges=options["ignore_merges"],
        )  # fmt: skip
        self._known = known  # last, because Ctrl-C may come in between


def load_tokenizer_json(path: Path) -> tuple[tokenizers.Tokenizer, Pieces | None]:
    """Return the tokenizer of a ``tokenizer.json``, and its pieces if it is large.

    The form of a large file is derived the first time, and written to the user's cache folder under a name with the
    SHA-256 of the file. A cached form that is damaged is derived again. The library reads the whole file when it is
    small or damaged, when its texts need more than pieces and merges, and when the cache folder cannot be written.
    Raises what the library raises for a file that it cannot read.
    """
    import tokenizers

    if path.is_file() and path.stat().st_size >= LARGE:
        from platformdirs import user_cache_path

        content = path.read_bytes()
        name = f"{hashlib.sha256(content).hexdigest()}-{_FORMAT}.npz"
        kept = user_cache_path("dgemma-mlx") / "tokenizers" / name
        if form := _cached_form(content, kept):
            del content
            try:
                pieces = Pieces(form["skeleton"].tobytes(), form["tokens"].tobytes(), form["merges"])
                return pieces.tokenizer, pieces
            except Exception:  # of any library: the file was not written here, and is derived again the next time
                with suppress(OSError):
                    kept.unlink()
    return tokenizers.Tokenizer.from_file(str(path)), None


def _cached_form(content: bytes, kept: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the form of a ``tokenizer.json`` from a file; derive it and write the file when there is none."""
    if os.path.exists(kept) and not os.path.isfile(kept):  # unlike those of Path, they never raise OSError
        return {}  # a pipe, which would be waited for
    # Of what something else wrote, every library says in its own way that it cannot read it.
    with suppress(Exception), kept.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)
    try:
        with whole_file(kept) as out:  # first, because without a cache it takes longer than the library does
            form = _form(parse_json(content))
            np.savez(out, allow_pickle=False, **form)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}  # no place to write to, or a damaged file: the library reads it, or says what is wrong
    return form


def _form(content: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arguments of ``Pieces`` for a ``tokenizer.json``; {} when it is not certain to encode as well.

    The text must be encoded by merges alone. A piece may not contain NUL, and no merge may join what stands for bytes
    or unknown characters, because such a piece does not occur in the text.
    """
    model, vocab = content["model"], content["model"].get("vocab")
    is_plain = model.get("type") == "BPE" and {name: model.get(name) for name in _PLAIN_BPE} == _PLAIN_BPE
    splits = (content.get("pre_tokenizer") or {}).get("type") in (None, "Split")
    if not is_plain or content.get("normalizer") not in _NORMALIZERS or not splits:
        return {}
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        return {}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    always = [model["unk_token"], *(f"<0x{byte:02X}>" for byte in range(256))]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    triples = (vocab[piece] for one, other in pairs for piece in (one, other, one + other))
    merges = np.fromiter(triples, np.int32).reshape(-1, 3).T
    joined = "\0".join(tokens)
    if (
        joined.count("\0") >= len(tokens) or not added.items() <= vocab.items()
        or not vocab.keys() >= set(always) or np.isin(merges, [vocab[token] for token in always]).any()
    ):  # fmt: skip
        return {}
    needed = {token: vocab[token] for token in (*added, *always)}
    skeleton = json.dumps({**content, "model": {**model, "vocab": needed, "merges": []}})
    return {
        "skeleton": np.frombuffer(skeleton.encode(), np.uint8), "tokens": np.frombuffer(joined.encode(), np.uint8),
        "merges": np.ascontiguousarray(merges),
    }  # fmt: skip
