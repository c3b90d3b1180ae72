"""The exception for errors that are reported to the user."""

from __future__ import annotations

_LONGEST = 500  # characters of a message or a hint; file names and quoted values can be longer


class DgemmaError(Exception):
    """An error that the user can act on. The command line prints its message and hint without a traceback.

    Both often quote names and values from outside. Line feeds, control characters and other characters that cannot be
    seen are therefore escaped as in a Python string, and a long text is cut in its middle.

    Attributes:
        message: One line that says what is wrong; it starts in lower case and has no full stop at the end.
        hint: Whole sentences that say what to do; may be empty.
        exit_code: Exit code of the program: 1 for run-time failures, such as a damaged file, and 2 for wrong usage.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        self.message = _one_line(message)
        self.hint = _one_line(hint)
        self.exit_code = exit_code
        super().__init__(self.message)


class PromptTooLongError(DgemmaError):
    """The error of a prompt that leaves no room for an answer.

    Attributes:
        tokens: Number of tokens of the prompt.
        most: Largest number of tokens of a prompt.
        positions: Number of positions the model supports.
    """

    def __init__(self, tokens: int, canvas_length: int, positions: int) -> None:
        self.tokens, self.most, self.positions = tokens, positions - canvas_length, positions
        super().__init__(
            f"the prompt has {tokens:,} tokens; with a canvas of {canvas_length} "
            f"it exceeds the model's limit of {positions:,} positions",
            "Shorten the prompt.",
        )


def _one_line(text: str) -> str:
    """Return the text in at most ``_LONGEST`` characters that can be seen."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 + 1 :]}"
    line = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}…{line[-_LONGEST // 2 + 1 :]}"


def how_to_install(packages: str) -> str:
    """Return how to install optional libraries, named with spaces between them, where the program is."""
    return f"pip install {packages}, or pipx inject dgemma-mlx {packages}"
