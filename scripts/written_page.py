"""The command line of the scripts that write a page of the repository from the program's help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def write_or_check(script: str, page: Path, write: Callable[[], str]) -> int:
    """Write what ``write`` returns to the page that the command line names, or check it, and return the exit code.

    ``script`` is the name of the script, and ``page`` where its page is without a name on the command line.
    """
    parser = argparse.ArgumentParser(description=f"Write {page.name} from the program's own help.")
    parser.add_argument("file", nargs="?", type=Path, default=page, help=f"the page ({page.parent.name}/{page.name})")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    arguments = parser.parse_args()
    text = write()
    if not arguments.check:
        arguments.file.write_text(text, encoding="utf-8")
    elif not arguments.file.exists() or arguments.file.read_text(encoding="utf-8") != text:
        print(f"{arguments.file} is out of date; run: python scripts/{script}", file=sys.stderr)
        return 1
    return 0
