"""A terminal that cannot edit: when Ctrl-C comes at the worst moment."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from dgemma_mlx.cli.chat.lines import typed_lines


class PressedAtOnce(io.StringIO):
    """A terminal on which somebody presses Ctrl-C as soon as the second prompt is there."""

    def flush(self) -> None:
        if self.getvalue().endswith("... "):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_right_after_a_prompt_gives_up_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b'"""Sort\nSort 3 2\n'))
    screen = PressedAtOnce()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", typed)
            patch.setattr(sys, "stdout", screen)
            assert typed_lines()("") == "Sort 3 2\n"
    finally:
        signal.signal(signal.SIGINT, before)
    assert screen.getvalue() == ">>> ... \n>>> "
