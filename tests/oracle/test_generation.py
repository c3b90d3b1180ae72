"""Whole generations, compared with the reference's ``generate`` step by step, with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.events import Committed, Done, Draft
from dgemma_mlx.generation import runner as runner_module
from dgemma_mlx.generation.api import stream
from dgemma_mlx.generation.model import Model
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text import load_tokenizer
from tests.diffusion.replay import Replay, draw
from tests.oracle.reference import CANVAS, Array, Reference, Step, generate, write_checkpoint

pytestmark = pytest.mark.oracle

DEMO = Path(__file__).parents[2] / "dgemma_mlx" / "demo"  # its tokenizer decodes the random ids
CANVASES = 3

SETTINGS: dict[str, dict[str, Any]] = {  # chosen so that canvases of random weights become stable
    "stops": {
        "max_denoising_steps": 24, "entropy_bound": 8.0, "t_min": 0.2, "t_max": 0.5, "confidence_threshold": 1.0,
    },
    "stops when stable for longer": {
        "max_denoising_steps": 24, "entropy_bound": 5.0, "t_min": 0.1, "t_max": 0.6, "confidence_threshold": 1.0,
        "stability_threshold": 3,
    },
    "uses all steps": {"max_denoising_steps": 6},
}  # fmt: skip

Models = tuple[Reference, Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("checkpoint")
    layer_types = [SLIDING, SLIDING, FULL]
    write_checkpoint(folder, seed=1, branch=0.3, vocab_size=256, num_hidden_layers=3, layer_types=layer_types)
    config = ModelConfig.load(folder)
    network, _ = load_model(folder, config)
    generation = GenerationConfig.load(folder, config)
    return Reference(folder), Model("random", folder, config, generation, load_tokenizer(DEMO), network)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Every canvas that our network decodes."""
    canvases: list[Array] = []
    decode = DiffusionGemma.decoder_input

    def spy(self: DiffusionGemma, canvas: mx.array, *rest: Any) -> mx.array:
        canvases.append(np.array(canvas))
        return decode(self, canvas, *rest)

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy)
    return canvases


def assert_same_steps(drafts: Sequence[tuple[Draft, ...]], steps: list[Step], decoded: list[Array]) -> None:
    """Check that the steps of one canvas are equal, except for the accepted positions of rows that have stopped."""
    assert len(drafts) == len(steps)
    for number, (rows, step) in enumerate(zip(drafts, steps, strict=True)):
        done = number + 1 == len(steps)
        assert [draft.finished for draft in rows] == [done or stopped for stopped in step.finished]
        assert [draft.step for draft in rows] == [number + 1] * len(rows)
        np.testing.assert_array_equal([draft.tokens for draft in rows], step.argmax_canvas)
        going_on = ~steps[number - 1].finished if number else np.ones(len(rows), bool)
        accepted = np.array([draft.accepted_mask for draft in rows])
        np.testing.assert_array_equal(accepted[going_on], step.accepted_mask[going_on])
        np.testing.assert_allclose([draft.entropy for draft in rows], step.entropy, rtol=0, atol=1e-3)
        if not done:
            np.testing.assert_array_equal(decoded[number + 1], step.current_canvas)
    del decoded[: len(steps)]


def middle_of_second_canvas(generated: Array) -> int:
    """Return a token in the middle of the second canvas that does not occur earlier, to serve as end of text."""
    start = CANVAS + CANVAS // 3
    return int(next(token for i, token in enumerate(generated) if i >= start and token not in generated[:i]))


@pytest.mark.parametrize("ends", [False, True], ids=["fills all canvases", "ends in the second canvas"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_stream(
    models: Models, name: str, ends: bool, decoded: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = models
    settings = SETTINGS[name]
    prompt = "52718309461"  # digits: single tokens with ids below 256
    ids = np.array([model.encode_prompt(prompt, raw=True)])
    canvases, uniforms = draw(0, 80, 1, CANVAS, reference.vocab_size)

    def run(eos: int | None) -> Any:
        options = {**settings, "max_new_tokens": CANVASES * CANVAS, "pad_token_id": 0, "eos_token_id": eos}
        return generate(reference.model, ids, canvases, uniforms, **options)

    expected = run(None)
    eos = middle_of_second_canvas(expected.sequences[0, ids.shape[1] :]) if ends else -1
    expected = run(eos) if ends else expected

    monkeypatch.setattr(runner_module, "Noise", lambda seed: Replay(canvases, uniforms))
    config = GenerationConfig(**settings, eos_token_ids=(eos,))
    events = list(
        stream(model, prompt, raw=True, speed="reference", generation=config, max_tokens=CANVASES * CANVAS)
    )
    drafts = [event for event in events if isinstance(event, Draft)]
    committed = [event for event in events if isinstance(event, Committed)]
    done = events[-1]

    assert isinstance(done, Done)
    assert done.finish_reason == ("stop" if ends else "length")
    assert done.statistics.canvases == len(committed) == len(expected.canvases) == (2 if ends else CANVASES)
    for index, steps in enumerate(expected.canvases):
        assert committed[index].steps == len(steps)
        assert_same_steps([(draft,) for draft in drafts if draft.canvas == index], steps, decoded)
    stopped = [len(steps) < config.max_denoising_steps for steps in expected.canvases]
    assert all(stopped) == any(stopped) == (name != "uses all steps")
    generated = expected.sequences[0, ids.shape[1] :]
    np.testing.assert_array_equal(done.tokens, generated[: len(done.tokens)])
    assert not generated[len(done.tokens) :].any()  # padding
    assert done.statistics.denoising_steps == sum(map(len, expected.canvases))
    assert done.statistics.tokens_per_forward == pytest.approx(expected.tokens_per_forward[0], rel=1e-6)


@pytest.mark.parametrize("left_padding", [(0, 0), (0, 5)])
@pytest.mark.parametrize("name", ["stops", "stops when stable for longer"])
def test_batch(models: Models, name: str, left_padding: tuple[int, int], decoded: list[Array]) -> None:
    """A row that has stopped keeps its canvas while the other row continues."""
    reference, model = models
    settings = SETTINGS[name]
    ids = np.random.default_rng(0).integers(0, reference.vocab_size, (2, 11))
    canvases, uniforms = draw(1, 80, 2, CANVAS, reference.vocab_size)
    expected = generate(
        reference.model, ids, canvases, uniforms, np.arange(11) >= np.array(left_padding)[:, None],
        max_new_tokens=CANVASES * CANVAS, eos_token_id=None, **settings,
    )  # fmt: skip

    noise, config = Replay(canvases, uniforms), GenerationConfig(**settings)
    cache = model.network.new_cache(mx.array(left_padding) if any(left_padding) else None)
    model.network.encode(mx.array(ids), cache)
    forward_passes = np.zeros(2)
    stopped_together = []
    for index, steps in enumerate(expected.canvases):
        drafts = list(Denoiser(model.network, config).denoise(cache, noise, CANVAS, canvas_index=index))
        assert_same_steps(drafts, steps, decoded)
        tokens = [draft.tokens for draft in drafts[-1]]
        np.testing.assert_array_equal(tokens, expected.sequences[:, cache.offset : cache.offset + CANVAS])
        stops = [1 + [row.finished for row in rows].index(True) for rows in zip(*drafts, strict=True)]
        forward_passes += stops
        stopped_together.append(stops[0] == stops[1])
        model.network.encode(mx.array(tokens), cache)
    assert not all(stopped_together)
    np.testing.assert_allclose(CANVASES * CANVAS / forward_passes, expected.tokens_per_forward, rtol=1e-6)
