"""``fill``, ``edit`` and ``choose`` as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from tests.cli.terminal import Terminal

PROGRAM = (sys.executable, "-m", "dgemma_mlx")
RECORD = "Make a JSON object: Simon is 59 years old and lives in Rome."
GAPS = '{"name": "Simon", "age": ___:2___, "city": "Rome"}\r\nend'
FILLED = '{"name": "Simon", "age": 59, "city": "Rome"}\r\nend'
FILL = ("fill", "-m", "demo", "--seed", "1", "--prompt", RECORD, "--candidates", "2")
EDIT = ("edit", "-m", "demo", "--seed", "1", "--candidates", "1", RECORD)


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *arguments], input=stdin, capture_output=True, timeout=120, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.json"
    path.write_bytes(GAPS.encode())
    return path


def test_a_pipe_gets_the_text_exactly(file: Path) -> None:
    done = run(*FILL, "-q", stdin=GAPS.encode())
    assert (done.returncode, done.stdout, done.stderr) == (0, FILLED.encode(), b"")
    assert run(*FILL, str(file)).stdout == FILLED.encode()


def test_json_has_every_candidate(file: Path) -> None:
    done = run(*FILL, "--json", "--show-all", str(file))
    found = json.loads(done.stdout)
    assert found["text"] == FILLED
    assert found["model"] == "demo"
    assert found["candidates"][0]["texts"] == ["59"]
    assert done.stderr.decode().count(" tokens") == len(found["candidates"])


def test_a_diff_is_one_that_patch_takes(file: Path, tmp_path: Path) -> None:
    done = run(*FILL, "--diff", "-q", str(file))
    lines = done.stdout.decode().splitlines()
    assert lines[2:5:2] == ["@@ -1,2 +1,2 @@", f"+{FILLED.splitlines()[0]}"]
    if shutil.which("patch"):
        copy = tmp_path / "copy"
        shutil.copy(file, copy)
        patched = subprocess.run(["patch", "--binary", str(copy)], input=done.stdout, capture_output=True, check=False)
        assert patched.returncode == 0, patched
        assert copy.read_bytes() == FILLED.encode()


def test_write_replaces_the_file_and_keeps_its_mode(file: Path) -> None:
    file.chmod(0o640)
    link = file.with_name("link")
    link.symlink_to(file)
    done = run(*FILL, "--write", str(link))
    assert (done.returncode, done.stdout) == (0, b"")
    assert file.read_bytes() == FILLED.encode()
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, "link"]


def test_a_gap_at_a_cursor_and_between_two_files(tmp_path: Path) -> None:
    text = tmp_path / "x"
    text.write_text('{"name": "Simon",\n"age": , "city": "Rome"}')
    done = run(*FILL, "-q", "--at", "2:8", "--size", "2", str(text))
    assert done.stdout == b'{"name": "Simon",\n"age": 59, "city": "Rome"}'
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text('{"name": "Simon", "age": ')
    after.write_text(', "city": "Rome"}')
    done = run(*FILL, "-q", "--size", "2", "--prefix-file", str(before), "--suffix-file", str(after))
    assert done.stdout == b'{"name": "Simon", "age": 59, "city": "Rome"}'


def test_edit_shows_a_diff_and_writes_when_asked(file: Path) -> None:
    text = FILLED.replace("59", "58")
    file.write_bytes(text.encode())
    done = run(*EDIT, "-q", "--match", "58", "--strength", "1", str(file))
    assert done.returncode == 0
    assert file.read_bytes() == text.encode()
    piped = run(*EDIT, "-q", "--match", "58", "--strength", "1", stdin=text.encode())
    assert piped.stdout.startswith(b'{"name": "Simon", "age": ')
    assert piped.stdout.endswith(b', "city": "Rome"}\r\nend')
    assert run(*EDIT, "-q", "--match", "58", "--strength", "1", "--write", str(file)).returncode == 0
    assert file.read_bytes() == piped.stdout


def nan_model(folder: Path) -> Path:
    """Return a copy of the demo model whose final norm is not a number."""
    shutil.copytree(DEMO_FOLDER, folder)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = next(name for name in tensors if name.endswith("decoder.norm.weight"))
    tensors[name] = mx.full(tensors[name].shape, float("nan"), tensors[name].dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    return folder


@pytest.mark.parametrize("command", ["fill", "edit", "edit a part"])
def test_a_model_of_nan_writes_nothing(file: Path, tmp_path: Path, command: str) -> None:
    model = str(nan_model(tmp_path / "nan"))
    arguments = {
        "fill": ["fill"], "edit": ["edit", RECORD], "edit a part": ["edit", RECORD, "--lines", "1"],
    }[command]  # fmt: skip
    done = run(*arguments, "--candidates", "1", "-q", "-m", model, "--seed", "1", "--write", str(file))
    assert (done.returncode, done.stdout) == (1, b"") and b"Traceback" not in done.stderr
    assert file.read_bytes() == GAPS.encode()


def test_an_uncertain_result_is_not_written(file: Path) -> None:
    file.write_text("Once ___ upon ___.\n")
    arguments = ("fill", "-m", "demo", "--seed", "1", "--candidates", "2", "--max-denoising-steps", "1", "-q")
    done = run(*arguments, "--write", str(file))
    first, hint = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (1, b"") and "uncertain" in first and "was not changed" in first
    assert file.read_text() == "Once ___ upon ___.\n" and "--seed 1" in hint
    shown = run(*arguments, "--json", str(file))
    assert shown.returncode == 0 and "uncertain" in json.loads(shown.stdout)["doubt"]


def test_a_file_that_cannot_be_replaced_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)  # the temporary file beside it would have a longer name than file systems allow
    path.write_text("a ___ b")
    done = run("fill", "-m", str(tmp_path / "no model"), "--write", str(path))
    assert done.returncode == 2
    assert b"--write cannot replace" in done.stderr and b"File name too long" in done.stderr
    assert path.read_text() == "a ___ b"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path(os.devnull)):
        done = run("fill", "-m", "demo", "--write", str(path))
        assert done.returncode == 2 and b"--write cannot replace" in done.stderr


def test_of_two_edits_at_once_one_is_saved(tmp_path: Path) -> None:
    """Many processes that replace the same old text: one of them does, and the others say so."""
    file = tmp_path / "file"
    file.write_text("old")
    code = (
        "import sys\nfrom pathlib import Path\nfrom dgemma_mlx.cli.texts import save_text\nsys.stdin.read()\n"
        "save_text(Path(sys.argv[1]), sys.argv[2], 'old')\nprint(sys.argv[2])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(file), str(number)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for number in range(6)
    ]  # fmt: skip
    for process in processes:  # all of them have started by now, or will soon
        assert process.stdin is not None
        process.stdin.close()
    saved = []
    for process in processes:
        assert process.stdout is not None
        with process.stdout:
            saved.append(process.stdout.read().strip())
    assert [process.wait(60) for process in processes].count(0) == 1
    assert [text for text in saved if text] == [file.read_text()]


def test_choose_prints_probabilities() -> None:
    done = run("choose", "-m", "demo", "-q", "--seed", "1", "What is 27 + 45?", "--from", '71, 72,"a, b"')
    lines = [line.split("  ") for line in done.stdout.decode().splitlines()]
    assert lines[0][1] == "72"
    assert {text for _, text in lines} == {"71", "72", "a, b"}
    assert sum(float(probability) for probability, _ in lines) == pytest.approx(1, abs=0.001)
    done = run("choose", "-m", "demo", "--json", "--from", "71,72", stdin=b"What is 27 + 45?")
    assert [choice["text"] for choice in json.loads(done.stdout)["choices"]] == ["72", "71"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["fill", "no such file"], b"", "cannot read no such file"),
        (["fill"], b"\xff___", "not UTF-8"),
        (["fill"], b"no gap", "no gap"),
        (["fill", "--write"], b"___", "--write needs a FILE"),
        (["fill", "--at", "3:1"], b"a\nb", "there is no line 3: the text has 2 lines"),
        (["fill", "--at", "4:1"], b"a\nb\n", "there is no line 4: the text has 2 lines"),
        (["fill", "--at", "2:1", "FILE"], b"", "there is no line 2: the file has 1 line"),
        (["fill", "--at", "1:3"], b"a\nb", "there is no column 3: line 1 has 1 character"),
        (["fill", "--at", "x"], b"a", "LINE:COL"),
        (["fill", "--size", "3"], b"___", "--size"),
        (["fill", "--diff", "--json"], b"___", "exclude"),
        (["fill", "--prefix-file", "a", "b"], b"", "cannot be combined with FILE"),
        (["fill", "-m", "demo"], b"___ " + b"word " * 60 + b"___", "a canvas holds only 32"),
        (["edit", "x", "--lines", "3-a"], b"a", "A-B"),
        (["edit", "x", "-m", "demo", "--lines", "3"], b"a", "there are no lines 3 to 3: the text has 1 line"),
        (["edit", "x", "-m", "demo"], b"", "empty"),
        (["edit", "x", "-m", "demo"], b"word " * 60, "a canvas holds only 31"),
        (["choose", "x", "-m", "demo", "--from", "a"], b"", "at least two different answers"),
        (["choose", "--from", "a,b"], b"", "prompt is empty"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], stdin: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("a")
    done = run(*(str(tmp_path / "file.txt") if text == "FILE" else text for text in arguments), stdin=stdin)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr


def test_ctrl_c_writes_nothing(file: Path) -> None:
    arguments = [*PROGRAM, *FILL, "--candidates", "8", "--max-denoising-steps", "48", "--write", str(file)]
    file.write_text("___ ___ ___ ___")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    if process.returncode != 0:  # otherwise it finished before the signal
        assert process.returncode in (130, -signal.SIGINT)
        assert file.read_text() == "___ ___ ___ ___"
        assert b"Traceback" not in error


@pytest.mark.parametrize("option", ["--show-all", "--diff"])
def test_a_terminal_shows_the_result_and_keeps_nothing_of_the_progress(file: Path, option: str) -> None:
    with Terminal([*FILL, option, str(file)], 100, 24) as terminal:
        assert terminal.finish() == 0
    shown = FILLED.replace("\r", "\u240d").splitlines()  # a carriage return would control the terminal
    assert [line for line in shown if line in terminal.text] == shown
    assert b"canvases, step 1" in terminal.output
    assert "canvases, step" not in terminal.text
    assert b"\x1b[?" not in terminal.output
    assert terminal.screen.is_sane
