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
def test_the_server_keeps_what_its_description_promises(tmp_path: Path) -> None:
    with serving(api_key="a-key", max_tokens=32) as address:
        done = subprocess.run(
            [str(PROGRAM), "run", f"{address}/openapi.json", "--header", "Authorization: Bearer a-key",
             "--max-examples", "8", "--max-time", "12", "--request-timeout", "30", "--seed", "1",
             # A schema cannot say everything: a conversation has an order, a regular expression a syntax.
             "--exclude-checks", "positive_data_acceptance",
             "--exclude-path-regex", "^/props$"],  # POST answers 501, as in llama.cpp
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert httpx.get(f"{address}/health").status_code == 200
