"""Tests of the choice between kernel and reference, of the self-check, and of the stored verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.kernels import dispatch
from dgemma_mlx.kernels.dispatch import DispatchedOperation, references, set_mode
from dgemma_mlx.kernels.operation import close
from dgemma_mlx.kernels.selfcheck import Store, Verdict, examine

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def twice(x: mx.array) -> mx.array:
    return x * 2


def example(dtype: mx.Dtype) -> tuple[mx.array]:
    return (mx.random.normal((8, 16), key=mx.random.key(0)).astype(dtype),)


def operation(kernel: Callable[[mx.array], Any], source: str = "y = 2 * x;") -> DispatchedOperation[..., Any]:
    return DispatchedOperation("double", kernel, twice, examples=[example], source=source)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of verdicts on a machine that seems to have a GPU."""
    store = Store(tmp_path / "cache" / "kernels.json")
    monkeypatch.setattr(dispatch, "has_metal", lambda: True)
    monkeypatch.setattr(dispatch, "_store", lambda: store)
    monkeypatch.setattr(dispatch._State, "mode", "auto")
    return store


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_within_rounding_is_timed(dtype: mx.Dtype) -> None:
    def rounds_otherwise(x: mx.array) -> mx.array:
        return (x.astype(mx.float32) * (2 * (1 + 1e-6))).astype(x.dtype)

    verdict = examine(operation(rounds_otherwise), dtype)
    assert verdict.status in ("faster", "slower")
    assert verdict.kernel > 0 and verdict.reference > 0
    assert (verdict.status == "faster") == (verdict.kernel < verdict.reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kernel",
    [
        lambda x: x * 2.2,
        lambda x: mx.where(mx.arange(16) == 15, mx.nan, x * 2).astype(x.dtype),
        lambda x: mx.where(mx.arange(16) == 15, mx.inf, x * 2).astype(x.dtype),
        lambda x: (x * 2)[1:],
        lambda x: (x * 2).astype(mx.int32),
    ],
    ids=["value", "nan", "inf", "shape", "dtype"],
)
def test_a_wrong_kernel_is_detected(kernel: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> None:
    assert examine(operation(kernel), dtype).status == "wrong"


def test_every_variant_of_a_kernel_is_checked() -> None:
    wrong_from_ten_rows_on = DispatchedOperation(
        "double", lambda x: x * 2 if len(x) < 10 else x * 3, twice, examples=[example, lambda _: (mx.ones((10, 3)),)],
        source="",
    )  # fmt: skip
    assert examine(wrong_from_ten_rows_on, mx.float32).status == "wrong"


def test_a_kernel_that_does_not_compile_is_detected() -> None:
    without_metal = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["y"], source="no C++ at all")

    def kernel(x: mx.array) -> mx.array:
        return without_metal(
            inputs=[x], grid=(x.size, 1, 1), threadgroup=(32, 1, 1), output_shapes=[x.shape], output_dtypes=[x.dtype]
        )[0]

    verdict = examine(operation(kernel), mx.float32)
    assert verdict.status == "failed"
    assert "metal" in verdict.detail.lower()


def test_integers_must_be_equal() -> None:
    ids = mx.arange(100_000, 100_010)
    assert close((ids, ids), (ids, ids))
    assert not close((ids, ids), (ids, ids + (mx.arange(10) == 3)))


def test_a_broken_kernel_is_replaced_with_one_warning(store: Store) -> None:
    def broken(x: mx.array) -> mx.array:
        raise RuntimeError("error: use of undeclared identifier 'y'\nmore lines")

    double = operation(broken)
    with pytest.warns(RuntimeWarning, match="double.*undeclared identifier 'y'") as warned:
        first = double(mx.array([1.0, 2.0]))
    assert len(warned) == 1
    assert first.tolist() == double(mx.array([1.0, 2.0])).tolist() == [2.0, 4.0]
    # The next start reads the stored verdict.
    assert operation(broken)(mx.array([3.0])).tolist() == [6.0]


@pytest.mark.parametrize(("status", "runs"), [("faster", True), ("slower", False), ("wrong", False), ("failed", False)])
def test_only_a_faster_kernel_runs(store: Store, status: Any, runs: bool) -> None:
    calls = []

    def counted(x: mx.array) -> mx.array:
        calls.append(x.dtype)
        return x * 2

    double = operation(counted)
    store.put(store.key(double, mx.float16), Verdict(status))
    assert double(mx.array([1.5], mx.float16)).item() == 3.0
    assert bool(calls) is runs


def test_verdicts_are_stored_per_source_and_dtype(store: Store) -> None:
    double = operation(twice)
    store.put(store.key(double, mx.float16), Verdict("slower", "", 2.0, 1.0))
    assert store.get(store.key(operation(twice), mx.float16)) == Verdict("slower", "", 2.0, 1.0)
    assert store.get(store.key(double, mx.bfloat16)) is None
    assert store.get(store.key(operation(twice, source="y = x + x;"), mx.float16)) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"KEY": 1}', '{"KEY": {}}', '{"KEY": {"status": "splendid"}}',
     '{"KEY": {"status": "faster", "kernel": "x"}}', '{"KEY": {"status": "faster", "more": 1}}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_empty(store: Store, text: str) -> None:
    key = store.key(operation(twice), mx.float32)
    store._path.parent.mkdir(parents=True)
    store._path.write_text(text.replace("KEY", key))
    assert store.get(key) is None
    store.put(key, Verdict("slower"))
    assert store.get(key) == Verdict("slower")


def test_a_folder_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "kernels.json")
    store.put("key", Verdict("faster"))
    assert store.get("key") is None


# A process with a slow kernel. It prints "begun" in the self-check, which ends when stdin does, and then the verdict.
PROGRAM = """
import sys
from pathlib import Path
import mlx.core as mx
from dgemma_mlx.cli.interrupt import end_in_order
from dgemma_mlx.kernels import dispatch
from dgemma_mlx.kernels.selfcheck import Store

def twice(x):
    return x * 2

def slow(x):
    print("begun", flush=True)
    sys.stdin.read()
    return x * 2

dispatch.has_metal = lambda: True
store = Store(Path(sys.argv[1]))
dispatch._store = lambda: store
end_in_order()  # as the command line does
double = dispatch.DispatchedOperation(
    "double", slow, twice, examples=[lambda dtype: (mx.ones(4, dtype),)], source="y = 2 * x;"
)
verdict = double.verdict(mx.float32)
print(verdict.status, verdict.detail)
"""


def _default_signals() -> None:
    """Undo what a background job or nohup has set: a process inherits that it ignores a signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def checking(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that is in the self-check of ``operation``'s kernel."""
    command = [sys.executable, "-c", PROGRAM, str(store._path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DGEMMA_KERNELS": "auto"}, preexec_fn=_default_signals,  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_check_is_repeated_by_the_next_process(store: Store, number: signal.Signals) -> None:
    with checking(store) as process:
        assert store.get(store.key(operation(twice), mx.float32)) == Verdict("checking")
        process.send_signal(number)
        assert process.wait(30) in (-number, 128 + number)
        assert json.loads(store._path.read_text()) == {}
    with checking(store) as process:
        output, _ = process.communicate(timeout=30)
        assert output.splitlines()[-1].split()[0] in ("faster", "slower")


def test_an_interrupted_check_keeps_other_verdicts(store: Store) -> None:
    def interrupted(x: mx.array) -> mx.array:
        raise KeyboardInterrupt

    store.put("another", Verdict("slower"))
    double = operation(interrupted)
    with pytest.raises(KeyboardInterrupt):
        double(mx.array([1.0]))
    assert list(json.loads(store._path.read_text())) == ["another"]
    with pytest.raises(KeyboardInterrupt):  # this process, too, checks again
        double(mx.array([1.0]))


def test_a_kernel_that_killed_the_program_is_not_tried_again(store: Store) -> None:
    with checking(store) as process:
        process.kill()
        process.wait(30)
    double = operation(twice)
    with pytest.warns(RuntimeWarning, match="double.*crashed during the self-check"):
        assert double.verdict(mx.float32).status == "failed"
    assert double(mx.array([1.0])).item() == 2.0
    assert operation(twice).verdict(mx.float32).status == "failed"  # without another warning

    dispatch.forget_verdicts()
    assert operation(twice).verdict(mx.float32).status in ("faster", "slower")


def test_an_entry_of_an_earlier_version_is_checked_again(store: Store) -> None:
    """It holds a process id, which another program may have by now."""
    double = operation(twice)
    store._write({store.key(double, mx.float32): {"status": "checking", "pid": os.getppid()}})
    assert double.verdict(mx.float32).status in ("faster", "slower")


def test_a_check_in_another_process_is_not_waited_for(store: Store) -> None:
    def unexpected(x: mx.array) -> mx.array:
        raise AssertionError

    double, other = operation(unexpected), operation(unexpected, source="y = x + x;")
    with checking(store) as process:
        assert double.verdict(mx.float32).status == "checking"
        assert double(mx.array([1.0])).item() == 2.0
        assert other.verdict(mx.float32).status == "checking"  # two checks at once would disturb the times
        output, _ = process.communicate(timeout=30)
    assert double.verdict(mx.float32).status == output.split()[-1]


def test_a_check_in_another_thread_is_not_waited_for(store: Store) -> None:
    found = []

    def kernel(x: mx.array) -> mx.array:
        if not found:
            thread = Thread(target=lambda: found.append(double.verdict(mx.float32).status))
            thread.start()
            thread.join()
        return x * 2

    double = operation(kernel)
    assert double.verdict(mx.float32).status in ("faster", "slower")
    assert found == ["checking"]


def test_verdicts_are_not_forgotten_where_nothing_can_be_checked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("key", Verdict("failed"))
    set_mode("off")
    with pytest.raises(DgemmaError, match="switched off") as off:
        dispatch.forget_verdicts()
    set_mode("auto")
    monkeypatch.setattr(dispatch, "has_metal", lambda: False)
    with pytest.raises(DgemmaError, match="without Metal") as without:
        dispatch.forget_verdicts()
    assert off.value.exit_code == without.value.exit_code == 2
    assert store.get("key") is not None


@pytest.mark.parametrize("mode", ["off", "reference"])
def test_kernels_can_be_switched_off(store: Store, mode: str) -> None:
    set_mode(mode)
    assert operation(lambda x: x * 0)(mx.array([1.0])).item() == 2.0
    assert not store._path.exists()


def test_kernels_can_be_forced_where_there_is_a_gpu(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode("force")
    assert operation(lambda x: x * 0)(mx.array([1.0])).item() == 0.0
    monkeypatch.setattr(dispatch, "has_metal", lambda: False)
    with pytest.raises(DgemmaError, match="Metal is not available") as caught:
        operation(twice)(mx.array([1.0]))
    assert caught.value.exit_code == 2


def test_training_uses_the_references(store: Store) -> None:
    set_mode("force")
    zero = operation(lambda x: x * 0)
    with references():
        assert zero(mx.array([1.0])).item() == 2.0
        with references(only=False):
            assert zero(mx.array([1.0])).item() == 2.0
    with references(only=False):
        assert zero(mx.array([1.0])).item() == 0.0


@pytest.mark.parametrize("command", [["generate", "-m", "demo", "Sort 2 1"], ["chat", "-m", "demo"]])
def test_the_setting_and_the_option_of_the_commands(command: list[str]) -> None:
    """Without a GPU, forcing kernels is an error, which shows that the setting and the option take effect."""

    def run(*flags: str, mode: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dgemma_mlx", *command, *flags], capture_output=True, check=False, text=True,
            stdin=subprocess.DEVNULL, env={**os.environ, "DGEMMA_KERNELS": mode},
        )  # fmt: skip

    unknown = run(mode="fast")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("dgemma-mlx: DGEMMA_KERNELS must be one of auto, off, reference, force")
    assert run("--no-kernels", mode="force").returncode == 0
    if not dispatch.has_metal() and "generate" in command:
        refused = run(mode="force")
        assert refused.returncode == 2
        assert "Metal is not available" in refused.stderr


@pytest.mark.skipif(mx.metal.is_available(), reason="only without Metal is every kernel broken")
def test_generation_works_if_every_kernel_is_broken(tmp_path: Path) -> None:
    program = """
import sys
from dgemma_mlx.cli.app import run
from dgemma_mlx.kernels import dispatch
dispatch.has_metal = lambda: True
sys.exit(run())
"""

    def generate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "generate", "-q", "-m", "demo", "--seed", "1", "Sort 7 3 5"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip

    first = generate()
    assert (first.returncode, first.stdout) == (0, "3 5 7\n")
    lines = first.stderr.splitlines()
    assert all(line.startswith("dgemma-mlx: the kernel ") and "No Metal" in line for line in lines)
    names = [line.split()[3] for line in lines]
    assert len(names) == len(set(names)) > 5
    again = generate()  # the verdicts are stored
    assert (again.returncode, again.stdout, again.stderr) == (0, "3 5 7\n", "")


def test_the_file_is_readable(store: Store) -> None:
    store.put(store.key(operation(twice), mx.float32), Verdict("wrong", "because"))
    ((key, entry),) = json.loads(store._path.read_text()).items()
    assert key.startswith("mlx 0.") and "double" in key and "float32" in key
    assert entry["detail"] == "because"
