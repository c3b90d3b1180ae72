"""The three schedulers of diffusers as ways of answering, with transformers' model in float32.

All are run by ``DiffusionGemmaPipeline`` with its defaults: 48 forward passes per canvas at most, temperature 0 (which
``EntropyBoundScheduler`` ignores), and adaptive stopping. The ways that end in "all steps" switch the latter off
(``confidence_threshold=None``). The end-of-text id is that of the chat turn: the pipeline's default, the tokenizer's
``eos_token``, is one that the model does not write, so that every answer would take all its canvases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .questions import MAX_TOKENS
from .records import Answerer, Cost, Question

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DiscreteDDIM": ("DiscreteDDIMScheduler", {}),
    "DiscreteDDIM+corrector": ("DiscreteDDIMScheduler", {"corrector_steps": 1}),
    "EntropyBound": ("EntropyBoundScheduler", {}),
    "BlockRefinement": ("BlockRefinementScheduler", {}),
}
ALL_STEPS = " all steps"
ADAPTIVE = [f"diffusers {name}" for name in SCHEDULERS]
FIXED = [name + ALL_STEPS for name in ADAPTIVE]


def answerers(
    folder: Path, encode: Callable[[list[Any]], list[int]], decode: Callable[[list[int]], str], eos_id: int
) -> dict[str, Answerer]:
    """Load the checkpoint, and return what answers in each way.

    ``encode`` returns the ids of a conversation, ``decode`` the text of an answer's ids up to its end, and ``eos_id``
    ends an answer.
    """
    import diffusers
    import torch
    import transformers
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _accept_old_names(model.model.decoder)
    decoded: list[int] = []  # the positions of each decoder pass
    encoded: list[int] = []  # the positions of each encoder pass, of which the first is the prefill
    model.model.decoder.register_forward_pre_hook(
        lambda _, arguments, named: decoded.append((arguments or (named["decoder_input_ids"],))[0].numel()),
        with_kwargs=True,
    )
    model.model.encoder.register_forward_pre_hook(
        lambda _, arguments, named: encoded.append(named["input_ids"].numel()), with_kwargs=True
    )

    def answerer(scheduler: str, settings: dict[str, Any], options: dict[str, Any]) -> Answerer:
        pipeline = diffusers.DiffusionGemmaPipeline(model, getattr(diffusers, scheduler)(**settings), tokenizer)
        pipeline.set_progress_bar_config(disable=True)

        def answer(question: Question) -> Cost:
            decoded.clear()
            encoded.clear()
            found = pipeline(
                messages=question.messages, gen_length=MAX_TOKENS, eos_token_id=eos_id, output_type="seq",
                generator=torch.Generator().manual_seed(question.number), **options,
            )  # fmt: skip
            if encoded[0] != len(encode(question.messages)):
                raise RuntimeError(f"the pipeline reads another prompt than this project: {question.messages}")
            return Cost(
                text=decode(found.sequences[0].tolist()), canvases=len(encoded),
                decoder_passes=len(decoded), decoder_positions=sum(decoded),
                encoder_passes=len(encoded) - 1, encoder_positions=sum(encoded[1:]),
            )  # fmt: skip

        return answer

    return {
        f"diffusers {name}{end}": answerer(scheduler, settings, options)
        for end, options in (("", {}), (ALL_STEPS, {"confidence_threshold": None}))
        for name, (scheduler, settings) in SCHEDULERS.items()
    }


def _accept_old_names(decoder: Any) -> None:
    """Let the pipeline of diffusers 0.42 call transformers 5.24, which has renamed ``past_key_values`` to ``cache``.

    transformers still takes the old name in ``forward``, with a warning, but not where the pipeline makes the decoder's
    mask. What is computed stays the same.
    """
    masks = decoder.create_diffusion_decoder_attention_mask

    def renamed(*, past_key_values: Any, **named: Any) -> Any:
        return masks(cache=past_key_values, **named)

    decoder.create_diffusion_decoder_attention_mask = renamed
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
