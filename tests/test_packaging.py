"""The Homebrew formula installs what constraints.txt pins, and what the program needs."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from scripts.homebrew import FORMULA, PROJECT, closure, pinned


def _resources() -> dict[str, set[str]]:
    """Return the versions of the wheels of each resource; more than one is a mistake."""
    blocks = re.findall(
        r'^  resource "(.*?)" do\n(.*?)^  end$', FORMULA.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return {name: set(re.findall(r"/[\w.]+?-([\w.]+?)-[^/]*\.whl", body)) for name, body in blocks}


def test_the_formula_has_the_pinned_version_of_each_package_that_the_program_needs() -> None:
    versions = pinned()
    needed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]])
    assert _resources() == {name: {versions[name]} for name in needed}
    assert f"v{PROJECT['version']}.tar.gz" in FORMULA.read_text(encoding="utf-8")


def test_the_formula_is_ruby() -> None:
    if shutil.which("ruby") is None:
        pytest.skip("ruby is not installed")
    subprocess.run(["ruby", "-c", FORMULA], check=True, capture_output=True)
