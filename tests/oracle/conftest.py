"""Fixtures of all comparisons with the references."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
