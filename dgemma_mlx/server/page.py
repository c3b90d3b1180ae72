"""The page for people: a chat that shows the canvas while it denoises. It is one file, and loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

_FILE = Path(__file__).parent / "page" / "index.html"


async def show(request: Request) -> Response:
    """Answer with the page."""
    text, headers = read_page()
    return HTMLResponse(text, headers=headers)


@lru_cache
def read_page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers, which let it run its own script and style, and nothing that is injected."""
    text = _FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text becomes HTML
    }
    return text, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _hash(text: str, tag: str) -> str:
    """Return the source of a policy that allows the only element with this tag."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


ROUTES = [Route("/", show)]
