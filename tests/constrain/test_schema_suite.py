"""The JSON-Schema-Test-Suite of draft 2020-12: no invalid value matches, and nearly every schema compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import Constraint, DgemmaError

pytestmark = pytest.mark.slow

# Groups without the formats, which have tests of their own, and without patterns of ECMAScript's own kind.
_ELSEWHERE = ("format", "ecmascript-regex", "hostname", "idn-", "uri", "iri", "email", "ipv", "regex", "date", "time")


@pytest.fixture(scope="module")
def groups(public_data: Path) -> list[dict[str, Any]]:
    """The groups of tests about the meaning of keywords, each with the file that it stands in."""
    parts = json.loads((public_data / "json-schema-test-suite-2020-12.json").read_text())
    files = [(part["file"].split("/")[-1], part["groups"]) for part in parts]
    return [{"file": file, **group} for file, found in files if not file.startswith(_ELSEWHERE) for group in found]


@pytest.mark.filterwarnings("ignore:the JSON schema at")
def test_no_invalid_value_of_the_suite_matches(groups: list[dict[str, Any]]) -> None:
    compiled, wider, remote, never, refused = 0, [], 0, 0, []
    accepted, valid = 0, 0
    for group in groups:
        try:
            constraint = Constraint.json_schema(group["schema"])
        except DgemmaError as error:
            assert error.exit_code == 2
            remote += "is not within the schema" in error.message
            never += not any(test["valid"] for test in group["tests"])
            if any(test["valid"] for test in group["tests"]) and "is not within the schema" not in error.message:
                refused.append((group["description"], error.message))
            continue
        compiled += 1
        for test in group["tests"]:
            matches = constraint.matches(json.dumps(test["data"]))
            accepted, valid = accepted + (matches and test["valid"]), valid + test["valid"]
            if matches and not test["valid"]:
                wider.append((group["description"], test["data"]))
    assert wider == []
    assert compiled >= 330
    assert len(refused) <= 8, refused
    assert accepted >= 0.9 * valid
