"""Samplers that were tried and that no speed mode uses. ``answers.py`` measures them by name (``--ways``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.ancestral import Ancestral, leave_one_out
from dgemma_mlx.diffusion.sampler import EntropyBound, Noise, Proposal, accept_free
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.speed import SPEEDS, Speed

BALANCED = SPEEDS["balanced"]


@dataclass(frozen=True)
class AdaptiveBound:
    """Accepts within a bound that grows with the step k, with the entropies H, or by a number of positions.

    The bound is entropy_bound * (1 + growth * (k - 1)) + share * sum(H), and at least what k * quota positions need.

    Attributes:
        growth: Growth of the bound with each step, as a share of the checkpoint's.
        share: Share of the entropy of all positions that a step accepts in addition.
        quota: Number of positions that each step accepts in addition to those of the step before it.
    """

    growth: float = 0.0
    share: float = 0.0
    quota: int = 0

    def __call__(self, proposal: Proposal, noise: Noise, config: GenerationConfig) -> tuple[mx.array, mx.array]:
        """Accept the most certain positions within the bound, and fill all others with uniform noise."""
        entropy, k = proposal.sample.entropy, proposal.number  # pinned positions have no entropy
        bound = config.entropy_bound * (1 + self.growth * (k - 1)) + self.share * entropy.sum(axis=-1, keepdims=True)
        least = mx.sort(entropy, axis=-1)[:, : max(0, k * self.quota - 1)].sum(axis=-1, keepdims=True)
        accepted_mask = accept_free(proposal, mx.maximum(bound, least))
        fresh = noise.canvas(*proposal.raw.shape[1:])
        return mx.where(accepted_mask, proposal.denoiser_canvas, fresh), accepted_mask


@dataclass(frozen=True)
class LeaveOneOutBound:
    """Accepts by the entropy of a prediction that does not see what stands at its own position.

    The share of clean ids is taken to be the share of ids of the canvas that the network would write again.

    Attributes:
        scale: Factor on what is left out of the logit of the present id; 1 leaves out all of it.
        factor: Factor on the checkpoint's ``entropy_bound``.
    """

    scale: float
    factor: float = 1.0

    def __call__(self, proposal: Proposal, noise: Noise, config: GenerationConfig) -> tuple[mx.array, mx.array]:
        """Accept the positions that are certain without themselves, and fill all others with uniform noise."""
        logits, sample, canvas = proposal.raw.astype(mx.float32), proposal.sample, proposal.canvas
        if proposal.softcap is not None:
            logits = proposal.softcap * mx.tanh(logits / proposal.softcap)
        logits = logits / temperature(config.max_denoising_steps + 1 - proposal.number, config)
        rows = zip(logits, canvas, (canvas == sample.argmax).mean(axis=-1).tolist(), strict=True)
        left_out = mx.stack([leave_one_out(z, ids, min(alpha, 0.98)) for z, ids, alpha in rows])
        left_out = self.scale * left_out + (1 - self.scale) * logits
        log_probs = left_out - mx.logsumexp(left_out, axis=-1, keepdims=True)
        entropy = mx.maximum(-(mx.exp(log_probs) * log_probs).sum(axis=-1), sample.entropy)
        entropy = entropy if proposal.free is None else mx.where(proposal.free, entropy, 0)
        unseen = proposal._replace(sample=sample._replace(entropy=entropy))
        return EntropyBound(self.factor)(unseen, noise, config)


CANDIDATES: dict[str, Speed] = {
    "ddim4": replace(BALANCED, sampler=Ancestral(4)),
    "ddim8": replace(BALANCED, sampler=Ancestral(8)),
    "ddim16": replace(BALANCED, sampler=Ancestral(16)),
    "corrector8": replace(BALANCED, sampler=Ancestral(8, corrector_steps=1, corrector_k=4)),
    "bound3": replace(BALANCED, sampler=EntropyBound(3)),
    "bound10": replace(BALANCED, sampler=EntropyBound(10)),
    "ramp4": replace(BALANCED, sampler=EntropyBound(ramp=4)),
    "ramp8": replace(BALANCED, sampler=EntropyBound(ramp=8)),
    "ramp4bound3": replace(BALANCED, sampler=EntropyBound(3, ramp=4)),
    "ramp8bound10": replace(BALANCED, sampler=EntropyBound(10, ramp=8)),
    "ramp4gap8": replace(BALANCED, sampler=EntropyBound(ramp=4), gap=0.8),
    "growing": replace(BALANCED, sampler=AdaptiveBound(growth=0.5)),
    "share": replace(BALANCED, sampler=AdaptiveBound(share=0.1)),
    "leftout": replace(BALANCED, sampler=LeaveOneOutBound(0.2)),
    "leftout10": replace(BALANCED, sampler=LeaveOneOutBound(0.1, factor=10)),
    "momentum3": replace(BALANCED, momentum=0.3),
    "quota": replace(BALANCED, sampler=AdaptiveBound(quota=4)),
    "corrector16": replace(BALANCED, sampler=Ancestral(16, corrector_steps=1, corrector_k=4)),
}
SPEEDS.update(CANDIDATES)  # so that ``generate`` finds them
