"""``generate --extract``: which block of an answer is printed, and what happens without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dgemma_mlx import DgemmaError, Done
from dgemma_mlx.cli.code_block import check_block, first_block, print_block
from dgemma_mlx.events import Statistics

DONE = Done("", "", (), (), "stop", 7, Statistics(1, 0, 1, 1, 1, 1.0, 0.0, 1.0, 1.0, 0))


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("Use:\n```python\nx = 1\n\n  y\n```\nor\n```\nz\n```", "x = 1\n\n  y\n"), ("No `code` here.", None),
        ("~~~~\na ```\n~~~\n~~~~\n", "a ```\n~~~\n"), ("1. Run\n\n   ```sh\n   ls\n   ```", "ls\n"),
        ("> ```\n> quoted\n> ```", "quoted\n"), ("```\ncut off", "cut off"), ("```\n```", ""), ("    indented", None),
        ("````\n```\ninner\n```\n````", "```\ninner\n```\n"), ("", None),
    ],
)  # fmt: skip
def test_the_first_fenced_block(text: str, block: str | None) -> None:
    assert first_block(text) == block


def test_nothing_but_code_goes_to_stdout(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    code = replace(DONE, text="Here:\n```sh\necho ü\n```\nDone.")
    assert print_block([code]) is code
    check_block(code)
    assert capfdbinary.readouterr() == ("echo ü\n".encode(), b"")
    prose = replace(DONE, text="I cannot.")
    print_block([prose])
    with pytest.raises(DgemmaError, match="the answer has no code block") as caught:
        check_block(prose)
    assert capfdbinary.readouterr() == (b"", b"I cannot.\n")
    assert caught.value.exit_code == 1 and "--seed 7" in caught.value.hint
