"""Processes killed before any operation on files: the target is the old or the new one, whole, and the next run works.

Conversions have tests of their own, in ``tests/convert/test_crash.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx import load
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.model.adapter import AdapterConfig, adapted_modules, attach
from dgemma_mlx.model.adapter_file import save_adapter
from dgemma_mlx.train.fuse import fuse
from tests.generation.test_prompt_cache_file import encoded
from tests.hub_server import HubServer, Repository
from tests.model.checkpoint import flat_config, random_tensors, write_checkpoint
from tests.model.checkpoint import load as load_network
from tests.train.test_finetune import CONFIG, CONVERSATIONS, finetune, prepare
from tests.train.test_finetune import FinetuneRun as Run

# Arguments: a folder, a number, and Python code that works on the folder ``here``. The process kills itself before the
# operation of that number that changes files in the folder; 0 kills never.
DRIVER = """
import os, signal, sys
from pathlib import Path

here, left, code = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def watch(event, arguments):
    global left
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and str(here) in "".join(map(str, arguments)):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

ready = compile(code, "code", "exec")
sys.addaudithook(watch)
exec(ready)
"""
FUSE = """
from dgemma_mlx.train.fuse import fuse
fuse(str(here.parent / "base"), here.parent / "adapter2", here / "out", force=True)
"""
TRAIN = """
from tests.test_killed import train
train(here / "out", full={full})
"""
SAVE = """
from dgemma_mlx.cli.log.session import Session
Session.load(here.parent / "new.json").save(here / "out")
"""
CACHE = """
from dgemma_mlx import PromptCache, load
model = load("demo")
PromptCache.load(here.parent / "new.cache", model).save(here / "out", model)
"""
WRITE = """
from dgemma_mlx.cli.texts import save_text
save_text(here / "out", "new" * 9999, "old" * 9999)
"""
PULL = """
from dgemma_mlx.checkpoint.hub import resolve
print(resolve("owner/model").folder)
"""
# As PULL, but a file's name must not disappear for a moment, because another process may be reading it.
WATCHED_PULL = """
def watch_names(event, arguments):
    if event == "os.remove" and "/snapshots/" in str(arguments[0]):
        raise AssertionError(f"{arguments[0]} was removed")

sys.addaudithook(watch_names)
""" + PULL


def start(here: Path, code: str, left: int = 0, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(here), str(left), code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> bool:
    """Wait for a process, and return whether it was killed."""
    with process:
        error = process.communicate(timeout=120)[1]
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode != 0


def contents(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of all files of a folder that are not those of a training run, by name."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(path)): sha256(file.read_bytes()).hexdigest() for file in files
        if not {"checkpoint", "checkpoint.new", "checkpoint.old", "unfinished"} & set(file.relative_to(path).parts)
        and file.name not in ("loss.jsonl", "run.json") and not file.name.startswith(".")
    }  # fmt: skip


def killed_before(
    here: Path, code: str, number: int, old: Path, new: dict[str, str], again: Callable[[], object] | None = None,
    partly: Callable[[dict[str, str]], bool] = lambda found: False,
) -> bool:
    """Kill the code before an operation, check the target, run ``again``, and return whether the kill came in time.

    ``partly`` says whether the target may look like this until the next run.
    """
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    target = here / "out"
    (shutil.copytree if old.is_dir() else shutil.copy2)(old, target)
    killed = end(start(here, code, number))
    found = contents(target)
    assert found in (contents(old), new) or partly(found), number
    assert killed or found == new
    if again is None:
        end(start(here, code))
    else:
        again()
    assert contents(target) == new
    return killed


def all_or(some: list[int]) -> list[object]:
    """Return numbers for ``make test``, and 0 for ``make soak``, which stands for all numbers that there are."""
    return [*some, pytest.param(0, marks=pytest.mark.slow)]


def matrix(number: int, killed: Callable[[int], bool]) -> None:
    """Kill before the operation of a number, or before each one in turn."""
    if number:
        killed(number)
        return
    last = next(n for n in range(1, 500) if not killed(n))
    assert last > 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of three shards, two adapters, and what the base becomes with each of them."""
    folder = tmp_path_factory.mktemp("models")
    base = write_checkpoint(folder / "base", flat_config(), random_tensors(flat_config(), mx.float32), shards=3)
    for number in (1, 2):
        model, _ = load_network(base)
        attach(model, AdapterConfig(4, 8.0))
        mx.random.seed(number)
        for module in adapted_modules(model).values():
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
        save_adapter(model, AdapterConfig(4, 8.0), folder / f"adapter{number}", "some/model")
        fuse(str(base), folder / f"adapter{number}", folder / f"fused{number}")
    return folder


@pytest.mark.parametrize("number", all_or([13]))
def test_fuse(models: Path, number: int) -> None:
    here = models / "work"
    new = contents(models / "fused2")
    assert contents(models / "fused1") != new

    def killed(number: int) -> bool:
        found = killed_before(here, FUSE, number, models / "fused1", new)
        assert os.listdir(here) == ["out"]
        return found

    matrix(number, killed)


def train(out: Path, *, full: bool, stop: int = 99) -> None:
    """Train a little in a folder, or continue the training there; Ctrl-C comes after step ``stop``."""
    config = replace(CONFIG, steps=3, batch_size=1, full=full, optimizer="adamw", save_every=1)
    run, seen = Run(prepare(load("demo"), config), config, CONVERSATIONS), [0]
    finetune(run, out, lambda record: seen.append(record["step"]), resume=(out / "run.json").exists(),
             stopped=lambda: seen[-1] >= stop)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["adapter", "full"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A folder with a run that was stopped, ``old``, and one that was not, ``new``."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "old", full=request.param, stop=1)
    train(folder / "new", full=request.param)
    return folder, request.param


@pytest.mark.parametrize("number", all_or([14]))
def test_train(trained: tuple[Path, bool], number: int) -> None:
    folder, full = trained
    new = contents(folder / "new")
    assert contents(folder / "old") != new

    def partly(found: dict[str, str]) -> bool:
        return full and "config.json" not in found  # which does not load

    def killed(number: int) -> bool:
        here = folder / "work"
        return killed_before(here, TRAIN.format(full=full), number, folder / "old", new,
                             lambda: train(here / "out", full=full), partly)  # fmt: skip

    matrix(number, killed)


@pytest.mark.slow
def test_train_from_the_start(tmp_path: Path, trained: tuple[Path, bool]) -> None:
    folder, full = trained
    new, here = contents(folder / "new"), tmp_path / "work"

    def killed(number: int) -> bool:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        found = end(start(here, TRAIN.format(full=full), number))
        train(here / "out", full=full)
        assert contents(here / "out") == new
        return found

    matrix(0, killed)


@pytest.mark.parametrize("number", all_or([2]))
def test_session(tmp_path: Path, number: int) -> None:
    for name in ("old", "new"):
        session = Session(system=name)
        session.add("user", name * 999)
        session.add("assistant", name)
        session.save(tmp_path / f"{name}.json")
    matrix(number, lambda number: killed_before(
        tmp_path / "work", SAVE, number, tmp_path / "old.json", contents(tmp_path / "new.json")
    ))  # fmt: skip


@pytest.mark.parametrize("number", all_or([2]))
def test_prompt_cache(tmp_path: Path, number: int) -> None:
    model = load("demo")
    for name, length in (("old", 40), ("new", 80)):
        encoded(model, length).save(tmp_path / f"{name}.cache", model)
    matrix(number, lambda number: killed_before(
        tmp_path / "work", CACHE, number, tmp_path / "old.cache", contents(tmp_path / "new.cache")
    ))  # fmt: skip


@pytest.mark.parametrize("number", all_or([2]))
def test_write(tmp_path: Path, number: int) -> None:
    write_whole(tmp_path / "old", "old" * 9999)
    write_whole(tmp_path / "new", "new" * 9999)

    def again() -> None:
        if contents(tmp_path / "work" / "out") == contents(tmp_path / "old"):
            end(start(tmp_path / "work", WRITE))

    new = contents(tmp_path / "new")
    matrix(number, lambda n: killed_before(tmp_path / "work", WRITE, n, tmp_path / "old", new, again))


@pytest.fixture
def hub(models: Path) -> Iterator[HubServer]:
    files = {path.name: path.read_bytes() for path in (models / "base").iterdir()}
    files["tokenizer.json"] = b"{}"
    with HubServer({"owner/model": Repository({"main": files})}) as server:
        yield server


def pulled(here: Path, hub: HubServer, number: int = 0, code: str = PULL) -> subprocess.Popen[str]:
    return start(here, code, number, HF_ENDPOINT=hub.url, HF_HOME=str(here), HF_HUB_OFFLINE="0",
                 HF_HUB_DISABLE_XET="1")  # fmt: skip


def check_pulled(here: Path, hub: HubServer) -> None:
    with pulled(here, hub) as process:
        printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    folder = Path(printed.strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.repositories["owner/model"].files("main")


@pytest.mark.parametrize("number", all_or([12]))
def test_pull(tmp_path: Path, hub: HubServer, number: int) -> None:
    def killed(number: int) -> bool:
        here = tmp_path / str(number)
        here.mkdir()
        found = end(pulled(here, hub, number))
        check_pulled(here, hub)
        return found

    matrix(number, killed)


def test_two_pulls_at_once(tmp_path: Path, hub: HubServer) -> None:
    pulls = [pulled(tmp_path, hub, code=WATCHED_PULL) for _ in range(2)]
    assert [end(pull) for pull in pulls] == [False, False]
    check_pulled(tmp_path, hub)


def test_two_merges_and_two_trainings_at_once(models: Path, tmp_path: Path) -> None:
    arguments = str(models / "base"), models / "adapter1", tmp_path / "fused"
    refused = []

    def second(*_: object) -> None:
        with pytest.raises(DgemmaError, match="another process is writing"):
            fuse(*arguments)
        refused.append("fuse")

    fuse(*arguments, progress=second)
    assert contents(tmp_path / "fused") == contents(models / "fused1") and len(refused) == 3
    config = replace(CONFIG, steps=1)
    run = Run(prepare(load("demo"), config), config, CONVERSATIONS)

    def third(record: object) -> None:
        with pytest.raises(DgemmaError, match="another process is writing"):
            finetune(run, tmp_path / "run", third, resume=True)
        refused.append("train")

    finetune(run, tmp_path / "run", third)
    assert "train" in refused


@pytest.mark.slow
def test_killed_at_any_time(models: Path, trained: tuple[Path, bool]) -> None:
    """The weights are written by MLX, whose operations Python does not see."""
    rng = np.random.default_rng(15)
    folder, full = trained
    for round in range(8):
        here = models / f"any{round}-{full}"
        here.mkdir()
        shutil.copytree(models / "fused1", here / "out")
        shutil.copytree(folder / "old", here / "run")
        processes = start(here, FUSE), start(here, TRAIN.format(full=full).replace('"out"', '"run"'))
        for process in processes:
            time.sleep(rng.uniform(0.2, 1.5))
            process.kill()
            end(process)
        assert contents(here / "out") in (contents(models / "fused1"), contents(models / "fused2"))
        train(here / "run", full=full)
        assert contents(here / "run") == contents(folder / "new")
        assert not end(start(here, FUSE))
        assert contents(here / "out") == contents(models / "fused2")
