"""The Clang compiler, from the PyPI package ``ziglang`` or from the system, and a cache of its results."""

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
KERNEL_FILE = "kernel.metal"  # file name of the kernel's text in the compiler's messages

LANGUAGE = [
    *["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "--target=x86_64-linux-gnu", "-march=x86-64-v3"],
    *["-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"],  # no double
    # Every half and bfloat operation rounds its result.
    *["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"],
    *["-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"],
    "-fstack-clash-protection",  # a stack overflow hits the guard page
    # These flags keep two calls of an operation in the branches of an if apart.
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
    "-ftrivial-auto-var-init=pattern",  # uninitialized variables of a thread are NaN or 0xAA
    # These flags keep loops from becoming a memcpy or wide vector accesses, which would not be checked.
    *["-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin", "-mllvm", "-disable-loop-idiom-all"],
]


class CompileError(Exception):
    """An error of the compiler, with the compiler's own message."""


@dataclass(frozen=True)
class Toolchain:
    """The commands of a toolchain.

    Attributes:
        clang: Command that compiles a kernel.
        link: Command that links a kernel.
        cplusplus: Command that builds the runtime.
        version: The version line of the compiler.
    """

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
    """Return the commands of Clang 19 or newer on an x86-64 Linux machine, or None without one."""
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
    """Return whether kernels can be simulated on this machine."""
    return find() is not None


def _toolchain() -> Toolchain:
    found = find()
    if found is None:
        raise CompileError("simulating kernels needs Clang 19 or newer on x86-64 Linux: pip install ziglang")
    return found


@cache
def cache_folder() -> Path:
    """Return the cache folder: the environment variable ``METALSIM_CACHE``, or a folder in the user's cache."""
    folder = Path(os.environ.get("METALSIM_CACHE") or platformdirs.user_cache_path("metalsim"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: Iterable[str], folder: Path | None = None, text: str | None = None) -> str:
    """Run a command of the toolchain with ``text`` as its input and return its output.

    Raises ``CompileError`` if the command fails.
    """
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
    """Return a folder of the cache, whose name is a digest of ``parts`` and the toolchain.

    If the folder does not exist, ``build`` is called with an empty folder that then becomes it.
    """
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
    """Compile the text that precedes every kernel. Clang reads the compiled form in a tenth of the time."""
    flags = CHECKED if check else PLAIN
    once = ["-fpch-instantiate-templates"]  # instantiate templates here, and not again for every kernel

    def build(folder: Path) -> None:
        # The text comes from standard input, because Clang would look for a file again later.
        _clang([*flags, "-c", *once, "-Xclang", "-emit-pch", "-o", "preamble.pch", "-"], folder, text)

    return _cached("preamble", [*flags, *once, text], build) / "preamble.pch"


def compile_kernel(text: str, before: str, *, check: bool) -> Path:
    """Compile a translated kernel after the preamble ``before`` and return the path of the shared object.

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
    """Return Clang's dump of the syntax tree of a kernel that ``compile_kernel`` compiles, without the preamble's tree.

    Raises:
        CompileError: Clang refuses the text.
    """

    def build(folder: Path) -> None:
        header = ["-include-pch", str(preamble(before, check=True))]
        tree = _clang([*CHECKED, *header, "-fsyntax-only", "-Xclang", "-ast-dump", "-"], text=text)
        (folder / "tree.txt").write_text(tree)

    return (_cached("tree", [*CHECKED, before, text], build) / "tree.txt").read_text()


def _with_sites(assembly: str) -> str:
    """Add a table of the calls of the runtime, with the return address and the line of the kernel's text of each."""
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
    """Build the runtime and return the path of its shared object."""
    sources = sorted(RUNTIME.iterdir())
    abi = RUNTIME.parent / "shim" / "abi.h"
    parts = [path.read_text() for path in [*sources, abi]]

    def build(folder: Path) -> None:
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-nostdlib++"]
        flags += ["-fno-exceptions", "-fno-rtti", "-fno-sanitize=all"]
        code = [str(path) for path in sources if path.suffix == ".cpp"]
        _run([*_toolchain().cplusplus, *flags, "-o", "runtime.so", *code], folder)

    return _cached("runtime", parts, build) / "runtime.so"
