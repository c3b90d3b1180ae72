"""Commands of the documentation: found, marked and run as scripts/docs_commands.py says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.docs_commands import Page, read_page, run_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]


def _page(*lines: str) -> Page:
    return read_page("\n".join(lines), "page.md")


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_block_of_a_page_is_one_of_commands_or_of_data(file: Path) -> None:
    page = read_page(file.read_text(encoding="utf-8"), file.name)
    assert all(command.text.strip() for command in page.commands)


def test_a_block_is_split_into_whole_commands() -> None:
    page = _page(
        "```",
        "# only a comment",
        "one",
        'echo "a',
        'b" |',
        "    cat \\",
        "    -",
        "cat <<END",
        "x",
        "END",
        "two",
        "```",
    )
    texts = [command.text for command in page.commands]
    assert texts == ["one", 'echo "a\nb" |\n    cat \\\n    -', "cat <<END\nx\nEND", "two"]
    assert [command.line for command in page.commands] == [3, 4, 8, 11]


def test_comments_say_what_is_not_run_and_why() -> None:
    page = _page(
        '<!-- not run "two": a key -->', "```sh", "one", "two", "```", "<!-- not run: a person -->", "```", "x", "```"
    )
    assert [command.reason for command in page.commands] == ["", "a key", "a person"]


def test_commands_that_need_the_hub_or_a_value_are_not_run() -> None:
    page = _page("```", "dgemma-mlx info google/x", "dgemma-mlx fuse -m MODEL", "pbpaste | cat", "```")
    assert all(command.reason for command in page.commands)


@pytest.mark.parametrize(
    "lines",
    [
        ["```perl", "x", "```"],
        ["<!-- not run: a key -->", "no block"],
        ['<!-- not run "three": a key -->', "```", "one", "```"],
    ],
    ids=["an unknown language", "a comment without a block", "a comment about no command"],
)
def test_a_page_that_the_script_would_misread_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match=r"page\.md"):
        _page(*lines)


def test_the_commands_of_a_page_share_a_shell_and_failures_are_told(tmp_path: Path) -> None:
    page = _page(
        "<!-- before: printf 7 > number -->", "```", "export X=$(cat number)", "echo out; false | true",
        'test "$X" = 7', "exec 3</dev/null; cat", "```",
    )  # fmt: skip
    failed = run_page(page, tmp_path, os.environ)
    assert [(command.text, output) for command, output in failed] == [("echo out; false | true", "out\n")]
