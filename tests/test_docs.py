"""README and docs: links resolve, every page is listed, and the pages agree with the code that they describe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dgemma_mlx import Committed, Done, Draft, generate, load, stream
from dgemma_mlx.cli.render.plain import record

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "recipes").rglob("*.md")])


def _text(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if not re.match(r"https?:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for file, anchor in _links(page):
        assert file.exists(), f"{page.name}: {file.name}"
        if anchor and file.exists():
            assert anchor in _anchors(file), f"{page.name}: {file.name}#{anchor}"


def test_the_index_lists_every_page() -> None:
    listed = {file for file, _ in _links(DOCS / "index.md")}
    assert set(DOCS.glob("*.md")) - {DOCS / "index.md"} <= listed


def test_the_readme_is_short_and_names_the_first_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert re.search(r"^make demo\nmake test$", text[:2000], re.MULTILINE)


def test_the_comparison_has_a_cell_for_each_feature_and_program() -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", (DOCS / "comparison.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [row.strip("|\n").split("|") for row in tables[1].splitlines()]
    assert len(cells) == 2 + 26 and {len(row) for row in cells} == {10}
    assert all(cell.strip() for row in cells[1:] for cell in row)


def _modules_of_the_tree() -> set[str]:
    """Return the modules that the tree of architecture.md names, as paths from the repository's root."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"## The tree\n\n```text\n(.*?)```", page, re.DOTALL)
    assert block is not None
    modules, folders = set(), [""]
    for line in block[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        if name.endswith("/"):
            folders[depth + 1 :] = [folders[depth] + name]
        else:
            modules.add(folders[depth] + name)
    return modules


def test_the_tree_of_architecture_md_names_every_module() -> None:
    sources = [*(ROOT / "dgemma_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    assert {str(file.relative_to(ROOT)) for file in sources} == _modules_of_the_tree()


def _rows(title: str) -> dict[str, str]:
    """Return the rows of the tables in a section of pipes.md: the first cell, and the whole row."""
    sections = re.split(r"^## (.*)$", (DOCS / "pipes.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[title]
    rows = re.findall(r"^\| (.*?) \|(.*)$", section, re.MULTILINE)
    return {first: rest for first, rest in rows if first.startswith("`")}


def _names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def test_pipes_md_names_every_field_of_an_answer() -> None:
    done = generate(load("demo"), "Sort 7 3 5", seed=1)
    documented = {name for first in _rows("`generate --json`") for name in _names(first)}
    printed = record(done, "demo").keys() - {"event"} | {field.name for field in fields(done.statistics)}
    assert documented == printed


def test_pipes_md_names_every_field_of_an_event() -> None:
    rows = _rows("`generate --jsonl` and `--trace FILE`")
    events = {type(event): record(event, "demo") for event in stream(load("demo"), "Sort 7 3 5", seed=1)}
    for kind in (Draft, Committed):
        printed = events[kind]
        fields_cell = rows[f"`{printed['event']}`"].split("|", 1)[1]
        assert printed.keys() - {"event"} <= _names(fields_cell)
        unknown = _names(fields_cell) - printed.keys()
        assert not unknown, unknown
    assert f"`{events[Done]['event']}`" in rows


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "python.md"], ids=lambda page: page.name)
def test_the_python_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = "".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(example, str(page), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 5 7" and "13 14 15 16" in "".join(lines)


def test_the_python_examples_about_tools_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "tools.md"
    example = "".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(example.replace("max_tokens=32", "max_tokens=4"), str(page), "exec"), {})
    assert capsys.readouterr().out.startswith("()\n")
