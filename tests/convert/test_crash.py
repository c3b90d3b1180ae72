"""Killed, interrupted and resumed conversions: the output is complete or missing, and always has the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dgemma_convert import carry_out, convert, prepare
from dgemma_mlx.errors import DgemmaError
from tests.convert.checkpoints import digests, names_in, smallest_source, user_error
from tests.model.checkpoint import load
from tests.model.odd_values import reported

SHARD_BYTES = 40_000  # a handful of shards
KILLED = -signal.SIGKILL

# Arguments: source, output, options as JSON. The process kills itself at the ``left``-th report of progress
# ("progress"), before the ``left``-th operation on files of the partial output ("files"), before the ``left``-th
# rename of the output itself ("publish", on a disk that cannot exchange names), or just after the output has been
# exchanged with an old one ("exchange").
DRIVER = """
import json, os, signal, sys, time
from dgemma_convert import carry_out, prepare
from dgemma_mlx import files

source, output, options = sys.argv[1:]
options = json.loads(options)
kind, left = options.pop("kind"), options.pop("left", 0)
plan = prepare(source, output, options.pop("recipe", "q4"), shard_bytes=options.pop("shard_bytes"))

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile"):
        paths = [str(argument) for argument in arguments]
        if kind == "files" and any(str(plan.partial) in path for path in paths):
            count()
        if kind == "publish" and event == "os.rename" and str(plan.output) in paths:
            count()
        if kind == "exchange" and event == "os.rename" and paths[1].endswith(".old"):
            count()

def progress(*_):
    if kind == "progress":
        count()
    if kind == "slowly":
        time.sleep(0.01)

sys.addaudithook(watch)
if kind == "publish":
    files._exchange = lambda one, other: False
print("ready", flush=True)
carry_out(plan, progress=progress, **options)
"""

# Interrupts a conversion before every third operation on files of the partial output in turn, and resumes it.
MANY_STEPS = """
import json, sys
from pathlib import Path
from dgemma_convert import carry_out, prepare

source, folder, shard_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
left, watched = 0, ""

class Stopped(BaseException):
    pass

def watch(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile") and left:
        if any(watched in str(argument) for argument in arguments):
            left -= 1
            if not left:
                raise Stopped

sys.addaudithook(watch)
step = 0
while True:
    step += 3
    plan = prepare(source, folder / str(step) / "out", shard_bytes=shard_bytes)
    left, watched = step, str(plan.partial)
    try:
        carry_out(plan)
        break
    except Stopped:
        assert not plan.output.exists()
    left = 0
    carry_out(plan, resume=True)
print(step)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return smallest_source(tmp_path / "source")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an uninterrupted conversion of ``source``."""
    folder = tmp_path_factory.mktemp("whole")
    plan = prepare(str(smallest_source(folder / "source")), folder / "out", shard_bytes=SHARD_BYTES)
    assert 4 <= len(plan.shards) <= 12
    return digests(carry_out(plan).output)


def driver(source: Path, output: Path, kind: str, left: int = 0, **options: object) -> subprocess.Popen[str]:
    options = {"kind": kind, "left": left, "shard_bytes": SHARD_BYTES, **options}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(output), json.dumps(options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def run(source: Path, output: Path, kind: str, left: int = 0, **options: object) -> int:
    with driver(source, output, kind, left, **options) as process:
        error = process.communicate(timeout=60)[1]
    assert process.returncode in (0, KILLED), error
    return process.returncode


def resume(source: Path, output: Path, recipe: str = "q4", **options: bool) -> dict[str, str]:
    plan = prepare(str(source), output, recipe, shard_bytes=SHARD_BYTES)
    return digests(carry_out(plan, resume=True, **options).output)


def interrupt(source: Path, output: Path, recipe: str = "q4") -> None:
    """Interrupt a conversion, as Ctrl-C does, in the second to last shard."""

    def stop(stage: str, done: int, total: int) -> None:
        if done > limit:
            raise KeyboardInterrupt

    plan = prepare(str(source), output, recipe, shard_bytes=SHARD_BYTES)
    *_, last_but_one, last = plan.shards.values()
    limit = plan.bytes_in - sum(target.weight.nbytes for target in (*last_but_one, *last))
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, progress=stop)


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def finished(output: Path) -> list[Path]:
    """Return the shards of an interrupted conversion that its manifest lists as complete."""
    manifest = partial(output) / "conversion_manifest.json"
    return [partial(output) / name for name in json.loads(manifest.read_text())["shards"]] if manifest.exists() else []


def check_interrupted(source: Path, output: Path, whole: dict[str, str]) -> None:
    """Check the state after an interruption.

    There is no output, the partial folder does not load unless it is complete, and a new conversion is refused.
    """
    assert not output.exists()
    if reported(load, partial(output)) is None:
        found = digests(partial(output))
        assert all(found[name] == whole[name] for name in whole if name.endswith(".safetensors"))
    if not partial(output).exists() or not names_in(partial(output)):
        return
    with pytest.raises(DgemmaError, match="interrupted") as caught:
        convert(str(source), output)
    assert "--resume" in user_error(caught.value) and "--force" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "left"),
    [("progress", 15), ("files", 3), ("files", 24), ("publish", 1)],
)
def test_killed_and_resumed(tmp_path: Path, source: Path, whole: dict[str, str], kind: str, left: int) -> None:
    output = tmp_path / "out"
    assert run(source, output, kind, left) == KILLED
    check_interrupted(source, output, whole)
    kept = {path.name: path.stat().st_mtime_ns for path in finished(output)}
    assert resume(source, output) == whole
    assert names_in(tmp_path) == {"source", "out"}
    assert all((output / name).stat().st_mtime_ns == when for name, when in kept.items())  # not written again


def test_killed_at_any_time(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    rng = np.random.default_rng()
    output = tmp_path / "out"
    with driver(source, output, "slowly") as process:
        time.sleep(rng.uniform(0.01, 0.4))
        process.kill()
        assert process.wait(timeout=60) in (0, KILLED)
    if not output.exists():  # otherwise the kill came after the last rename
        assert process.returncode == KILLED
        check_interrupted(source, output, whole)
        assert resume(source, output) == whole
    assert digests(output) == whole


def test_killed_again_and_again(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    output = tmp_path / "out"
    for left in range(10, 200, 18):
        if run(source, output, "files", left, resume=True) == 0:
            break
        check_interrupted(source, output, whole)
    assert left > 30
    assert digests(output) == whole
    assert names_in(tmp_path) == {"source", "out"}


def test_stopped_before_operations_on_files(tmp_path: Path, source: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY_STEPS, str(source), str(tmp_path / "steps"), "150000"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "steps").iterdir())
    assert len(folders) > 8
    whole = digests(tmp_path / "steps" / done.stdout.strip() / "out")
    assert all(digests(folder / "out") == whole and names_in(folder) == {"out"} for folder in folders)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_shards_are_written_again(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    output = tmp_path / "out"
    interrupt(source, output)
    shards = finished(output)
    assert len(shards) >= 3
    flip(shards[0])
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].unlink()
    assert resume(source, output) == whole


def test_resuming_something_else_is_refused(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    output = tmp_path / "out"
    interrupt(source, output)
    before = digests(partial(output))
    file = source / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns

    def refused(**options: object) -> None:
        plan = prepare(str(source), output, **{"shard_bytes": SHARD_BYTES, **options})  # type: ignore[arg-type]
        with pytest.raises(DgemmaError, match="another source, recipe or version") as caught:
            carry_out(plan, resume=True)
        assert "--force" in user_error(caught.value)
        assert digests(partial(output)) == before

    refused(recipe="q8")
    refused(group_size=32)
    refused(shard_bytes=50_000)
    os.utime(file, ns=(times[0], times[1] + 10**9))
    refused()
    os.utime(file, ns=times)
    assert resume(source, output) == whole


def test_force_starts_over(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    output = tmp_path / "out"
    interrupt(source, output, "bf16")
    (partial(output) / "stray").write_text("x")
    plan = prepare(str(source), output, shard_bytes=SHARD_BYTES)
    assert digests(carry_out(plan, force=True).output) == whole
    assert names_in(tmp_path) == {"source", "out"}


@pytest.mark.parametrize(("kind", "left"), [("files", 15), ("publish", 2), ("exchange", 1)])
def test_old_output_stays_until_the_new_one_is_whole(
    tmp_path: Path, source: Path, whole: dict[str, str], kind: str, left: int
) -> None:
    output = tmp_path / "out"
    old = digests(convert(str(source), output, "bf16").output)
    assert run(source, output, kind, left, force=True) == KILLED
    if (kind, left) == ("publish", 2):
        assert not output.exists()  # between two renames
    elif kind == "exchange":
        assert digests(output) == whole
    else:
        assert digests(output) == old
    kept = {path.name: path.stat().st_mtime_ns for path in finished(output)}
    assert resume(source, output, force=True) == whole
    assert names_in(tmp_path) == {"source", "out"}
    assert all((output / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_nothing_to_resume_is_a_fresh_start(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    assert resume(source, tmp_path / "out") == whole


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}], ids=str)
def test_two_at_once(tmp_path: Path, source: Path, whole: dict[str, str], options: dict[str, bool]) -> None:
    output = tmp_path / "out"
    second = prepare(str(source), output, shard_bytes=SHARD_BYTES)
    errors: list[DgemmaError | None] = []

    def meanwhile(stage: str, done: int, total: int) -> None:
        errors.append(reported(lambda: carry_out(second, **options)))

    carry_out(prepare(str(source), output, shard_bytes=SHARD_BYTES), progress=meanwhile)
    assert errors
    assert all(error is not None and "another process" in user_error(error) for error in errors)
    assert digests(output) == whole
