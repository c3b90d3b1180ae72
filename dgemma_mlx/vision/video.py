"""Reading of videos: some frames, spread evenly, as pictures. Sound is not read.

Reference: transformers ``Gemma4VideoProcessor``, for the frames that are chosen and their budget. Needs PyAV and
Pillow, which are optional dependencies.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.errors import DgemmaError, how_to_install
from dgemma_mlx.vision.pixels import Picture, regular_file, require_pillow, resized_picture

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MOST_FRAMES = 32
BUDGET = 70  # soft tokens of a frame
# FFmpeg's names of formats that hold a video themselves. Others name further files or addresses to read, as playlists
# do, or take any text for a picture.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
_INDEXED = ("mov", "matroska")
_OPTIONS = {"format_whitelist": _FORMATS}
_FETCH_AGAIN = "Fetch the file again."
_OTHER_FILE = "Videos may be MP4, MOV, MKV, WebM or AVI files, among others."


def read_frames(source: str | Path | bytes, config: VisionConfig, name: str) -> list[tuple[float, Picture]]:
    """Read up to ``MOST_FRAMES`` frames of a video, spread evenly, with a budget of ``BUDGET`` soft tokens each.

    Args:
        source: The path of a file, or a file's content.
        config: Configuration of the vision tower.
        name: What messages call the video; each begins with it.

    Returns:
        For each frame, first to last, the seconds since the first one and the picture.

    Raises:
        DgemmaError: PyAV or Pillow is missing, or the source is not a video that can be read.
    """
    require_pyav()
    import av

    config.require_supported()
    with regular_file(source, name, _OTHER_FILE) as file, _errors(name):
        with av.open(file, options=_OPTIONS, metadata_errors="replace") as container:
            times, keys = _packets(container, name)
        count = min(MOST_FRAMES, len(times))
        targets = [times[i * len(times) // count] for i in range(count)]
        file.seek(0)
        with av.open(file, options=_OPTIONS, metadata_errors="replace") as container:
            found = [
                (seconds, _picture(frame, config, name, seconds))
                for seconds, frame in _frames_at(targets, keys, container)
            ]
        if len(found) < count:
            raise DgemmaError(f"{name} is damaged or cut off: frames are missing", _FETCH_AGAIN, exit_code=2)
        return found


def require_pyav() -> None:
    """Raise ``DgemmaError`` (exit code 2) when PyAV or Pillow is not installed."""
    require_pillow()
    try:
        import av  # noqa: F401
    except ImportError:
        hint = f"Run {how_to_install('av pillow')}."
        raise DgemmaError("reading videos needs PyAV", hint, exit_code=2) from None


def _packets(container: InputContainer, name: str) -> tuple[list[int], list[int]]:
    """Return the times of all frames of a video and those of its key frames, ascending, without decoding a frame.

    Raises ``DgemmaError`` for a video that is cut off, has no frames, or whose frames exceed Pillow's limit of pixels.
    """
    from PIL import Image

    if not container.streams.video:
        raise DgemmaError(f"{name} has no video, only sound or data", _OTHER_FILE, exit_code=2)
    stream, most = container.streams.video[0], Image.MAX_IMAGE_PIXELS
    if stream.codec_context is None:  # although PyAV's types say that it never is
        raise DgemmaError(f"{name} has a video that PyAV does not decode", "Convert it to H.264.", exit_code=2)
    if most is not None and stream.codec_context.width * stream.codec_context.height > most:
        raise DgemmaError(f"{name} has frames of more than {most:,} pixels", "Make the video smaller.", exit_code=2)
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None and packet.size:
            times.append(time)
            keys += [time] if packet.is_keyframe else []
    if not times:
        raise DgemmaError(f"{name} has no frames", _OTHER_FILE, exit_code=2)
    lost = f"it has {len(times):,} of {stream.frames:,} frames" if len(times) < stream.frames else None
    end, whole = float(max(times) * (stream.time_base or 0)), _stated_seconds(stream)
    if whole - end > max(0.5, 0.05 * whole):  # the last frame may be shown for some time
        lost = f"it has {end:.1f} of {whole:.1f} seconds"
    if lost:
        raise DgemmaError(f"{name} is cut off: {lost}", _FETCH_AGAIN, exit_code=2)
    return sorted(times), sorted(keys)


def _stated_seconds(stream: VideoStream) -> float:
    """Return the length that a Matroska file states for a stream, in seconds; 0 where none is stated.

    These files do not count their frames.
    """
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0


def _frames_at(targets: list[int], keys: list[int], container: InputContainer) -> Iterator[tuple[float, VideoFrame]]:
    """Yield the frame at each of the times ``targets``, ascending, after its seconds since the first.

    In a format with an index, decoding jumps to the last key frame before a target.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    jumps = container.format.name.startswith(_INDEXED)
    decoded, last = container.decode(stream), keys[:1]
    start: float | None = None
    for target in targets:
        key = keys[max(0, bisect_right(keys, target) - 1) :][:1]
        if jumps and key != last:
            container.seek(key[0], stream=stream)
            decoded, last = container.decode(stream), key
        for frame in decoded:
            if frame.pts is not None and frame.time is not None and frame.pts >= target:
                start = frame.time if start is None else start
                yield frame.time - start, frame
                break


def _picture(frame: VideoFrame, config: VisionConfig, name: str, seconds: float) -> Picture:
    """Return a frame, upright, as a picture."""
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    minutes, rest = divmod(int(seconds), 60)
    return resized_picture(image, config, BUDGET, f"{name} at {minutes:02}:{rest:02}")


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn what PyAV raises in the block into a ``DgemmaError`` that begins with ``name``."""
    try:
        yield
    except DgemmaError:
        raise
    except Exception:  # readers of damaged files raise nearly anything
        raise DgemmaError(
            f"{name} is not a video that PyAV reads, or it is damaged or cut off", _OTHER_FILE, exit_code=2
        ) from None
