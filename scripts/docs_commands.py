"""Run the commands of README, docs/ and recipes/, as a reader would who has just installed the program.

    python scripts/docs_commands.py [PAGE...]            run the commands
    python scripts/docs_commands.py --list [PAGE...]     only list them, and say which are not run, and why

A fenced block without a language, or with `sh`, holds commands; blocks of other languages do not. All commands of a
page run in one bash, with a new home and with the program on the PATH. The folder holds what the pages take for the
reader's own files (scripts/reader/), and docs/pictures/. A chat gets one message; other commands have an empty standard
input. Comments before a block, which readers do not see, say what a script cannot know:

    <!-- in a clone -->               the page is read in a clone of the repository; nothing is installed yet
    <!-- before: COMMAND -->          what the reader has done before the next block, such as starting a server
    <!-- not run: REASON -->          the next block needs a person, a key, hours, ...
    <!-- not run "TEXT": REASON -->   so do the commands of the next block that contain TEXT

A command that obviously needs the Hub, a Mac or a value that the reader fills in is not run either (`NEEDS`).
`dgemma-mlx serve` runs in the background until the page ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHELLS = ("", "sh")  # the languages of blocks of commands
DATA = ("json", "python", "ruby", "text", "toml", "yaml")  # the languages of other blocks
NEEDS = {  # what a command contains, and why it is not run
    r"\b(mlx-community|google)/": "the Hub, and the real model",
    r"\bowner/": "a value that the reader fills in",
    r"\bcode --wait\b": "VS Code",
    r"\b(brew|pbpaste|pbcopy|doctor --recheck)\b": "a Mac",
    r"[ /](MODEL|DATA|FOLDER|ADAPTER|FUSED|PYTHON|OWNER|NAME)\b|\"\.\.\.\"": "a value that the reader fills in",
}
PAGE_SECONDS = 1800  # limit on the commands of one page


@dataclass
class Command:
    """One command of a page.

    Attributes:
        line: Line of the page where the command begins, from 1; 0 for a `before` comment.
        text: The command, which may have several lines.
        reason: Why it is not run, or an empty string.
    """

    line: int
    text: str
    reason: str = ""


@dataclass
class Page:
    """The commands of one page, and whether its reader stands in a clone."""

    commands: list[Command] = field(default_factory=list)
    clone: bool = False


def complete(text: str) -> bool:
    """Return whether bash reads the lines as whole commands: no open quote, pipe, here-document or continued line."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return checked.returncode == 0 and not checked.stderr and not text.endswith("\\")


def split(lines: list[str], first: int) -> list[Command]:
    """Split the lines of a block into commands. ``first`` is the number of the first line in its page."""
    commands, begun = [], 0
    for end in range(1, len(lines) + 1):
        text = "\n".join(lines[begun:end])
        if end == len(lines) or complete(text):
            if any(line.strip() and not line.lstrip().startswith("#") for line in lines[begun:end]):
                commands.append(Command(first + begun, text))
            begun = end
    return commands


def marked(commands: list[Command], marks: list[tuple[str | None, str]], where: str) -> list[Command]:
    """Note why commands are not run, and return them. Raises ValueError for a mark that applies to no command."""
    for text, reason in marks:
        chosen = [command for command in commands if text is None or text in command.text]
        if not chosen or not reason:
            raise ValueError(f"{where}: the comment 'not run' {text or ''} has no command or no reason")
        for command in chosen:
            command.reason = reason
    for command in commands:
        for pattern, need in NEEDS.items():
            if not command.reason and re.search(pattern, command.text):
                command.reason = need
    return commands


def read_page(text: str, name: str) -> Page:
    """Return the commands of a page. Raises ValueError for a block of an unknown language, and for a stray comment."""
    page, marks, before = Page(), list[tuple[str | None, str]](), list[Command]()
    lines, number = text.splitlines(), 0
    while number < len(lines):
        line, where = lines[number], f"{name}:{number + 1}"
        number += 1
        if comment := re.fullmatch(r"<!-- (in a clone|before: (.*)|not run(?: \"(.*)\")?: (.*)) -->", line):
            _, setup, chosen, reason = comment.groups()
            page.clone |= comment[1] == "in a clone"
            before += [Command(0, setup)] if setup else []
            marks += [(chosen, reason)] if reason is not None else []
        elif fence := re.fullmatch(r"( *)```(\w*)", line):
            end = lines.index(f"{fence[1]}```", number)
            body, first = [row.removeprefix(fence[1]) for row in lines[number:end]], number + 1
            number = end + 1
            if fence[2] in SHELLS:
                page.commands += before + marked(split(body, first), marks, where)
                marks, before = [], []
            elif fence[2] not in DATA:
                raise ValueError(f"{where}: the language {fence[2]} is neither one of commands nor one of data")
    if marks or before:
        raise ValueError(f"{name}: a comment about commands has no block of commands after it")
    return page


def script_of(page: Page, results: Path) -> str:
    """Return a bash script that runs the commands of a page. Each leaves its output and its status in ``results``."""
    lines = [WAIT, "set -o pipefail"]
    for index, command in enumerate(page.commands):
        if command.reason:
            continue
        chat = re.match(r"dgemma-mlx chat\b", command.text)
        given, output = "<<< 'Sort 7 3 5'" if chat else "< /dev/null", f"> '{results}/{index}' 2>&1"
        if command.text.startswith("dgemma-mlx serve"):
            port = re.search(r"--port (\d+)", command.text)
            lines.append(f"{{\n{command.text}\n}} {given} {output} &\nlistens {port[1] if port else 8080}")
        else:
            lines.append(f"{{\n{command.text}\n}} {given} {output}")
        lines.append(f"echo $? > '{results}/{index}.status'")
    return "\n".join(lines) + "\n"


WAIT = """listens() {  # wait until a server listens
    for _ in $(seq 300); do (: < /dev/tcp/127.0.0.1/$1) 2>/dev/null && return; sleep 0.2; done; return 1; }"""


def run_page(page: Page, folder: Path, environment: Mapping[str, str]) -> list[tuple[Command, str]]:
    """Run the commands of a page in ``folder``. Return those that failed or did not end, with their output."""
    with tempfile.TemporaryDirectory() as temporary:
        results, script = Path(temporary), Path(temporary) / "script"
        script.write_text(script_of(page, results), encoding="utf-8")
        process = subprocess.Popen(["bash", script], cwd=folder, env=environment, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PAGE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # servers, and what was too slow
        process.wait()
        failed = []
        for index, command in enumerate(page.commands):
            status, output = results / f"{index}.status", results / str(index)
            if not command.reason and (not status.exists() or status.read_text().strip() != "0"):
                shown = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
                failed.append((command, shown))
        return failed


def copy_repository(folder: Path) -> None:
    """Copy the files that git knows, or would know, as a clone has them."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def install(clone: Path, environment: Path) -> None:
    """Install the program of a clone into a new virtual environment, as a wheel and with the pinned versions."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", clone / "constraints.txt", f"{clone}[serve,train,video]"], check=True)


def reader(home: Path, programs: Path | None) -> dict[str, str]:
    """Return the environment of a reader who has a new home, and the program on the PATH if ``programs`` is given."""
    kept = {name: value for name, value in os.environ.items() if not re.match("DGEMMA|HF_|XDG_|PYTHON|VIRTUAL", name)}
    path = f"{programs}:{kept['PATH']}" if programs else kept["PATH"]
    return kept | {"HOME": str(home), "PATH": path, "BROWSER": "true", "EDITOR": "true", "NO_COLOR": "1"}


def run_pages(pages: Mapping[str, Page]) -> int:
    """Run the commands of all pages, print what became of them, and return the number of failures."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 8080))  # where the pages have their server
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        clone, environment = Path(temporary) / "clone", Path(temporary) / "environment"
        copy_repository(clone)
        install(clone, environment)
        for number, (name, page) in enumerate(pages.items()):
            folder, home = Path(temporary) / f"{number}" / "dgemma-mlx", Path(temporary) / f"{number}" / "home"
            home.mkdir(parents=True)
            if page.clone:
                copy_repository(folder)
            else:
                shutil.copytree(ROOT / "scripts" / "reader", folder)
                shutil.copytree(ROOT / "docs" / "pictures", folder / "docs" / "pictures")
            failed = run_page(page, folder, reader(home, None if page.clone else environment / "bin"))
            ran = sum(not command.reason for command in page.commands)
            print(f"{name}: {ran} commands run, {len(failed)} failed, {len(page.commands) - ran} not run", flush=True)
            for command, output in failed:
                print(f"{name}:{command.line}: this failed:\n{command.text}\n{output[-2000:]}", flush=True)
            failures += len(failed)
    return failures


def main() -> int:
    """Run or list the commands and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the commands of README, docs and recipes in a clean place.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", type=Path, help="pages (all)")
    parser.add_argument("--list", action="store_true", help="list the commands that are run and those that are not")
    arguments = parser.parse_args()
    files = arguments.pages or [
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.rglob("recipes/*/*.md")),
    ]
    names = {file: str(file.resolve().relative_to(ROOT)) for file in files}
    pages = {name: read_page(file.read_text(encoding="utf-8"), name) for file, name in names.items()}
    pages = {name: page for name, page in pages.items() if page.commands}
    if not arguments.list:
        return min(run_pages(pages), 1)
    for name, page in pages.items():
        for command in page.commands:
            print(f"{name}:{command.line}: {command.text}")
            if command.reason:
                print(f"    not run: {command.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
