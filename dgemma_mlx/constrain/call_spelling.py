"""How Gemma 4 spells the arguments of a tool call, as terms over bytes and the string delimiter.

The object ``{"city": "Rome", "days": 3}`` is ``{city:<|"|>Rome<|"|>,days:3}``. The delimiter is a control token, so
nothing within a string is escaped. Names that are words stand bare, others as strings.
"""

from __future__ import annotations

from dgemma_mlx.constrain.machine import BYTES
from dgemma_mlx.constrain.spelling import JsonSpelling
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.texts import Numbers, Strings

DELIMITER = '<|"|>'
_BARE = "^[A-Za-z_][A-Za-z0-9_.-]*$"  # names that the grammar of calls reads without delimiters


class CallSpelling(JsonSpelling):
    """The spelling of a call's arguments, as the chat template writes them: without spaces, and sorted by name."""

    controls = (DELIMITER,)
    patterns = frozenset({_BARE})
    sorts_names = True

    def __init__(self, strings: Strings, numbers: Numbers) -> None:
        """Spell ``strings`` and ``numbers``, which are terms over characters."""
        super().__init__(strings, numbers)
        self.comma, self.colon = self.literal(","), self.literal(":")
        self._delimiter = self.terms.symbols(1 << BYTES)

    def string(self, strings: Term) -> Term:
        """Return the spellings of strings."""
        return self.terms.sequence(self._delimiter, self._plain(strings), self._delimiter)

    def names(self, names: Term) -> Term:
        """Return the spellings of names of properties: words stand bare."""
        both, bare = self._strings.terms.every, self._strings.pattern(_BARE, "#")
        others = self.string(both([names, self._strings.terms.other(bare)]))
        return self.terms.either([self._plain(both([names, bare])), others])

    def name(self, name: str) -> Term:
        """Return the spelling of one name."""
        return self.names(self._strings.text(name))

    def _plain(self, strings: Term) -> Term:
        """Return strings as they stand."""
        return self._characters(strings, self._utf8)
