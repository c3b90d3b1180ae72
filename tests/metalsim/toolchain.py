"""Clang, from the ``ziglang`` package of PyPI or the system, and a cache of what it has compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

RUNTIME = Path(__file__).parent / "runtime"
KERNEL_FILE = "kernel.metal"  # the kernel's text in what the compiler says

LANGUAGE = [
    *["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "--target=x86_64-linux-gnu", "-march=x86-64-v3"],
    *["-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"],  # no double
    *["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"],  # each step rounds
    *["-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"],
    "-fstack-clash-protection",  # a stack too small is found at its guard page
    # Two calls of an operation in the arms of an if stay two.
    *["-mllvm", "-sink-common-insts=0", "-mllvm", "-hoist-common-insts=0", "-mllvm", "-enable-tail-merge=0"],
    *["-Wno-unknown-attributes", "-Wno-unused-value"],
    *["-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=return-type"],
]
PLAIN = ["-O3"]
CHECKED = [
    *["-O2", "-gline-tables-only", "-fno-optimize-sibling-calls"],
    "-fsanitize-coverage=func,trace-loads,trace-stores",
    "-fsanitize=alignment,array-bounds,integer-divide-by-zero,float-cast-overflow",
    *["-fsanitize-minimal-runtime", "-fsanitize-recover=all"],
    "-ftrivial-auto-var-init=pattern",  # what a thread reads of its own without having written it is NaN or 0xAA
    # A loop that became a memcpy or wide vector accesses would not be seen.
    *["-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin", "-mllvm", "-disable-loop-idiom-all"],
]


class CompileError(Exception):
    """What the compiler refused, in its words."""


@dataclass(frozen=True)
class Toolchain:
    """The commands to compile, link and build the runtime, and a name that tells versions apart."""

    clang: tuple[str, ...]
    link: tuple[str, ...]
    cplusplus: tuple[str, ...]
    version: str


def _version(command: tuple[str, ...]) -> str | None:
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.splitlines()[0]


@cache
def find() -> Toolchain | None:
    """Clang 19 or newer on an x86-64 Linux machine; None where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    package = importlib.util.find_spec("ziglang")
    if package is not None and package.origin is not None:
        zig = str(Path(package.origin).parent / "zig")
        version = _version((zig, "clang"))
        if version is not None:
            return Toolchain((zig, "clang"), (zig, "ld.lld", "-shared"), (zig, "cc", "-x", "c++"), version)
    for name in ["clang", *(f"clang-{number}" for number in range(24, 18, -1))]:
        path = shutil.which(name)
        version = _version((path,)) if path else None
        number = re.search(r"version (\d+)", version or "")
        if path and version and number and int(number[1]) >= 19:
            return Toolchain((path,), (path, "-shared", "-nostdlib"), (path, "-x", "c++"), version)
    return None


def available() -> bool:
    """Whether kernels can be simulated on this machine."""
    return find() is not None


def _toolchain() -> Toolchain:
    found = find()
    if found is None:
        raise CompileError("simulating kernels needs Clang 19 or newer on x86-64 Linux: pip install ziglang")
    return found


@cache
def cache_folder() -> Path:
    """``METALSIM_CACHE``, or a folder of the user's cache."""
    folder = Path(os.environ.get("METALSIM_CACHE") or platformdirs.user_cache_path("metalsim"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: Iterable[str], folder: Path | None = None, text: str | None = None) -> str:
    """Runs a command of the toolchain, with ``text`` as its input; returns what it printed."""
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache_folder() / "zig")}
    environment["ZIG_LOCAL_CACHE_DIR"] = environment["ZIG_GLOBAL_CACHE_DIR"]
    result = subprocess.run(
        [*command], capture_output=True, text=True, input=text, cwd=folder, env=environment, check=False
    )
    if result.returncode != 0:
        raise CompileError(result.stderr.strip() or f"{result.args[:2]} ended with status {result.returncode}")
    return result.stdout


def _clang(arguments: Iterable[str], folder: Path | None = None, text: str | None = None) -> str:
    return _run([*_toolchain().clang, *LANGUAGE, *arguments], folder, text)


def _cached(name: str, parts: Iterable[str], build: Callable[[Path], None]) -> Path:
    """A file of the cache, named by what it is made of; ``build(empty folder)`` makes it where it is missing."""
    key = hashlib.sha256("\0".join([_toolchain().version, *LANGUAGE, *parts]).encode()).hexdigest()[:24]
    target = cache_folder() / f"{name}-{key}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as made:
            folder = Path(made) / "entry"
            folder.mkdir()
            build(folder)
            try:
                folder.rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


def preamble(text: str, *, check: bool) -> Path:
    """The compiled form of what stands before every kernel; Clang reads it in a tenth of the time."""
    flags = CHECKED if check else PLAIN
    once = ["-fpch-instantiate-templates"]  # here, not again for every kernel

    def build(folder: Path) -> None:
        # From standard input: a file's path would be looked for again later.
        _clang([*flags, "-c", *once, "-Xclang", "-emit-pch", "-o", "preamble.pch", "-"], folder, text)

    return _cached("preamble", [*flags, *once, text], build) / "preamble.pch"


def compile_kernel(text: str, before: str, *, check: bool) -> Path:
    """The shared object of a translated kernel that follows the preamble ``before``.

    Raises:
        CompileError: Clang refuses the text.
    """
    flags = CHECKED if check else PLAIN

    def build(folder: Path) -> None:
        header = ["-include-pch", str(preamble(before, check=check))]
        assembly = _clang([*flags, *header, "-S", "-o", "-", "-"], text=text)
        assemble = [*_toolchain().clang, "--target=x86_64-linux-gnu", "-x", "assembler", "-c", "-o", "kernel.o", "-"]
        _run(assemble, folder, _with_sites(assembly))
        _run([*_toolchain().link, "-s", "-o", "kernel.so", "kernel.o"], folder)
        (folder / "kernel.o").unlink()

    return _cached("kernel", [*flags, before, text], build) / "kernel.so"


def syntax_tree(text: str, before: str) -> str:
    """Clang's dump of the syntax tree of what ``compile_kernel`` compiles, without the preamble's.

    Raises:
        CompileError: Clang refuses the text.
    """

    def build(folder: Path) -> None:
        header = ["-include-pch", str(preamble(before, check=True))]
        tree = _clang([*CHECKED, *header, "-fsyntax-only", "-Xclang", "-ast-dump", "-"], text=text)
        (folder / "tree.txt").write_text(tree)

    return (_cached("tree", [*CHECKED, before, text], build) / "tree.txt").read_text()


def _with_sites(assembly: str) -> str:
    """Adds a table of the calls into the runtime: the address each returns to, and its line of the kernel's text."""
    files: dict[str, str] = {}
    lines: list[str] = []
    table: list[str] = []
    file, line = "", "0"
    for text in assembly.split("\n"):
        lines.append(text)
        if match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text):
            file, line = match[1], match[2]
        elif match := re.match(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text):
            files[match[1]] = match[2]
        elif re.match(r"\s*callq?\s+(msl_|__sanitizer_cov_|__ubsan_)", text):
            lines.append(f".Lmsl_site{len(table)}:")
            known = line if files.get(file, "").endswith(KERNEL_FILE) else "0"
            table.append(f"\t.quad .Lmsl_site{len(table)}, {known}")
    head = '\t.section .msl_sites,"aw",@progbits\n\t.p2align 3\n\t.globl msl_sites\nmsl_sites:'
    return "\n".join([*lines, head, *table, "\t.quad 0, 0", ""])


def runtime() -> Path:
    """The runtime as a shared object."""
    sources = sorted(RUNTIME.iterdir())
    abi = RUNTIME.parent / "shim" / "abi.h"
    parts = [path.read_text() for path in [*sources, abi]]

    def build(folder: Path) -> None:
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-nostdlib++"]
        flags += ["-fno-exceptions", "-fno-rtti", "-fno-sanitize=all"]
        code = [str(path) for path in sources if path.suffix == ".cpp"]
        _run([*_toolchain().cplusplus, *flags, "-o", "runtime.so", *code], folder)

    return _cached("runtime", parts, build) / "runtime.so"
