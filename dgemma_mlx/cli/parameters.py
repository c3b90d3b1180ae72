"""Options that several commands share, each declared once, and groups of them.

A command takes a group as one parameter whose type is a dataclass; ``expand`` turns the group into one option per
field, as Typer needs it. ``model_option`` and the other factories put an option into a section of the help text.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from dgemma_mlx.checks import LARGEST_SEED
from dgemma_mlx.cli import complete


def section(title: str) -> Callable[..., Any]:
    """Return ``typer.Option`` with the section of the help text filled in."""
    return partial(typer.Option, rich_help_panel=title)


model_option = section("Model")
prompt_option = section("Prompt")
output_option = section("Output")
decoding_option = section("Decoding")
resource_option = section("Speed and memory")

# The model
ModelName = Annotated[
    str | None,
    model_option(
        "--model", "-m", metavar="MODEL", show_default="the settings' model, else demo",
        help="A folder, a Hub id `owner/name[@revision]`, or `demo`.", autocompletion=complete.models,
    ),
]  # fmt: skip
Adapter = Annotated[
    Path | None, model_option("--adapter", metavar="FOLDER", help="An adapter that `dgemma-mlx train` has written.")
]
ImageAttention = Annotated[
    str | None,
    model_option(
        "--image-attention", metavar="RULE", show_default="google",
        autocompletion=complete.values_of("image_attention"),
        help="Which tokens of the prompt see those of an image: google, transformers or causal (docs/images.md).",
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    resource_option(
        "--dtype", metavar="TYPE", show_default="auto", autocompletion=complete.values_of("dtype"),
        help="Number format of the computation: auto, bfloat16, float16 or float32.",
    ),
]  # fmt: skip
CpuDequantize = Annotated[
    str | None,
    resource_option(
        "--cpu-dequantize", metavar="MODE", show_default="auto", autocompletion=complete.values_of("cpu_dequantize"),
        help="Unpack 4-bit and 8-bit weights where there is no Metal: auto, on or off.",
    ),
]  # fmt: skip
NoKernels = Annotated[
    bool, resource_option("--no-kernels", help="Use only plain MLX operations, not this program's Metal kernels.")
]

# A server
KEY_VARIABLE = "DGEMMA_API_KEY"
ApiKey = Annotated[
    str | None,
    section("Server")("--api-key", metavar="KEY", show_default=f"the variable {KEY_VARIABLE}",
                      help="The key that the server's clients must send."),
]  # fmt: skip


def api_key(option: str | None) -> str | None:
    """Return the key of the option, or of the environment. An empty variable is none."""
    return (os.environ.get(KEY_VARIABLE) or None) if option is None else option


# The prompt
Prompt = Annotated[
    str | None, typer.Argument(help="The prompt. With `-` or without a prompt, standard input is the prompt.")
]
System = Annotated[str | None, prompt_option("--system", help="System prompt.")]
Raw = Annotated[bool, prompt_option("--raw", help="Send the prompt as plain text, without the chat template.")]
Thinking = Annotated[
    bool | None, prompt_option("--thinking/--no-thinking", help="Let the model think before it answers.")
]

# The output
AsJson = Annotated[bool, output_option("--json", help="Print the result as one JSON object.")]
PlanAsJson = Annotated[bool, output_option("--json", help="Print the plan or the result as one JSON object.")]
NoLive = Annotated[
    bool, output_option("--no-live", help="On a terminal, print each canvas when it is final instead of drawing it.")
]
Quiet = Annotated[bool, output_option("--quiet", "-q", help="Print only errors and warnings to stderr.")]

# How canvases are denoised
MaxTokens = Annotated[
    int | None,
    decoding_option("--max-tokens", "-n", min=1, show_default="1024", help="Maximum length of an answer in tokens."),
]
Seed = Annotated[
    int | None,
    decoding_option(
        "--seed", min=0, max=LARGEST_SEED, show_default="random",
        help="Seed of the random numbers. The same seed gives the same text on one machine.",
    ),
]  # fmt: skip
SpeedMode = Annotated[
    str | None,
    decoding_option(
        "--speed", metavar="MODE", show_default="balanced", autocompletion=complete.values_of("speed"),
        help="When a canvas is final: reference, balanced or fast.",
    ),
]  # fmt: skip
VerifyMode = Annotated[
    str | None,
    decoding_option(
        "--verify", metavar="MODE", show_default="off", autocompletion=complete.values_of("verify"),
        help="Let the encoder check each canvas: off, flag or repair. Use it where the answer follows from the prompt.",
    ),
]  # fmt: skip
Temp = Annotated[
    float | None,
    decoding_option(
        "--temp", min=0.0,
        help="Constant temperature in place of the schedule. 0 takes the most probable tokens.",
    ),
]  # fmt: skip
MaxDenoisingSteps = Annotated[
    int | None, decoding_option("--max-denoising-steps", help="Maximum denoising steps per canvas.")
]

# Speed and memory
MemoryLimit = Annotated[
    str | None,
    resource_option(
        "--memory-limit", metavar="SIZE", show_default="the device's limit",
        help="Work in smaller steps to stay within this much memory, such as 20GB.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class ModelOptions:
    """The options that choose a model and the way it is computed."""

    model: ModelName = None
    adapter: Adapter = None
    dtype: Dtype = None
    cpu_dequantize: CpuDequantize = None
    no_kernels: NoKernels = False
    image_attention: ImageAttention = None


@dataclass(frozen=True)
class AnswerOptions:
    """The options of every command that asks a model and prints its answer."""

    system: System = None
    seed: Seed = None
    memory_limit: MemoryLimit = None
    quiet: Quiet = False


@dataclass(frozen=True)
class DenoisingOptions:
    """The options of every command that denoises canvases step by step."""

    speed: SpeedMode = None
    temp: Temp = None
    max_denoising_steps: MaxDenoisingSteps = None


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with each dataclass parameter replaced by the dataclass's fields.

    Typer sees one option per field; the command receives one object per dataclass. An option without a ``metavar``
    gets one after its type: INT, FLOAT, TEXT or PATH.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        group = groups.get(name)
        fields = inspect.signature(group).parameters if group else {name: parameter}
        types = get_type_hints(group, include_extras=True) if group else hints
        for field, declared in fields.items():
            assert field not in parameters, f"two groups of {command.__name__} have an option {field}"
            _declare_type(types[field])
            parameters[field] = declared.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[field])

    @wraps(command)
    def expanded(**values: Any) -> None:
        objects = {
            name: group(**{field: values.pop(field) for field in inspect.signature(group).parameters})
            for name, group in groups.items()
        }
        command(**values, **objects)

    expanded.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    expanded.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return expanded


class _GivenPath:
    """The path in an option or argument.

    An empty one is refused, because it would be the current folder, which nobody means. One that no file can have is
    refused as well, because ``Path.exists`` raises an error for it.
    """

    def __new__(cls, text: str) -> Path:  # type: ignore[misc]
        if not text:
            raise typer.BadParameter("the path is empty")
        try:
            os.lstat(text)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise typer.BadParameter("the path is too long") from None
        return Path(text)


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def _declare_type(hint: Any) -> None:
    """Name the value of an option after its type, such as ``INT`` for ``Annotated[int | None, typer.Option()]``.

    A path is refused when it is empty.
    """
    annotation, option = get_args(hint)
    types = get_args(annotation) or (annotation,)  # of a union or a list
    if Path in types:
        option.path_type = _GivenPath
    if isinstance(option, typer.models.OptionInfo) and option.metavar is None:
        option.metavar = next((_METAVARS[type_] for type_ in types if type_ in _METAVARS), None)
