"""The picture in the README is drawn by the program itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def test_the_capture_shows_the_canvas_and_is_the_same_each_time(tmp_path: Path) -> None:
    files = [tmp_path / "new" / name for name in ("one.svg", "two.svg")]
    for file in files:
        arguments = [sys.executable, ROOT / "scripts" / "capture.py", file]
        subprocess.run(arguments, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    ElementTree.fromstring(one)
    shown = unescape("\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", one))).replace("\xa0", " ")
    assert "dgemma-mlx generate" in shown
    steps = [int(step) for step in re.findall(r"canvas 1  step (\d+)/48", shown)]
    assert len(steps) > 1 and steps == list(range(1, len(steps) + 1))
    assert len(re.findall(r"\d+% accepted", shown)) == len(steps)
    assert len(re.findall(r"(?:[1-4] ){3}[1-4]", shown)) >= 8  # a step, and the answer
    frames = len(steps) + 2
    assert one.count("@keyframes") == one.count("prefers-reduced-motion: no-preference") == frames
    assert re.findall(r"\.show\d+ \{ visibility: (\w+)", one) == ["hidden"] * (frames - 1) + ["visible"]
    assert "<script" not in one and not re.search(r'(url\(["\']?|href="|src=")http', one)  # nothing is run or fetched
