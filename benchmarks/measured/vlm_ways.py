"""mlx-vlm's two samplers as ways of answering, on a checkpoint in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .questions import MAX_TOKENS
from .records import Answerer, Cost, Question

# Its defaults: temperature 0, and the checkpoint's stopping thresholds. The last way samples, as the reference does.
WAYS: dict[str, dict[str, Any]] = {
    "mlx-vlm confidence-threshold": {"diffusion_sampler": "confidence-threshold"},
    "mlx-vlm entropy-bound": {"diffusion_sampler": "entropy-bound"},
    "mlx-vlm entropy-bound sampled": {"diffusion_sampler": "entropy-bound", "temperature": 1.0},
}  # fmt: skip


def answerers(
    folder: Path, encode: Callable[[list[Any]], list[int]], decode: Callable[[list[int]], str]
) -> dict[str, Answerer]:
    """Load the checkpoint, and return what answers in each way.

    ``encode`` returns the ids of a conversation, and ``decode`` the text of an answer's ids.
    """
    import mlx.core as mx
    from mlx_vlm import load, stream_generate

    model, processor = load(str(folder))
    decoded: list[int] = []  # the positions of each decoder pass
    encoded: list[int] = []  # the positions of each encoder pass over a canvas
    logits, update = model.diffusion_decoder_logits, model.diffusion_update_cache

    def counted_logits(canvas: Any, *arguments: Any, **named: Any) -> Any:
        decoded.append(canvas.size)
        return logits(canvas, *arguments, **named)

    def counted_update(canvas: Any, **named: Any) -> Any:
        encoded.append(canvas.size)
        return update(canvas, **named)

    model.diffusion_decoder_logits, model.diffusion_update_cache = counted_logits, counted_update

    def answerer(options: dict[str, Any]) -> Answerer:
        def answer(question: Question) -> Cost:
            decoded.clear()
            encoded.clear()
            ids, canvases = [], 0
            for result in stream_generate(
                model, processor, "", input_ids=mx.array([encode(question.messages)]), max_tokens=MAX_TOKENS,
                seed=question.number, **options,
            ):
                canvases += result.diffusion_block_complete
                if not result.diffusion_block_complete and result.finish_reason is None:
                    ids.append(int(result.token))
            if (len(decoded), sum(decoded)) != (result.diffusion_denoising_steps, result.diffusion_work_tokens):
                raise RuntimeError("mlx-vlm counts other steps than its calls of the decoder")
            return Cost(
                text=decode(ids), canvases=canvases, decoder_passes=len(decoded), decoder_positions=sum(decoded),
                encoder_passes=len(encoded), encoder_positions=sum(encoded),
            )  # fmt: skip

        return answer

    return {way: answerer(options) for way, options in WAYS.items()}
