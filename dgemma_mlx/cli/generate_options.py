"""The options that only ``generate`` has: about the prompt, the output, and the denoising loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dgemma_mlx.cli import complete
from dgemma_mlx.cli.parameters import AsJson, NoLive, decoding_option, output_option, prompt_option, resource_option
from dgemma_mlx.cli.prompt import Files, read_prompt
from dgemma_mlx.errors import DgemmaError

ShowSteps = Annotated[
    int | None, output_option("--show-steps", min=1, help="Print this many steps of each canvas to stderr.")
]
Trace = Annotated[
    Path | None, output_option("--trace", metavar="FILE", help="Write every event to this file as a line of JSON.")
]
AsJsonLines = Annotated[bool, output_option("--jsonl", help="Print every event as a line of JSON.")]
Batch = Annotated[
    Path | None,
    prompt_option("--batch", metavar="FILE", help="Answer every line of a JSONL file and print one JSON object each."),
]
BatchSize = Annotated[
    int | None,
    prompt_option("--batch-size", min=1, show_default="1", help="Number of --batch prompts answered at a time."),
]
EntropyBound = Annotated[
    float | None,
    decoding_option("--entropy-bound", help="Bound on the entropy of the tokens accepted in a step. A higher bound "
                    "accepts more tokens."),
]  # fmt: skip
TMin = Annotated[
    float | None, decoding_option("--t-min", help="Temperature that the schedule approaches in the last step.")
]
TMax = Annotated[float | None, decoding_option("--t-max", help="Temperature of the first step.")]
Confidence = Annotated[
    float | None,
    decoding_option("--confidence-threshold", help="Mean entropy, in nats, below which a stable canvas is final."),
]
Stability = Annotated[
    int | None, decoding_option("--stability-threshold", help="Steps without a change after which a canvas is stable.")
]
Extract = Annotated[
    bool, output_option("--extract", "-x", help="Print only the first code block of the answer, without its fences.")
]
TemplateName = Annotated[
    str | None,
    prompt_option("--template", "-t", metavar="NAME", autocompletion=complete.templates,
                  help="Put the prompt into this template (`dgemma-mlx templates`), with the settings that it has."),
]  # fmt: skip
Params = Annotated[
    list[str] | None,
    prompt_option("--param", "-p", metavar="NAME=VALUE",
                  help="Fill a gap of the template. May be given several times."),
]  # fmt: skip
TrimCanvas = Annotated[
    bool,
    decoding_option("--trim-canvas", help="Make the last canvas no longer than --max-tokens needs: less work, but "
                    "another text."),
]  # fmt: skip
PrefillStep = Annotated[
    int | None,
    resource_option("--prefill-step-size", min=1,
                    show_default="2048, or 512 without Metal; fewer to stay within the memory limit",
                    help="Prompt tokens encoded at a time. It affects memory and speed only."),
]  # fmt: skip


@dataclass(frozen=True)
class ScheduleOptions:
    """The parameters of the denoising loop that only ``generate`` sets by options."""

    entropy_bound: EntropyBound = None
    t_min: TMin = None
    t_max: TMax = None
    confidence_threshold: Confidence = None
    stability_threshold: Stability = None


@dataclass(frozen=True)
class BatchOptions:
    """The options about many prompts."""

    batch: Batch = None
    batch_size: BatchSize = None


@dataclass(frozen=True)
class TextOptions:
    """The options about the text of the prompt."""

    file: Files = None
    template: TemplateName = None
    param: Params = None

    def takes_stdin(self, prompt: str | None) -> bool:
        """Whether standard input is the prompt, or one of the files, and not only what may follow the prompt."""
        return prompt == "-" or Path("-") in (self.file or ()) or (prompt is None and self.template is None)

    def read(
        self, prompt: str | None, quiet: bool, stdin_is_taken: bool = False
    ) -> tuple[str, Mapping[str, Any]]:
        """Return the text that the model answers, and the settings of the template.

        ``quiet`` and ``stdin_is_taken`` are those of ``read_prompt``. Raises `DgemmaError` (exit code 2) as
        ``read_prompt`` and ``load_template`` do, and for --param without --template.
        """
        if self.template is None:
            if self.param:
                raise DgemmaError("--param needs --template", "It names the template with the gaps.", exit_code=2)
            return read_prompt(prompt, self.file, quiet=quiet, stdin_is_taken=stdin_is_taken), {}
        from dgemma_mlx.cli.template import load_template

        template = load_template(self.template, self.param or ())
        text = read_prompt(
            prompt, self.file, template.filled, optional=template.is_complete, quiet=quiet,
            stdin_is_taken=stdin_is_taken,
        )  # fmt: skip
        return text, template.settings


@dataclass(frozen=True)
class OutputOptions:
    """The options that say what is printed."""

    no_live: NoLive = False
    show_steps: ShowSteps = None
    trace: Trace = None
    as_json: AsJson = False
    as_json_lines: AsJsonLines = False
    extract: Extract = False

    def check(self) -> None:
        """Raise `DgemmaError` (exit code 2) for options that exclude each other."""
        if self.as_json and self.as_json_lines:
            hint = "--json prints the answer, --jsonl all events."
            raise DgemmaError("--json and --jsonl exclude each other", hint, exit_code=2)
        if self.extract and (self.as_json or self.as_json_lines):
            raise DgemmaError("--extract and --json or --jsonl exclude each other", "JSON holds the whole answer.", 2)

    def form(self, live: bool) -> str:
        """Return the form of the output: json, jsonl, code, live or text. ``live`` says whether drawing is possible."""
        if self.as_json or self.as_json_lines:
            return "json" if self.as_json else "jsonl"
        if self.extract:
            return "code"
        return "live" if live and not self.no_live and not self.show_steps else "text"
