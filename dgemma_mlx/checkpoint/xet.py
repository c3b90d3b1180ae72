"""Xet, the storage in which the Hub keeps large files: streams of their contents that begin anywhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any


class XetStorage:
    """The Xet storage of a repository's files, opened when the first of them is asked for.

    What ``huggingface_hub`` itself uses of hf_xet writes whole files only, from their beginning. A stream begins
    anywhere. hf_xet reads ahead, so what it has read when the process is killed is downloaded again.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        self._route = f"/api/models/{repo_id}/xet-read-token/{commit}"
        self._lock = threading.Lock()
        self._group: Any = None

    @staticmethod
    def is_allowed() -> bool:
        """Return whether the environment leaves the storage switched on."""
        from huggingface_hub import constants

        return not constants.HF_HUB_DISABLE_XET

    def pieces(self, xet_hash: str | None, size: int, start: int) -> Iterator[bytes]:
        """Yield the bytes of a file from ``start`` on. Any exception means that the storage cannot be used."""
        from hf_xet import XetFileInfo  # type: ignore[import-untyped]

        with self._lock:
            self._group = self._group or self._open()
        yield from self._group.download_stream(XetFileInfo(xet_hash, size), start=start)

    def _open(self) -> Any:
        """Return an ``XetDownloadStreamGroup``. It asks the Hub for its address and for tokens itself."""
        from hf_xet import XetSession
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers()
        return XetSession().new_download_stream_group(
            token_refresh_url=constants.ENDPOINT + self._route,
            token_refresh_headers=headers,
            custom_headers={name: value for name, value in headers.items() if name.lower() != "authorization"},
        )
