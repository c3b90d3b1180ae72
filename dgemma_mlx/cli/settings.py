"""What the user has settled once: flags over environment over ``config.toml`` over the program's own defaults."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import LARGEST_SEED, is_text
from dgemma_mlx.errors import DgemmaError

APP = "dgemma-mlx"
CONFIG_VARIABLE = "DGEMMA_CONFIG"


@dataclass(frozen=True)
class Kind:
    """A setting: the type it must have, the program's default, what it is for; its range, or the values it may have."""

    type: type
    default: Any
    meaning: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] | None = None


SETTINGS: dict[str, Kind] = {
    "model": Kind(str, None, "folder, Hub id or 'demo'"),
    "max_tokens": Kind(int, 1024, "longest answer, in tokens", least=1),
    "seed": Kind(int, None, "one seed, one text; random without", least=0, most=LARGEST_SEED),
    "system": Kind(str, None, "system prompt"),
    "thinking": Kind(bool, False, "let the model think first"),
    "live": Kind(bool, True, "draw the canvas on a terminal"),
    "temp": Kind(float, None, "a constant temperature; 0 takes the most probable tokens", least=0),
    "max_denoising_steps": Kind(int, None, "steps a canvas may take at most", least=1),
    "entropy_bound": Kind(float, None, "higher accepts more tokens a step", least=0),
    "t_min": Kind(float, None, "temperature towards the last step", least=0),
    "t_max": Kind(float, None, "temperature of the first step", least=0),
    "confidence_threshold": Kind(float, None, "stop when the mean entropy is below", least=0),
    "stability_threshold": Kind(int, None, "stop when unchanged for so many steps", least=0),
    "speed": Kind(str, "balanced", "when a canvas is settled", choices=("reference", "balanced", "fast")),
    "verify": Kind(str, "off", "let the encoder check the answer", choices=("off", "flag", "repair")),
    "memory_limit": Kind(str, None, "at most so much, as 20GB; else the device's"),
    "cpu_dequantize": Kind(str, "auto", "unpack weights where there is no Metal", choices=("auto", "on", "off")),
    "kernels": Kind(str, "auto", "this program's own Metal kernels", choices=("auto", "off", "reference", "force")),
}
"""None as a default leaves the choice to the checkpoint or the program."""


@dataclass(frozen=True)
class Setting:
    """A value in force, and where it is from: a variable's name, a file, or "default"."""

    value: Any
    origin: str


class Settings(Mapping[str, Setting]):
    """Every setting of ``SETTINGS``. ``DgemmaError`` (exit code 2) names a bad value and its place."""

    def __init__(self, environment: Mapping[str, str] | None = None, file: Path | None = None) -> None:
        environment = os.environ if environment is None else environment
        must_exist = file is not None or bool(environment.get(CONFIG_VARIABLE))
        file = file or config_file(environment)
        self._values = {name: Setting(kind.default, "default") for name, kind in SETTINGS.items()}
        for name, value in _read_file(file, must_exist).items():
            if name not in SETTINGS:
                raise DgemmaError(f"{file}: unknown setting {name!r}", f"Settings: {', '.join(SETTINGS)}.", exit_code=2)
            self._values[name] = Setting(checked(name, value, f"{file}: {name}"), str(file))
        for name in SETTINGS:
            variable = f"DGEMMA_{name.upper()}"
            if text := environment.get(variable):
                self._values[name] = Setting(parse(name, text, variable), variable)

    def __getitem__(self, name: str) -> Setting:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def pick(self, name: str, option: Any) -> Any:
        """Return the value of a command-line option, or the setting's value when the option is None."""
        return self._values[name].value if option is None else option

    def pick_checked(self, name: str, option: Any) -> Any:
        """Return the same as ``pick``; raise `DgemmaError` when the option is not a valid value of the setting."""
        return self.pick(name, None if option is None else checked(name, option, f"--{name}"))


def config_file(environment: Mapping[str, str]) -> Path:
    """``config.toml`` in the platform's folder for settings, or the file that ``DGEMMA_CONFIG`` names."""
    if named := environment.get(CONFIG_VARIABLE):
        return Path(os.path.expanduser(named))
    from platformdirs import user_config_path

    return user_config_path(APP) / "config.toml"


def _read_file(path: Path, must_exist: bool) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not must_exist:
            return {}
        raise DgemmaError(f"there is no file {path}", f"{CONFIG_VARIABLE} names it.", exit_code=2) from None
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "It holds the settings.", exit_code=2) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML
        raise DgemmaError(f"cannot read {path}: {error}", 'A line is: name = value, as in model = "demo".', 2) from None
    return values


def checked(name: str, value: Any, place: str) -> Any:
    """A value in the setting's type and range; a whole number will do for a float.

    ``DgemmaError`` (exit code 2) names the ``place`` of one that is not.
    """
    if SETTINGS[name].type is float and type(value) is int and abs(value) < LARGEST_SEED:
        value = float(value)
    if not fits(name, value):
        raise _bad(name, value, place)
    return value


def fits(name: str, value: Any) -> bool:
    """Whether the value has the setting's type and is in its range."""
    kind = SETTINGS[name]
    right = isinstance(value, kind.type) and (kind.type is bool or not isinstance(value, bool))
    if not right or kind.type is str:
        return right and is_text(value) and (kind.choices is None or value in kind.choices)
    return kind.least is None or (kind.least <= value < math.inf and (kind.most is None or value <= kind.most))


def parse(name: str, text: str, place: str) -> Any:
    """The value of a setting that was written as text, in the environment or in a chat; errors as ``checked``."""
    try:
        value = _PARSERS[SETTINGS[name].type](text)
    except (KeyError, ValueError):
        raise _bad(name, text, place) from None
    return checked(name, value, place)


def _bad(name: str, value: Any, place: str) -> DgemmaError:
    kind = SETTINGS[name]
    noun = f"one of {', '.join(kind.choices)}" if kind.choices else _NOUNS[kind.type]
    bounds = "" if kind.least is None else f" of at least {kind.least}"
    bounds += "" if kind.most is None else f" and at most {kind.most}"
    return DgemmaError(f"{place} must be {noun}{bounds}, not {value!r}", f"It is the setting: {kind.meaning}.", 2)


_NOUNS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str, int: int, float: float, bool: lambda text: _TRUTH[text.lower()]
}
