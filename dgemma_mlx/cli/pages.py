"""Where the pages of the documentation are on this machine: in the checkout, or where the wheel has put them."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def pages_folder() -> Path:
    """Return the folder of the pages. The wheel installs ``docs/`` as ``share/doc/dgemma-mlx``."""
    import site

    places = [Path(__file__).parents[2] / "docs"]
    places += [Path(prefix, "share", "doc", "dgemma-mlx") for prefix in (sys.prefix, site.getuserbase())]
    return next((place for place in places if (place / "cli.md").exists()), places[1])


def located(text: str) -> str:
    """Return a text with the whole path in place of names such as ``docs/tools.md``."""
    return re.sub(r"\bdocs/(?=[a-z_]+\.md)", lambda _: f"{pages_folder()}/", text)
