"""Code blocks of an answer."""

from __future__ import annotations


def first_block(text: str) -> str | None:
    """Return the content of the first fenced code block of a Markdown text, or None. It may lack its last fence."""
    from markdown_it import MarkdownIt

    fences = (token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence")
    return next((fence.content for fence in fences), None)
