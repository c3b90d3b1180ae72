"""Clients that go away."""

from __future__ import annotations

import httpx
import pytest

from tests.server.live import serving


def test_a_client_that_leaves_a_stream_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "stream": True}
    with serving() as address:
        path = f"{address}/v1/chat/completions"
        with httpx.stream("POST", path, json=body, timeout=60) as stream:
            next(stream.iter_lines())
        assert httpx.post(path, json={**body, "stream": False}, timeout=60).is_success
    assert caplog.records == []
