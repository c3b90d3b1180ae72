"""schemathesis: requests made from ``/openapi.json``, valid and not, and what the server makes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.server.live import serving

PROGRAM = Path(sys.executable).with_name("schemathesis")


@pytest.mark.skipif(not PROGRAM.exists(), reason="schemathesis is not installed")
@pytest.mark.parametrize("key", [None, "a-key"])
def test_the_server_keeps_what_its_description_promises(key: str | None, tmp_path: Path) -> None:
    options = ["--phases", "coverage", "--max-time", "8"]
    if key is None:
        options = ["--max-examples", "8", "--max-time", "25"]
    with serving(api_key=key, max_tokens=32) as address:
        done = subprocess.run(
            [str(PROGRAM), "run", f"{address}/openapi.json", *options, "--request-timeout", "30", "--seed", "1",
             # A schema cannot say everything: a conversation has an order, a regular expression a syntax.
             "--exclude-checks", "positive_data_acceptance",
             "--exclude-path-regex", "^/props$",  # POST answers 501, as in llama.cpp
             *(["--header", f"Authorization: Bearer {key}"] if key else [])],
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert httpx.get(f"{address}/health").status_code == 200
