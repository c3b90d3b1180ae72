"""A synthetic vocabulary of the size and style of Gemma's. Its tokens look like Gemma's and have no meaning."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.json_text import read_json

_ONSETS = re.findall(r"\w+", "b c d f g h k l m n p r s t v w br ch cl cr dr fl gr pl pr qu sh sl sp st th tr")
_VOWELS = re.findall(r"\w+", "a e i o u ai ea ee ie oo ou")
_CODAS = ["", "", "", *re.findall(r"\w+", "d l m n r s t ck ct ll nd ng nt rd rn rs ss st")]
_MARKS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_LETTERS = [*map(chr, range(0xC0, 0x180)), *map(chr, range(0x391, 0x3CA)), *map(chr, range(0x410, 0x450))]


def pieces(count: int, seed: int = 0) -> list[str]:
    """Return ``count`` different pieces in the style of Gemma's vocabulary.

    The pieces are words with and without a leading space, in three casings, groups of punctuation marks, runs of
    whitespace, and characters of other alphabets. Digits are single pieces, as in Gemma's vocabulary.
    """
    rng = random.Random(seed)
    found = dict.fromkeys(
        [*"0123456789", *map(chr, range(65, 91)), *map(chr, range(97, 123)), *_MARKS, *_LETTERS, "▁"]
        + ["▁" * n for n in range(2, 17)] + ["\n" * n for n in range(1, 9)] + ["\t" * n for n in range(1, 5)]
        + [chr(code) for code in range(0x4E00, 0x4E00 + 8000)] + [chr(code) for code in range(0x1F300, 0x1F600)]
    )  # fmt: skip
    for first in _MARKS:
        for second in ["▁", *_MARKS]:
            found |= dict.fromkeys([first + second, *(first + second + third for third in _MARKS)])
    while len(found) < count:
        syllables = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if rng.random() < 0.1:
            word = "".join(rng.choice(_LETTERS[128:]) for _ in range(rng.randint(2, 7)))
        word = rng.choice((word, word, word.capitalize(), word.upper()))
        found[rng.choice(("▁", "▁", "", "", '"', "_")) + word] = None
    return list(found)[:count]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a ``tokenizer.json`` with the demo model's tokens at their ids and new pieces after them.

    The tokenizer decodes correctly, but it cannot encode text to the new pieces.
    """
    tokenizer: dict[str, Any] = read_json(DEMO_FOLDER / "tokenizer.json")
    known: dict[str, int] = tokenizer["model"]["vocab"]
    new = [piece for piece in pieces(vocab_size) if piece not in known][: vocab_size - len(known)]
    known.update({piece: id for id, piece in enumerate(new, len(known))})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
