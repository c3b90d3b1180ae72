"""What scripts/openblas.sh says where there is no OpenBLAS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "openblas.sh"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS needs no OpenBLAS")
def test_a_missing_library_is_named_with_what_needs_it_and_for_what(tmp_path: Path) -> None:
    (tmp_path / "ldconfig").write_text("#!/bin/sh\n")  # a machine whose linker knows no libraries
    (tmp_path / "ldconfig").chmod(0o755)
    done = subprocess.run(
        ["sh", SCRIPT, "make bench", "its figures were measured with it"], capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "make bench needs OpenBLAS, which was not found: its figures were measured with it",
        "hint: on Debian and Ubuntu: apt-get install libopenblas0-pthread",
    ]
