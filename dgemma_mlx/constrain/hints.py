"""Keywords of a JSON schema that look as if they had an effect: likely typos, and keywords of other drafts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.document import Document, short
from dgemma_mlx.constrain.drafts import ANNOTATIONS, SINCE, TITLES

_CLOSE = 0.85  # of difflib's ratio: "requierd" is 0.875 like "required", "itmes" 0.8 like "items"
_SHORTEST = 5  # characters of a name that is compared


def warn(document: Document, stacklevel: int) -> None:
    """Warn, in one line, of the keywords of a document that have no effect."""
    found = [(path, problem) for schema, path, draft in document.schemas() for problem in _problems(schema, draft)]
    if found:
        path, problem = found[0]
        more = f" (and {len(found) - 1} more like this)" if len(found) > 1 else ""
        warnings.warn(f"the JSON schema at {short(path)}: {problem}{more}", UserWarning, stacklevel + 1)


def _problems(schema: Mapping[str, Any], draft: int) -> Iterator[str]:
    """Yield what is to be said of the keywords of a schema."""
    known = [name for name in schema if name in SINCE]
    if isinstance(schema.get("required"), bool):
        yield "required has no effect; it must be a list of names next to properties"
    for name in known:
        if draft and SINCE[name] > draft:
            yield f"{name} has no effect; it is not in {TITLES[draft]}, which $schema declares"
    for name in schema:
        is_new = name not in SINCE and name not in ANNOTATIONS
        if known and is_new and name.isalpha() and len(name) >= _SHORTEST:  # _format and x-format are meant so
            by_lower = {keyword.lower(): keyword for keyword in SINCE if keyword not in schema}
            similar = get_close_matches(name.lower(), by_lower, n=1, cutoff=_CLOSE)
            if similar:
                yield f"{shown(name)} has no effect; did you mean {by_lower[similar[0]]}?"
