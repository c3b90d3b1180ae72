"""The folders that the program writes as a whole: which of them may be replaced.

Only what ``convert`` and ``fuse`` have written is replaced. A report in the folder says so, and names the weight files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from dgemma_mlx.checkpoint.shards import INDEX
from dgemma_mlx.checks import is_text, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import is_clutter, recover_folder, write_whole
from dgemma_mlx.json_text import read_json
from dgemma_mlx.version import __version__

CONVERT_REPORT, FUSE_REPORT = "conversion_report.json", "fuse_report.json"
CARD = "README.md"
# The files of a checkpoint that are copied unchanged: tokenizer, chat template, processor and licence.
SMALL_FILES = (
    "generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
_MADE_BY = "dgemma-mlx "
_ELSEWHERE = "Name another folder with -o."


def output_folder(path: str | Path) -> Path:
    """Return the folder that a path leads to, so that a link to a folder is kept when the folder is replaced.

    Raises ``DgemmaError`` (exit code 2) for an empty path, for the root of a disk, and for a name that is not UTF-8,
    which MLX cannot write.
    """
    check_name(path)
    folder = Path(path).expanduser()
    if folder.name in ("", "..") or folder.is_symlink():
        folder = Path(os.path.realpath(folder))
    if not str(path) or not folder.name:
        raise DgemmaError(f"the output cannot be {shown(str(path))}", "Name a new folder with -o.", exit_code=2)
    return folder


def check_name(path: str | Path) -> None:
    """Raise ``DgemmaError`` (exit code 2) for a path that is not UTF-8, because MLX cannot write weights there."""
    if not is_text(str(path)):
        raise DgemmaError(f"the name of the output {path} is not UTF-8 text", _ELSEWHERE, exit_code=2)


def check_output(output: Path, force: bool, sources: Iterable[Path]) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless a command may write a new checkpoint to ``output``.

    The output must be missing, or with ``force`` a folder that ``convert`` or ``fuse`` has written and to which nothing
    was added. See also ``check_apart``.
    """
    check_apart(output, sources)
    recover_folder(output)
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise DgemmaError(f"{output} is not a folder, and is not replaced", _ELSEWHERE, exit_code=2)
    unknown = next(_unknown(output), None)
    if unknown is not None:
        raise DgemmaError(
            f"{output} is not replaced: dgemma-mlx has not written {unknown.name} in it",
            f"{_ELSEWHERE} --force replaces only what convert or fuse has written.", exit_code=2,
        )
    if not force:
        raise DgemmaError(
            f"{output} already exists", "Replace it with --force, or name another folder with -o.", exit_code=2
        )


def check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Raise ``DgemmaError`` (exit code 2) if writing to ``output`` could destroy what must stay.

    A source is a model or an adapter that is read. The output must not be a source, contain one, or lie inside one, and
    it must not be or contain the current folder or the home folder.
    """
    for source in sources:
        if is_in(source, output) or is_in(output, source):
            raise DgemmaError(
                f"the output {output} is the source {source}, contains it, or lies inside it", _ELSEWHERE, exit_code=2
            )
    with suppress(OSError, RuntimeError):  # without a current folder, or a home
        for name, place in (("current", Path.cwd()), ("home", Path.home())):
            if is_in(place, output):
                raise DgemmaError(f"the output {output} is the {name} folder, or contains it", _ELSEWHERE, exit_code=2)


def is_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies in it.

    Folders are compared by identity: links, ``..`` and, where the disk ignores it, the case of letters do not matter.
    """
    real = Path(os.path.realpath(path))
    places = (place for place in (real, *real.parents) if os.path.exists(place))
    return os.path.exists(folder) and any(os.path.samefile(place, folder) for place in places)


def write_fuse_report(folder: Path) -> None:
    """Write the report that lets ``--force`` replace a fused checkpoint with the files that the folder holds now."""
    files = sorted({FUSE_REPORT, *(path.name for path in folder.iterdir())})
    record = {"made_by": f"{_MADE_BY}{__version__}", "files": files}
    write_whole(folder / FUSE_REPORT, json.dumps(record, indent=2) + "\n")


def _unknown(folder: Path) -> Iterator[Path]:
    """Yield the entries of a folder that are not part of a checkpoint written by this program.

    A report names the files. Those of version 0.1 name only the weight files, and the others go by their names.
    """
    patterns: list[str] = []
    for name in (CONVERT_REPORT, FUSE_REPORT):
        with suppress(DgemmaError):
            report = read_json(folder / name)
            if not str(report.get("made_by")).startswith(_MADE_BY):
                continue
            if files := report.get("files"):
                patterns += map(escape, map(str, files))
            elif shards := report.get("shards"):
                patterns += ["config.json", INDEX, CARD, CONVERT_REPORT, *SMALL_FILES, *map(escape, map(str, shards))]
    for path in sorted(folder.iterdir()):
        own = any(fnmatch(path.name, pattern) for pattern in patterns)
        if path.is_symlink() or not path.is_file() or not (own or is_clutter(path)):
            yield path
