"""Draw committed Markdown on a terminal, block by block, with rich.

Lines of text and code stay unbroken and hold nothing that is not in the answer, so that they can be copied and the
terminal breaks them itself. Only a table has rows of its own. Importing this module takes a while; the first canvas
that is committed waits for it, and no step before.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich import markdown
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.theme import Theme

from dgemma_mlx.cli.render.visible import visible

# Colours of the terminal's own palette that can be read on light and on dark backgrounds.
_STYLES = Theme(
    {
        "markdown.code": "cyan", "markdown.code_block": "", "markdown.block_quote": "dim",
        "markdown.h1": "bold underline", "markdown.h2": "bold underline", "markdown.h3": "bold",
        "markdown.h4": "bold", "markdown.h5": "bold",
        "markdown.h6": "bold", "markdown.item.number": "bold", "markdown.table.border": "dim",
        "markdown.table.header": "bold", "markdown.hr": "dim",
    }
)  # fmt: skip
_CODE = ANSISyntaxTheme(
    {
        ("Comment",): Style(dim=True), ("Keyword",): Style(color="magenta"),
        ("Literal", "String"): Style(color="green"),
        ("Literal", "Number"): Style(color="cyan"), ("Name", "Function"): Style(color="blue"),
        ("Name", "Class"): Style(color="blue"), ("Name", "Tag"): Style(color="blue"),
        ("Name", "Decorator"): Style(color="magenta"), ("Operator", "Word"): Style(color="magenta"),
        ("Generic", "Deleted"): Style(color="red"), ("Generic", "Inserted"): Style(color="green"),
    }
)  # fmt: skip
# TeX between \( \), \[ \], $$ $$ or $ $, where a price is none, as in Pandoc: "$5 and $10". And Python's __names__.
_AS_IT_IS = re.compile(
    r"__\w{1,80}?__|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]|\$\$.{1,2000}?\$\$|\$(?![\s$])[^$\n]*(?<![\s\\])\$(?!\d)",
    re.DOTALL,
)  # bounded, because every opening looks for its end
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")
# The line that begins code, with the language, which is not drawn.
_FENCE = re.compile(r"^[\s>]*(?:(?:[-*+]|\d+[.)])\s+)*(?:`{3,}|~{3,}).*", re.MULTILINE)
_HIGHLIGHTED = 50_000  # characters of code; more would take seconds


class MarkdownText:
    """Text that arrives in parts and is drawn as soon as a block of it is complete.

    A block is complete when the next one begins. Of code between fences, every line is drawn when it is complete.

    Attributes:
        pending: The text that is not drawn yet.
    """

    def __init__(self) -> None:
        self.pending = ""
        self._source = ""  # from the start of the first block that is not complete
        self._drawn = 0  # number of lines of this block that are drawn already

    def add(self, text: str, columns: int) -> str:
        """Add text that is safe for a terminal, and return what is complete, drawn as whole lines."""
        self._source += text
        whole, feed, tail = self._source.rpartition("\n")
        lines = (whole + feed).splitlines(keepends=True)
        blocks = _blocks(whole + feed)
        done, begin = "", 0
        for block, following in pairwise(blocks):
            begin = _lines(following)[0]
            done += self._rest(block, lines, columns) + "\n" * _blank_lines(lines[:begin])
        self._source = self.pending = "".join(lines[begin:]) + tail
        if blocks and blocks[-1][0].type == "fence":
            drawn, fresh = self._drawn, self._rest(blocks[-1], lines, columns)
            self._drawn, self.pending = drawn + fresh.count("\n"), tail
            done += fresh
        return done

    def finish(self, columns: int) -> str:
        """Return what is left, drawn as whole lines."""
        done = self.add("\n", columns) if self._source else ""
        lines = self._source.splitlines(keepends=True)
        for block in _blocks(self._source):  # the last one
            done += self._rest(block, lines, columns)
        self.pending = self._source = ""
        return done

    def _rest(self, block: list[Token], lines: list[str], columns: int) -> str:
        """Return the lines of a block that are not drawn yet."""
        drawn, self._drawn = self._drawn, 0
        return "".join(_drawn(block, lines, columns).splitlines(keepends=True)[drawn:])


def _parser() -> MarkdownIt:
    """Return a parser that takes HTML as text, and drops nothing: definitions of links are text, too."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.disable(["reference", "lheading"])  # a line of dashes below a text is a rule
    parser.inline.ruler.before("escape", "as_it_is", _as_it_is)
    return parser


def _as_it_is(state: StateInline, silent: bool) -> bool:
    """Take TeX, and names between double underscores, as text."""
    found = _AS_IT_IS.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _blocks(source: str) -> list[list[Token]]:
    """Return the tokens of each outermost block."""
    blocks: list[list[Token]] = []
    for token in _PARSER.parse(source):
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks


def _lines(block: list[Token]) -> tuple[int, int]:
    """Return the first line of a block, and the line after its last one."""
    start, end = block[0].map or (0, 0)
    return start, end


def _blank_lines(lines: list[str]) -> int:
    """Return the number of blank lines at the end."""
    return next((n for n, line in enumerate(reversed(lines)) if line.strip()), len(lines))


def _drawn(block: list[Token], lines: list[str], columns: int) -> str:
    """Return a block as whole lines.

    A paragraph without any markup stays as it is written, with its indentation, and so does what rich would not draw
    completely: tables with too many columns or with cells without a heading, other numbers of a list, titles of links.
    """
    start, end = _lines(block)
    source = "".join(lines[start:end]).rstrip("\n") + "\n"
    if block[0].type == "paragraph_open":
        parts = ("\n" if child.type == "softbreak" else child.content for child in block[1].children or ())
        if "".join(parts) == "\n".join(map(str.strip, block[1].content.split("\n"))):
            return source
    if block[0].type == "fence":
        return _render(block, columns) if block[0].content else ""
    drawn = _render(block, columns)
    said, meant = _said(drawn), _said(unescape(_FENCE.sub("", source)))
    if block[0].type == "table_open":  # the rows of cells that are folded mix
        said, meant = "".join(sorted(said)), "".join(sorted(meant))
        if 8 * sum(token.type == "th_open" for token in block) > columns:  # columns of a few characters
            return source
    return drawn if said == meant and bool(drawn.strip()) == bool(source.strip()) else source


def _said(text: str) -> str:
    """Return the letters and digits of a text."""
    return "".join(filter(str.isalnum, _ESCAPES.sub("", text)))


def _render(block: list[Token], columns: int) -> str:
    """Return the lines that rich makes of a block."""
    longest = max((len(line) for token in block for line in token.content.split("\n")), default=0)
    broken = block[0].type in ("table_open", "hr")
    width = columns - 1 if broken else 2 * longest + 8 * len(block) + 80  # no line is broken
    console = Console(
        file=io.StringIO(), width=max(width, 1), force_terminal=True, color_system="standard", theme=_STYLES,
        legacy_windows=False,
    )  # fmt: skip
    drawn = _Markdown("")
    drawn.parsed = [_plain(token) for token in block]
    lines = "\n".join(_line(line) for line in console.render_lines(drawn, pad=False))
    return (lines.rstrip("\n") if block[0].type in ("fence", "code_block") else lines.strip("\n")) + "\n"


def _line(segments: list[Segment]) -> str:
    """Return a line with escape sequences, without the spaces with which rich fills it."""
    line = list(segments)
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    return "".join(style.render(text, color_system=ColorSystem.STANDARD) if style else text for text, style, _ in line)


def _plain(token: Token) -> Token:
    """Return a token as rich shall draw it: safe for a terminal, with its line breaks, links and images spelled out."""
    if token.children is None or token.type == "image":
        return replace(token, content=visible(token.content))
    children: list[Token] = []
    targets: list[str] = []
    for child in map(_plain, token.children):
        if child.type == "softbreak":
            children.append(replace(child, type="hardbreak"))
        elif child.type == "image":
            children.append(_text(f"![{child.content}]({visible(str(child.attrs['src']))})"))
        elif child.type == "link_open":
            targets.append("" if child.info == "auto" else f" ({visible(str(child.attrs['href']))})")
        elif child.type == "link_close":
            children.append(_text(targets.pop()))
        else:
            children.append(child)
    return replace(token, children=children)


def _text(content: str) -> Token:
    """Return a token of text."""
    return Token("text", "", 0, content=content)


class _Heading(markdown.Heading):
    """A heading at the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(markdown.CodeBlock):
    """Highlighted code with nothing around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip("\n")
        lexer = self.lexer_name if len(code) <= _HIGHLIGHTED else "text"
        text = Syntax("", lexer, theme=_CODE, tab_size=0).highlight(code)
        text.rstrip()
        yield from text.render(console, end="\n")


class _Table(markdown.TableElement):
    """A table whose cells are folded where they are too wide, and never cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            for column in getattr(table, "columns", ()):
                column.overflow = "fold"
            yield table


class _Item(markdown.ListItem):
    """An item of a list, with the dot after its number."""

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        width = len(str(last_number)) + 3
        style = console.get_style("markdown.item.number", default="none")
        marks = [Segment(f" {number}. ".rjust(width), style), Segment(" " * width, style)]
        lines = console.render_lines(self.elements, options.update(width=options.max_width - width))
        for index, line in enumerate(lines):
            yield marks[min(index, 1)]
            yield from line
            yield Segment("\n")


class _Markdown(markdown.Markdown):
    """Markdown whose headings, code, tables and items are drawn by the classes above."""

    elements = markdown.Markdown.elements | {
        "heading_open": _Heading, "fence": _Code, "code_block": _Code, "list_item_open": _Item,
        "table_open": _Table,
    }  # fmt: skip


_PARSER = _parser()
