"""The laws of docs/architecture.md: import contracts that a planted import breaks, sizes, and docstrings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "dgemma_mlx", ROOT / "convert" / "dgemma_convert")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
NAMES = {contract["id"]: contract["name"] for contract in CONTRACTS}

PLANTED = [  # file, what is planted at its end, the contracts that it breaks
    ("dgemma_mlx/diffusion/schedule.py", "import dgemma_mlx.generation.api", {"layers", "acyclic"}),
    ("dgemma_mlx/kernels/_common.py", "from dgemma_mlx.model import rope", {"layers", "acyclic"}),
    ("dgemma_mlx/generation/options.py", "from dgemma_mlx.cli.settings import Settings", {"layers", "acyclic"}),
    ("dgemma_mlx/generation/model.py",
     "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dgemma_mlx.generation.runner import Runner",
     {"acyclic"}),
    ("dgemma_mlx/cli/render/plain.py", "def late():\n    import mlx.core", {"drawing"}),
    ("dgemma_mlx/cli/render/plain.py", "from dgemma_mlx.kernels import MAX_KEPT", {"drawing"}),
    ("dgemma_mlx/cli/chat/editor.py", "import mlx.core", {"conversation"}),
    ("dgemma_mlx/train/loop.py", "import mlx_lm", {"foreign"}),
    ("convert/dgemma_convert/plan.py", "import transformers", {"foreign"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts, to plant imports into."""
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(package, folder / package.relative_to(ROOT), ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def broken_contracts(folder: Path) -> set[str]:
    """The names of the contracts that the linter finds broken in a copy."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    path = os.pathsep.join([str(folder), str(folder / "convert")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    broken = {name for name in NAMES.values() if re.search(rf"^{re.escape(name)} BROKEN", done.stdout, re.MULTILINE)}
    assert (done.returncode == 0) == (not broken), done.stdout + done.stderr
    assert all(name in done.stdout for name in NAMES.values()), done.stdout + done.stderr
    return broken


def test_the_contracts_hold(copied: Path) -> None:
    assert broken_contracts(copied) == set()


@pytest.mark.parametrize(("file", "planted", "broken"), PLANTED)
def test_a_planted_import_breaks_its_contract(copied: Path, file: str, planted: str, broken: set[str]) -> None:
    path = copied / file
    before = path.read_text()
    try:
        path.write_text(f"{before}\n{planted}\n")
        assert broken_contracts(copied) == {NAMES[name] for name in broken}
    finally:
        path.write_text(before)


# Where else the programs to compare with may be imported; the packages never do.
COMPARISONS = (
    "benchmarks/", "tests/metalsim/", "tests/model/test_adapter.py", "tests/oracle/",
    "tests/train/test_demo_tokenizer.py",
)
FOREIGN = re.compile(r"^\s*(?:from|import) (?:torch|transformers|mlx_lm|mlx_vlm|peft)\b", re.MULTILINE)


def test_other_programs_are_imported_only_where_they_are_compared_with() -> None:
    folders = ("benchmarks", "recipes", "scripts", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if FOREIGN.search(path.read_text())]
    assert files
    assert [name for path in files if not (name := path.relative_to(ROOT).as_posix()).startswith(COMPARISONS)] == []


def test_every_package_has_a_layer() -> None:
    layers = {name.strip() for layer in CONTRACTS[0]["layers"] for name in layer.split("|")}
    found = {f"dgemma_mlx.{path.stem}" for path in PACKAGES[0].glob("*.py") if not path.stem.startswith("__")}
    found |= {f"dgemma_mlx.{path.parent.name}" for path in PACKAGES[0].glob("*/__init__.py")}
    assert found | {"dgemma_convert"} == layers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_source_file_is_small_and_its_fields_are_described_in_docstrings(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    tree = ast.parse("\n".join(lines))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            # A command's parameters and its docstring, which is its help, do not count.
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 60, f"{node.name} is long"
    # help() and IDEs do not find a string under a field or a constant.
    assert list(stray_strings(tree)) == []


def stray_strings(tree: ast.Module) -> Iterator[int]:
    """Line numbers of string statements that are not docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            expressions = (statement.value for statement in node.body[1:] if isinstance(statement, ast.Expr))
            constants = (value for value in expressions if isinstance(value, ast.Constant))
            yield from (constant.lineno for constant in constants if isinstance(constant.value, str))


# What may call json.loads itself: the reader of all others, for a lexeme that was matched before, for own data.
OWN_JSON = {"json_text.py", "call_repair.py", "demo_tokenizer.py", "finetune.py"}


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Yield every call of a function or method of this name in the packages."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield path, node


def test_json_from_outside_has_one_reader() -> None:
    found = {path.name for name in ("json.load", "json.loads") for path, _ in calls(name)}
    assert found - OWN_JSON == set()


def test_every_error_has_a_hint() -> None:
    def hint(call: ast.Call) -> ast.expr | None:
        given = [keyword.value for keyword in call.keywords if keyword.arg == "hint"]
        starred = [argument for argument in call.args if isinstance(argument, ast.Starred)]
        return next(iter([*call.args[1:2], *given, *starred]), None)

    bare = [
        f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in calls("DgemmaError")
        if (found := hint(call)) is None or (isinstance(found, ast.Constant) and not found.value)
    ]
    assert bare == []
