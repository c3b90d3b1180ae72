"""The options that only ``generate`` has: about the prompt, the output, and the denoising loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dgemma_mlx.cli.parameters import AsJson, NoLive, decoding_option, output_option, prompt_option, resource_option

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
class OutputOptions:
    """The options that say what is printed."""

    no_live: NoLive = False
    show_steps: ShowSteps = None
    trace: Trace = None
    as_json: AsJson = False
    as_json_lines: AsJsonLines = False

    def form(self, live: bool) -> str:
        """Return the form of the output: json, jsonl, live or text. ``live`` says whether drawing is possible."""
        if self.as_json or self.as_json_lines:
            return "json" if self.as_json else "jsonl"
        return "live" if live and not self.no_live and not self.show_steps else "text"
