"""Write the Homebrew formula in packaging/ from pyproject.toml, constraints.txt and the package index.

    python scripts/homebrew.py [--url URL --sha256 SUM]

URL and SUM are those of a release's source archive. The wheels that the formula installs are the pinned versions of the
dependencies, the extra `serve` included, for Python 3.13 on Apple silicon, one for each macOS where they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name, parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMULA = ROOT / "packaging" / "homebrew" / "dgemma-mlx.rb"
PYTHON = (3, 13)
SYSTEMS = {"tahoe": 26, "sequoia": 15, "sonoma": 14}  # Homebrew's names of macOS, the latest first
MAC_ONLY = {"mlx-metal"}  # is not installed elsewhere, and needs nothing
INDEX_JSON = "application/vnd.pypi.simple.v1+json"
MARKERS = {  # what the markers of requirements see
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "arm64",
    "platform_python_implementation": "CPython",
    "platform_system": "Darwin",
    "python_full_version": "3.13.0",
    "python_version": "3.13",
    "sys_platform": "darwin",
}
TEMPLATE = """\
# Written by `python scripts/homebrew.py`. Change that script, not this file.
class DgemmaMlx < Formula
  include Language::Python::Virtualenv

  desc "DiffusionGemma on Apple silicon: text that is denoised a canvas at a time"
  homepage "{homepage}"
  url "{url}"
  sha256 "{sha256}"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

{resources}
  # MLX is published as wheels only, so all dependencies are wheels.
  def install
    python = Formula["python@3.13"].opt_bin/"python3.13"
    venv = virtualenv_create(libexec, python)
    resources.each {{ |resource| resource.stage(buildpath/"wheels") }}
    system python, "-m", "pip", "--python=#{{libexec}}/bin/python", "install", "--no-index", "--no-deps",
           *Dir[buildpath/"wheels/*.whl"]
    venv.pip_install_and_link buildpath
    man1.install_symlink libexec/"share/man/man1/dgemma-mlx.1"
  end

  test do
    answer = shell_output("#{{bin}}/dgemma-mlx generate -m demo --seed 1 -q 'Sort 7 3 5'")
    assert_equal "3 5 7", answer.strip
  end
end
"""


def holds(requirement: Requirement, extra: str = "") -> bool:
    """Return whether a requirement applies to the formula's Python and system."""
    return requirement.marker is None or requirement.marker.evaluate({**MARKERS, "extra": extra})


def pinned() -> dict[str, str]:
    """Return the versions of constraints.txt that apply, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins if holds(pin)}


def closure(requirements: Iterable[str]) -> list[str]:
    """Return the packages that the requirements need, and what these need in turn, from what is installed here."""
    found, waiting = set[str](), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and holds(requirement):
            found.add(name)
            needed = [] if name in MAC_ONLY else [Requirement(text) for text in metadata.requires(name) or []]
            waiting += [need for need in needed if any(holds(need, extra) for extra in ("", *requirement.extras))]
    return sorted(found)


def wheels_of(name: str, version: str) -> list[Any]:
    """Return the wheels of one version of a package, as the package index describes them."""
    request = urllib.request.Request(f"https://pypi.org/simple/{name}/", headers={"Accept": INDEX_JSON})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = [file for file in json.load(answer)["files"] if file["filename"].endswith(".whl")]
    return [file for file in files if str(parse_wheel_filename(file["filename"])[1]) == version]


def wheel(files: list[Any], macos: int) -> Any:
    """Return the wheel among the files of a release that pip would choose on a version of macOS."""
    platforms = list(mac_platforms((macos, 0), "arm64"))
    tags = [*cpython_tags(PYTHON, platforms=platforms), *compatible_tags(PYTHON, "cp313", platforms)]
    ranks = {tag: rank for rank, tag in enumerate(tags)}
    usable = {}
    for file in files:
        for tag in parse_wheel_filename(file["filename"])[3]:
            if tag in ranks:
                usable[ranks[tag]] = file
    if not usable:
        raise SystemExit(f"homebrew: no wheel for macOS {macos} among {[file['filename'] for file in files]}")
    return usable[min(usable)]


def resource(name: str, files: list[Any]) -> str:
    """Return the resource of one package: its wheel, or one wheel for each macOS where they differ."""
    wheels = {system: wheel(files, version) for system, version in SYSTEMS.items()}
    lines = [f'  resource "{name}" do']
    if len({file["filename"] for file in wheels.values()}) == 1:
        lines += source(next(iter(wheels.values())), "    ")
    else:
        for number, (system, file) in enumerate(wheels.items()):
            newer = " :or_newer" if number == 0 else ""
            lines += [f"    on_{system}{newer} do", *source(file, "      "), "    end"]
    return "\n".join([*lines, "  end", ""])


def source(file: Any, indent: str) -> list[str]:
    """Return the lines that name a wheel, which must not be unpacked, and its checksum."""
    return [
        f'{indent}url "{file["url"]}", using: :nounzip',
        f'{indent}sha256 "{file["hashes"]["sha256"]}"',
    ]


def main() -> None:
    """Write the formula."""
    homepage = PROJECT.get("urls", {}).get("Homepage", "https://huggingface.co/google/diffusiongemma-26B-A4B-it")
    parser = argparse.ArgumentParser(description="Write the Homebrew formula.")
    parser.add_argument("--url", default=f"{homepage}/archive/v{PROJECT['version']}.tar.gz", help="the source archive")
    parser.add_argument("--sha256", default="0" * 64, help="its checksum")
    arguments = parser.parse_args()
    needed, versions = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]), pinned()
    resources = "\n".join(resource(name, wheels_of(name, versions[name])) for name in needed)
    FORMULA.parent.mkdir(parents=True, exist_ok=True)
    FORMULA.write_text(
        TEMPLATE.format(homepage=homepage, url=arguments.url, sha256=arguments.sha256, resources=resources),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
