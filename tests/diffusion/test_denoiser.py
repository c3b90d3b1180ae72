"""The loop over the steps of a canvas, on the golden checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.edits import Edits, Pins, StartCanvas
from dgemma_mlx.diffusion.sampler import Noise, accept
from dgemma_mlx.events import Draft
from dgemma_mlx.kernels import CanvasSample, LogitBias
from dgemma_mlx.model import prediction as prediction_module
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma
from tests.diffusion.replay import Replay, draw
from tests.golden.numbers import CONFIG, FOLDER, TOLERANCE, golden_model, golden_numbers

SETTLES = GenerationConfig.load(FOLDER, CONFIG)
C, V = CONFIG.canvas_length, CONFIG.text.vocab_size
PROMPT = mx.array(np.random.default_rng(3).integers(0, V, (3, 9)))


def prefix(batch: int = 1) -> PrefixCache:
    cache = golden_model().new_cache()
    golden_model().encode(PROMPT[:batch], cache)
    return cache


def run(
    noise: Noise | int, config: GenerationConfig = SETTLES, *, batch: int = 1, length: int = C, greedy: bool = False
) -> list[tuple[Draft, ...]]:
    """All steps of a canvas after the prefix; ``noise`` may be the first row's seed."""
    source = Noise(*range(noise, noise + batch)) if isinstance(noise, int) else noise
    return list(Denoiser(golden_model(), config, greedy=greedy).denoise(prefix(batch), source, length))


@pytest.mark.parametrize("positions", [64, 65])
def test_drafts_do_not_wait_for_long_self_conditioning(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """What takes one block is started before the drafts are yielded; what takes several is waited for afterwards."""
    monkeypatch.setattr(prediction_module, "DENSE_BYTES", 1)
    network = DiffusionGemma(replace(CONFIG.text, vocab_size=2048)).eval()
    network.embed_tokens.weight = network.embed_tokens.weight * 1e-3  # every prediction is flat
    begun: list[int] = []
    monkeypatch.setattr(network, "_expected_embeddings", lambda *_: begun.append(1) or 1 / 0)
    steps = Denoiser(network, SETTLES).denoise(network.new_cache(), Noise(1), positions)
    if positions > 64:
        assert not next(steps)[0].finished
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert begun == [1]


def test_golden_trace() -> None:
    """Two canvases of the reference, step by step, with the random numbers that it was given."""
    numbers = golden_numbers("trace")
    noise, cache = Replay(numbers["canvases"], numbers["uniforms"]), golden_model().new_cache()
    golden_model().encode(mx.array(numbers["prompt"]), cache)
    for index in (0, 1):
        drafts = list(Denoiser(golden_model(), SETTLES).denoise(cache, noise, C, canvas_index=index))
        steps = np.flatnonzero(numbers["canvas"] == index)
        assert len(drafts) == len(steps) < SETTLES.max_denoising_steps
        for step, (draft,) in zip(steps, drafts, strict=True):
            np.testing.assert_array_equal(draft.tokens, numbers["argmax_canvas"][step])
            np.testing.assert_array_equal(draft.accepted_mask, numbers["accepted_mask"][step])
            np.testing.assert_allclose(draft.entropy, numbers["entropy"][step], rtol=0, atol=TOLERANCE)
        golden_model().encode(mx.array([drafts[-1][0].tokens]), cache)


def test_drafts_are_numbered_and_the_last_is_finished() -> None:
    drafts = [draft for (draft,) in run(0)]
    assert [draft.step for draft in drafts] == list(range(1, len(drafts) + 1))
    assert [draft.finished for draft in drafts] == [False] * (len(drafts) - 1) + [True]
    assert 1 < len(drafts) < SETTLES.max_denoising_steps
    for draft in drafts:
        assert draft.max_steps == SETTLES.max_denoising_steps
        assert len(draft.tokens) == len(draft.accepted_mask) == len(draft.entropy) == C
        assert any(draft.accepted_mask)


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_that_are_used_up_finish_too(steps: int) -> None:
    drafts = run(0, SETTLES.override(max_denoising_steps=steps, confidence_threshold=0.0))
    assert [draft.finished for (draft,) in drafts] == [False] * (steps - 1) + [True]


def test_one_seed_one_text() -> None:
    assert run(5) == run(5)
    assert run(5) != run(6)


def test_the_next_canvas_is_sampled_where_accepted_and_random_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    canvases, uniforms = draw(0, 17, 1, C, V)
    decoded: list[mx.array] = []
    logits: list[mx.array] = []
    embed, decode = DiffusionGemma.decoder_input, DiffusionGemma.decode_layers

    def spy_on_canvas(self: DiffusionGemma, canvas: mx.array, *rest: Any) -> mx.array:
        decoded.append(canvas)
        return embed(self, canvas, *rest)

    def spy_on_logits(self: DiffusionGemma, *arguments: Any, **options: Any) -> mx.array:
        hidden = decode(self, *arguments, **options)
        logits.append(self.logits(hidden))
        return hidden

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy_on_canvas)
    monkeypatch.setattr(DiffusionGemma, "decode_layers", spy_on_logits)
    config = SETTLES.override(t_min=0.5, t_max=0.5)
    drafts = run(Replay(canvases, uniforms), config)
    np.testing.assert_array_equal(decoded[0], canvases[0])
    for step, (draft,) in enumerate(drafts[:-1]):
        cumulative = np.exp(np.array(logits[step]).astype(np.float64) / 0.5).cumsum(axis=-1)
        sampled = (cumulative > uniforms[step][..., None] * cumulative[..., -1:]).argmax(axis=-1)
        expected = np.where([draft.accepted_mask], sampled, canvases[step + 1])
        np.testing.assert_array_equal(decoded[step + 1], expected)


def test_pinned_positions_hold_their_ids_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    ids, free = rng.integers(0, V, (2, C)), rng.random((2, C)) < 0.5
    decoded: list[Any] = []
    entropies: list[Any] = []
    decode, sampler = DiffusionGemma.decoder_input, DiffusionGemma.sample

    def spy(self: DiffusionGemma, canvas: mx.array, *rest: Any) -> mx.array:
        decoded.append(np.array(canvas))
        return decode(self, canvas, *rest)

    def sampled(*arguments: Any) -> CanvasSample:
        sample = sampler(*arguments)
        entropies.append(sample.entropy)
        return sample

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy)
    monkeypatch.setattr(DiffusionGemma, "sample", sampled)
    pins = Pins(mx.array(ids, mx.int32), mx.array(free))
    steps = list(Denoiser(golden_model(), SETTLES).denoise(prefix(2), Noise(1, 2), C, Edits(pins=pins)))
    assert len(steps) > 1
    for canvas, entropy, drafts in zip(decoded, entropies, steps, strict=True):
        np.testing.assert_array_equal(canvas[~free], ids[~free])
        for row, draft in enumerate(drafts):
            here = free[row]
            np.testing.assert_array_equal(np.array(draft.tokens)[~here], ids[row][~here])
            assert not np.array(draft.accepted_mask)[~here].any() and not np.array(draft.entropy)[~here].any()
            if not draft.finished:  # the free positions are accepted as if there were no others
                alone = accept(entropy[row][None][:, mx.array(np.flatnonzero(here))], SETTLES.entropy_bound)
                np.testing.assert_array_equal(np.array(draft.accepted_mask)[here], np.array(alone)[0])


@pytest.mark.parametrize("length", [1, 5, 2 * C])
def test_canvas_of_another_length(length: int) -> None:
    assert all(len(draft.tokens) == length for (draft,) in run(1, length=length))


def test_greedy_needs_no_samples() -> None:
    """With every position accepted, the first canvas is the only random thing in a greedy run."""
    config = SETTLES.override(entropy_bound=1e9, max_denoising_steps=5, confidence_threshold=0.0)
    canvases, uniforms = draw(0, 6, 1, C, V)
    other_canvases, other_uniforms = draw(1, 6, 1, C, V)
    other_canvases[0] = canvases[0]
    one = run(Replay(canvases, uniforms), config, greedy=True)
    assert one == run(Replay(other_canvases, other_uniforms[:0]), config, greedy=True)
    assert one[-1] != run(Replay(canvases, uniforms), config)[-1]


def test_a_row_that_has_finished_stays_while_others_go_on() -> None:
    together = run(2, batch=3)
    lengths = []
    for row in range(3):
        drafts = [rows[row] for rows in together]
        first = [draft.finished for draft in drafts].index(True)
        lengths.append(first + 1)
        assert drafts[first:] == [replace(drafts[first], step=draft.step) for draft in drafts[first:]]
    assert len(set(lengths)) > 1
    assert max(lengths) == len(together)


def test_rows_do_not_touch_each_other() -> None:
    """Given the same random numbers, a row of a batch goes the way it goes alone."""
    canvases, uniforms = draw(3, 17, 3, C, V)
    together = run(Replay(canvases, uniforms), batch=3)
    for row in range(3):
        cache, one = golden_model().new_cache(), slice(row, row + 1)
        golden_model().encode(PROMPT[one], cache)
        noise = Replay(canvases[:, one], uniforms[:, one])
        alone = Denoiser(golden_model(), SETTLES).denoise(cache, noise, C)
        for (draft,), rows in zip(alone, together, strict=False):
            assert rows[row].tokens == draft.tokens
            assert rows[row].accepted_mask == draft.accepted_mask
            assert rows[row].entropy == pytest.approx(draft.entropy, abs=TOLERANCE)
            assert rows[row].finished == draft.finished


def test_a_caller_may_stop_between_two_steps() -> None:
    """Steps are computed when they are asked for, and what was seen of them is what a whole run shows."""
    whole = run(4)
    canvases = 0

    class Counting(Noise):
        def canvas(self, length: int, vocab_size: int) -> mx.array:
            nonlocal canvases
            canvases += 1
            return super().canvas(length, vocab_size)

    steps = Denoiser(golden_model(), SETTLES).denoise(prefix(), Counting(4), C)
    assert canvases == 0
    assert list(islice(steps, 2)) == whole[:2]
    assert canvases == 3
    del steps
    assert run(4) == whole


def test_barred_ids_are_never_written() -> None:
    rng = np.random.default_rng(1)
    banned, here = rng.choice(V, V // 2, replace=False), rng.choice(V, V // 3, replace=False)
    places = np.array([3, C + 2])

    table = [np.where(np.isin(np.arange(V), ids), -np.inf, 0) for ids in (banned, [*banned, *here])]
    rows = np.isin(np.arange(2 * C), places).reshape(2, C)
    barred = LogitBias(mx.array(np.stack(table), mx.float32), mx.array(rows, mx.int32))
    steps = list(Denoiser(golden_model(), SETTLES).denoise(prefix(2), Noise(1, 2), C, Edits(barred=barred)))
    free = run(1, batch=2)
    assert any(set(draft.tokens) & set(banned.tolist()) for draft in free[-1])
    for drafts in steps:
        tokens = np.array([draft.tokens for draft in drafts]).reshape(-1)
        assert not np.isin(tokens, banned).any()
        assert not np.isin(tokens[places], here).any()


def test_barring_nothing_changes_nothing() -> None:
    edits = Edits(barred=LogitBias(mx.zeros((1, V)), mx.zeros((1, C), mx.int32)))
    steps = Denoiser(golden_model(), SETTLES).denoise(prefix(), Noise(4), C, edits)
    assert [draft for (draft,) in steps] == [draft for (draft,) in run(4)]


def test_a_start_takes_the_place_of_noise_and_of_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    decode = DiffusionGemma.decoder_input

    def spy(self: DiffusionGemma, canvas: mx.array, signal: mx.array) -> mx.array:
        decoded.append((np.array(canvas), np.array(signal)))
        return decode(self, canvas, signal)

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy)
    canvas, last = np.random.default_rng(2).integers(0, V, (1, C)), SETTLES.max_denoising_steps
    edits = Edits(start=StartCanvas(mx.array(canvas, mx.int32), last - 1))
    config = SETTLES.override(confidence_threshold=0.0)
    drafts = [draft for (draft,) in Denoiser(golden_model(), config).denoise(prefix(), Noise(1), C, edits)]
    assert [draft.step for draft in drafts] == [last - 1, last]
    np.testing.assert_array_equal(decoded[0][0], canvas)
    assert not decoded[0][1].any()  # nothing was predicted before
    assert decoded[1][1].any()


def test_the_next_step_is_started_before_a_step_is_handed_out_and_none_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    decode = DiffusionGemma.decode_layers

    def spy(self: DiffusionGemma, *arguments: Any, **options: Any) -> mx.array:
        started.append(len(started) + 1)
        return decode(self, *arguments, **options)

    monkeypatch.setattr(DiffusionGemma, "decode_layers", spy)
    for draft, in Denoiser(golden_model(), SETTLES).denoise(prefix(), Noise(1), C):
        assert len(started) == (draft.step if draft.finished else draft.step + 1)
    started.clear()
    steps = Denoiser(golden_model(), SETTLES).denoise(prefix(), Noise(1), C)
    next(steps)
    steps.close()
    assert len(started) == 2
    started.clear()
    packed = golden_model()
    nn.quantize(packed, 32, 4, class_predicate=lambda path, _: path.endswith("q_proj"))
    for draft, in Denoiser(packed, SETTLES).denoise(prefix(), Noise(1), C):
        assert len(started) == draft.step  # computed during the call: a draft would come a step late
