"""Ancestral sampling of the uniform process, and its leave-one-out predictor-corrector.

Reference: diffusers ``DiscreteDDIMScheduler`` and the budget split of its ``DiffusionGemmaPipeline``; Austin et al.,
arXiv 2107.03006; arXiv 2605.22765.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import Noise, Proposal


@dataclass(frozen=True)
class Ancestral:
    """Draws the next canvas from the posterior of the uniform process, whose clean share grows by the same each step.

    With a corrector, the first predictor steps are followed by sweeps that draw the least certain ids again. After
    ``steps`` steps the canvas holds no noise: every further step reads the proposal of the step before it.

    Attributes:
        steps: Number of steps, predictor and corrector together, until the canvas is clean.
        corrector_steps: Number of corrector sweeps after a predictor step, each a step of its own.
        corrector_k: Number of positions that a sweep draws again.
        tau: Temperature at which a sweep chooses its positions; lower is greedier.
    """

    steps: int
    corrector_steps: int = 0
    corrector_k: int = 1
    tau: float = 1.0

    def plan(self, number: int) -> tuple[int, int, bool]:
        """Return the predictor step of step ``number`` (from 1), the number of predictor steps, and if it corrects."""
        each = 1 + self.corrector_steps
        corrected = (self.steps - 1) // each if self.corrector_steps else 0
        predictor_steps = self.steps - corrected * self.corrector_steps
        index = min(number, self.steps) - 1
        if index < corrected * each:
            return index // each, predictor_steps, index % each > 0
        return index - corrected * self.corrector_steps, predictor_steps, False

    def __call__(self, proposal: Proposal, noise: Noise, config: GenerationConfig) -> tuple[mx.array, mx.array]:
        """Take the most probable id, keep the present one, or draw a random one, at every position."""
        index, predictor_steps, corrects = self.plan(proposal.number)
        (C, V), alpha_s = proposal.raw.shape[1:], (index + 1) / predictor_steps
        u = noise.uniform(C)
        if corrects:
            logits = proposal.raw.astype(mx.float32)
            if proposal.softcap is not None:
                logits = proposal.softcap * mx.tanh(logits / proposal.softcap)
            conditional = conditional_log_probs(logits, proposal.canvas, alpha_s)
            accepted_mask = self._chosen(conditional, proposal, u)
            drawn = _draw(mx.exp(conditional), noise.uniform(C))
            return mx.where(accepted_mask, drawn, proposal.canvas), accepted_mask
        clean = proposal.sample.argmax
        canvas = posterior(proposal.canvas, clean, index / predictor_steps, alpha_s, V, u, noise.canvas(C, V))
        accepted_mask = canvas == clean
        return canvas, accepted_mask if proposal.free is None else accepted_mask & proposal.free

    def _chosen(self, conditional: mx.array, proposal: Proposal, u: mx.array) -> mx.array:
        """Return the positions (B, C) bool that a sweep draws again: a Gumbel top-k of small log margins."""
        keys = -log_margin(conditional, proposal.canvas) / self.tau - mx.log(-mx.log(u))
        if proposal.free is not None:
            keys = mx.where(proposal.free, keys, -mx.inf)
        rank = mx.argsort(mx.argsort(-keys, axis=-1), axis=-1)
        chosen = rank < self.corrector_k
        return chosen if proposal.free is None else chosen & proposal.free


def posterior(
    canvas: mx.array, clean: mx.array, alpha_t: float, alpha_s: float, V: int, u: mx.array, fresh: mx.array
) -> mx.array:
    """Draw a canvas (B, C) from q(x_s | x_t, x_0) of the uniform process with shares alpha of clean ids.

    ``canvas`` is x_t and ``clean`` x_0. ``u`` (B, C) in [0, 1) chooses among the clean id, the present one, and a
    ``fresh`` one, in this order.
    """
    survival = alpha_t / alpha_s
    to_clean = alpha_s * (1 - survival) / V + survival * alpha_s * (canvas == clean)
    stay = survival * (1 - alpha_s) / V
    target = u * (to_clean + stay + (1 - survival) * (1 - alpha_s) / V)
    return mx.where(target < to_clean, clean, mx.where(target < to_clean + stay, canvas, fresh))


def leave_one_out(logits: mx.array, canvas: mx.array, alpha: float) -> mx.array:
    """Return logits (B, C, V) float32 that do not see what stands at their own position, up to a constant.

    ``canvas`` (B, C) holds the ids that the step has read, of which a share ``alpha`` below 1 is clean (equation 13
    of arXiv 2605.22765).
    """
    delta = math.log1p(logits.shape[-1] * alpha / (1 - alpha))
    own = mx.take_along_axis(logits, canvas[..., None], axis=-1)
    return mx.put_along_axis(logits, canvas[..., None], own - delta, axis=-1)


def conditional_log_probs(logits: mx.array, canvas: mx.array, alpha: float) -> mx.array:
    """Return log(alpha * p + (1 - alpha) / V), (B, C, V), in which p is the leave-one-out prediction.

    ``alpha`` is above 0 and below 1.
    """
    left_out = leave_one_out(logits, canvas, alpha)
    log_probs = left_out - mx.logsumexp(left_out, axis=-1, keepdims=True)
    uniform = math.log1p(-alpha) - math.log(logits.shape[-1])
    return mx.logaddexp(log_probs + math.log(alpha), mx.array(uniform))


def log_margin(log_probs: mx.array, canvas: mx.array) -> mx.array:
    """Return by how much the log-probability of the present id exceeds that of the best other one, (B, C)."""
    own = mx.take_along_axis(log_probs, canvas[..., None], axis=-1)
    others = mx.put_along_axis(log_probs, canvas[..., None], mx.array(-mx.inf), axis=-1)
    return own[..., 0] - others.max(axis=-1)


def _draw(probs: mx.array, u: mx.array) -> mx.array:
    """Draw an id at every position from probabilities (B, C, V) by inverting the CDF at ``u`` (B, C)."""
    cumulative = mx.cumsum(probs, axis=-1)
    drawn = (cumulative <= u[..., None] * cumulative[..., -1:]).sum(axis=-1)
    return mx.minimum(drawn, probs.shape[-1] - 1).astype(mx.int32)
