"""Tests of reading videos, which are written here with PyAV."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from dgemma_mlx.checkpoint.vision_config import VisionConfig  # noqa: E402
from dgemma_mlx.errors import DgemmaError  # noqa: E402
from dgemma_mlx.vision.video import BUDGET, read_frames  # noqa: E402
from tests.model.odd_values import one_line  # noqa: E402
from tests.vision.towers import noise, saved  # noqa: E402

CONFIG = VisionConfig()
WIDTH, HEIGHT = 96, 64


def video(frames: int, kind: str = "mp4", codec: str = "mpeg4", rotation: int = 0) -> bytes:
    """Return a video of 5 frames a second, each grey and 4 levels lighter than the last, white above."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25 if kind == "mpegts" else 5)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 12
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 4 * number, np.uint8)
            pixels[:16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def failure(source: str | Path | bytes) -> str:
    with pytest.raises(DgemmaError) as error:
        read_frames(source, CONFIG, "clip.mp4")
    assert one_line(error.value)
    assert error.value.hint
    assert error.value.exit_code == 2
    return error.value.message


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]
)
def test_32_frames_spread_evenly(kind: str, codec: str) -> None:
    frames = read_frames(video(50, kind, codec), CONFIG, "clip.mp4")
    numbers = [i * 50 // 32 for i in range(32)]
    rate = 25 if kind == "mpegts" else 5
    assert [seconds for seconds, _ in frames] == pytest.approx([number / rate for number in numbers])
    levels = [int(picture.pixels[-1, -1, 0]) for _, picture in frames]
    assert np.abs(np.array(levels) - 4 * np.array(numbers)).max() <= 4  # the codecs are lossy
    assert {picture.budget for _, picture in frames} == {BUDGET}
    assert {picture.size for _, picture in frames} == {(WIDTH, HEIGHT)}
    assert frames[-1][1].name == f"clip.mp4 at 00:{int(frames[-1][0]):02}"


def test_a_short_video_is_all_its_frames(tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(video(3))
    frames = read_frames(tmp_path / "clip", CONFIG, "clip.mp4")
    assert [seconds for seconds, _ in frames] == pytest.approx([0, 0.2, 0.4])


def test_frames_are_turned_upright() -> None:
    [(_, picture)] = read_frames(video(1, rotation=-90), CONFIG, "clip.mp4")  # to be turned clockwise
    assert picture.size == (HEIGHT, WIDTH)
    assert picture.pixels[0, -1, 0] > 250 and picture.pixels[0, 0, 0] < 5  # what was above is at the right


def test_what_is_not_a_video_is_refused(tmp_path: Path) -> None:
    unreadable = "clip.mp4 is not a video that PyAV reads, or it is damaged or cut off"
    assert failure(b"no video\n" * 99) == unreadable
    assert failure(saved(noise(50, 50))) == unreadable
    assert failure(b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\n/etc/hostname\n") == unreadable
    assert failure(sound()) == "clip.mp4 has no video, only sound or data"
    assert failure(video(0)) == "clip.mp4 is empty"  # PyAV writes nothing
    assert failure(b"") == "clip.mp4 is empty"
    assert failure(tmp_path) == "clip.mp4 cannot be read: Is a directory"
    assert failure(tmp_path / "none") == "clip.mp4 cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["mp4", "avi", "matroska"])
def test_a_truncated_video_is_refused(kind: str) -> None:
    data = video(50, kind)
    for length in (len(data) * 9 // 10, len(data) // 2, 100):
        assert "cut off" in failure(data[:length])


def test_a_title_that_is_not_utf8_is_no_obstacle() -> None:
    data = video(3, "matroska")
    name = b"Lavf"  # of the writing program, which stands in the file's metadata
    assert name in data
    assert len(read_frames(data.replace(name, b"L\xe4vf"), CONFIG, "clip.mkv")) == 3


def test_a_codec_that_is_not_known_is_refused() -> None:
    data = video(3, "avi").replace(b"FMP4", b"XXXX")
    assert failure(data) == "clip.mp4 has a video that PyAV does not decode"


def test_frames_of_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(2)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 6000)
    assert failure(data) == "clip.mp4 has frames of more than 6,000 pixels"


def test_a_missing_pyav_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DgemmaError) as error:
        read_frames(b"any", CONFIG, "clip.mp4")
    assert error.value.message == "reading videos needs PyAV"
    assert error.value.hint == "Run pip install av pillow, or pipx inject dgemma-mlx av pillow."
