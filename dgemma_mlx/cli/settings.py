"""Settings: environment variables override ``config.toml``, which overrides the program's own defaults."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import LARGEST_SEED, is_text, reason, shown
from dgemma_mlx.errors import DgemmaError

APP = "dgemma-mlx"
CONFIG_VARIABLE = "DGEMMA_CONFIG"


@dataclass(frozen=True)
class SettingKind:
    """What a setting means and which values it accepts.

    Attributes:
        type: Type of the value.
        default: The program's default. None leaves the choice to the checkpoint or to the program.
        meaning: What the setting is, for `dgemma-mlx config` and for hints.
        minimum: Smallest number, or None.
        maximum: Largest number, or None.
        choices: The accepted texts, or None for any text.
    """

    type: type
    default: Any
    meaning: str
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] | None = None


SETTINGS: dict[str, SettingKind] = {
    "model": SettingKind(str, None, "folder, Hub id or 'demo'"),
    "max_tokens": SettingKind(int, 1024, "maximum length of an answer in tokens", minimum=1),
    "seed": SettingKind(int, None, "seed of the random numbers", minimum=0, maximum=LARGEST_SEED),
    "system": SettingKind(str, None, "system prompt"),
    "thinking": SettingKind(bool, False, "let the model think before it answers"),
    "live": SettingKind(bool, True, "draw the canvas on a terminal"),
    "log": SettingKind(bool, True, "keep answers and conversations for `dgemma-mlx sessions`"),
    "stats": SettingKind(bool, False, "print a line about each answer of a chat"),
    "markdown": SettingKind(bool, True, "draw answers on a terminal as Markdown"),
    "temp": SettingKind(float, None, "constant temperature; 0 takes the most probable tokens", minimum=0),
    "max_denoising_steps": SettingKind(int, None, "maximum denoising steps per canvas", minimum=1),
    "entropy_bound": SettingKind(float, None, "bound on the entropy of the tokens accepted in a step", minimum=0),
    "t_min": SettingKind(float, None, "temperature that the schedule approaches in the last step", minimum=0),
    "t_max": SettingKind(float, None, "temperature of the first step", minimum=0),
    "confidence_threshold": SettingKind(float, None, "mean entropy below which a stable canvas is final", minimum=0),
    "stability_threshold": SettingKind(int, None, "steps without a change after which a canvas is stable", minimum=0),
    "speed": SettingKind(str, "balanced", "when a canvas is final", choices=("reference", "balanced", "fast")),
    "verify": SettingKind(str, "off", "let the encoder check each canvas", choices=("off", "flag", "repair")),
    "memory_limit": SettingKind(str, None, "memory limit such as 20GB, instead of the device's"),
    "dtype": SettingKind(
        str, "auto", "number format of the computation", choices=("auto", "bfloat16", "float16", "float32")
    ),
    "cpu_dequantize": SettingKind(str, "auto", "unpack weights where there is no Metal", choices=("auto", "on", "off")),
    "image_attention": SettingKind(
        str, None, "which tokens of the prompt see those of an image", choices=("google", "transformers", "causal")
    ),
    "kernels": SettingKind(
        str, "auto", "this program's own Metal kernels", choices=("auto", "off", "reference", "force")
    ),
}


@dataclass(frozen=True)
class Setting:
    """The value of a setting and its origin.

    Attributes:
        value: The value in force.
        origin: The name of an environment variable, the path of a file, or "default".
    """

    value: Any
    origin: str


class Settings(Mapping[str, Setting]):
    """The values of all settings in ``SETTINGS``, from the environment, the settings file and the defaults.

    Raises `DgemmaError` (exit code 2) that names a bad value and where it comes from.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, file: Path | None = None) -> None:
        environment = os.environ if environment is None else environment
        must_exist = file is not None or bool(environment.get(CONFIG_VARIABLE))
        file = file or config_file(environment)
        self._values = {name: Setting(kind.default, "default") for name, kind in SETTINGS.items()}
        for name, value in _read_file(file, must_exist).items():
            if name not in SETTINGS:
                raise DgemmaError(f"{file}: unknown setting {shown(name)}", f"Settings: {', '.join(SETTINGS)}.", 2)
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

    def under(self, values: Mapping[str, Any], origin: str) -> Settings:
        """Return these settings with other values, already checked, in place of some of them."""
        over = copy(self)
        over._values = self._values | {name: Setting(value, origin) for name, value in values.items()}
        return over

    def pick(self, name: str, option: Any) -> Any:
        """Return the value of a command-line option, or the setting's value when the option is None."""
        return self._values[name].value if option is None else option

    def pick_checked(self, name: str, option: Any) -> Any:
        """Return what ``pick`` returns. Raises `DgemmaError` when the option is not a valid value of the setting."""
        return self.pick(name, None if option is None else checked(name, option, f"--{name.replace('_', '-')}"))


def config_file(environment: Mapping[str, str]) -> Path:
    """Return the path of ``config.toml`` in the platform's settings folder, or the file that DGEMMA_CONFIG names."""
    if named := environment.get(CONFIG_VARIABLE):
        return Path(os.path.expanduser(named))
    from platformdirs import user_config_path

    return user_config_path(APP) / "config.toml"


def _read_file(path: Path, must_exist: bool) -> dict[str, Any]:
    """Read the settings file. A missing file is empty unless it ``must_exist``."""
    try:
        return read_toml(path)
    except FileNotFoundError:
        if not must_exist:
            return {}
        hint = f"{CONFIG_VARIABLE} names this file. Create it, or unset the variable."
        raise DgemmaError(f"there is no file {path}", hint, exit_code=2) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises FileNotFoundError, and `DgemmaError` (exit code 2) when it cannot be read or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check its permissions.", exit_code=2) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        hint = 'Write each line as name = value, such as model = "demo".'
        raise DgemmaError(f"cannot read {path}: {reason(error)}", hint, exit_code=2) from None
    return values


def checked(name: str, value: Any, place: str) -> Any:
    """Return a value that has the setting's type and is in its range. Integers become floats where needed.

    Raises `DgemmaError` (exit code 2) for any other value. ``place`` says in the message where the value comes from.
    """
    if SETTINGS[name].type is float and type(value) is int and abs(value) < LARGEST_SEED:
        value = float(value)
    if not fits(name, value):
        raise _bad(name, value, place)
    return value


def fits(name: str, value: Any) -> bool:
    """Return whether the value has the setting's type and is in its range."""
    kind = SETTINGS[name]
    has_type = isinstance(value, kind.type) and (kind.type is bool or not isinstance(value, bool))
    if not has_type or kind.type is str:
        is_model = name != "model" or bool(str(value).strip())
        return has_type and is_model and is_text(value) and (kind.choices is None or value in kind.choices)
    largest = math.inf if kind.maximum is None else kind.maximum
    if kind.type is int and not -LARGEST_SEED <= value <= LARGEST_SEED:
        return False
    return kind.minimum is None or (kind.minimum <= value < math.inf and value <= largest)


def parse(name: str, text: str, place: str) -> Any:
    """Return the value of a setting that was written as text, in a variable or in a chat.

    Raises `DgemmaError` as ``checked`` does.
    """
    try:
        value = _PARSERS[SETTINGS[name].type](text)
    except (KeyError, ValueError):
        raise _bad(name, text, place) from None
    return checked(name, value, place)


def _bad(name: str, value: Any, place: str) -> DgemmaError:
    """Return the error that says which values the setting accepts."""
    kind = SETTINGS[name]
    noun = f"one of {', '.join(kind.choices)}" if kind.choices else _NOUNS[kind.type]
    bounds = "" if kind.minimum is None else f" of at least {kind.minimum}"
    maximum = LARGEST_SEED if type(value) is int and value > LARGEST_SEED else kind.maximum
    bounds += "" if maximum is None else f" and at most {maximum}"
    return DgemmaError(f"{place} must be {noun}{bounds}, not {shown(value)}", f"The setting means: {kind.meaning}.", 2)


_NOUNS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str, int: int, float: float, bool: lambda text: _TRUTH[text.lower()]
}
