"""The reference: DiffusionGemma of transformers, on random checkpoints and driven as its own ``generate`` drives it.

Its plain ``forward`` builds the encoder's masks and does not use them. ``generate`` makes the masks with the functions
that ``Reference`` calls here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from numpy.typing import NDArray

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
reference: Any = pytest.importorskip("transformers.models.diffusion_gemma")
generation: Any = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")

Array = NDArray[Any]
torch.set_num_threads(1)  # the models are tiny
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CANVAS = 16
WINDOW = 8
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4096,
    "use_bidirectional_attention": "vision",
}
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
}


def write_checkpoint(
    folder: Path, seed: int, *, branch: float = 1.0, canvas_length: int = CANVAS, **shape: Any
) -> None:
    """Save a model whose text weights are all random, including those that are usually one or zero.

    ``branch`` scales the output of each residual branch. With 1, the network mixes so strongly that self-conditioning
    multiplies rounding noise by ten in each step, which is too much for a whole generation.
    """
    config = transformers.DiffusionGemmaConfig(
        text_config=reference.DiffusionGemmaTextConfig(**{**SHAPE, **shape}),
        vision_config=VISION,
        canvas_length=canvas_length,
        image_token_id=93,
        boi_token_id=94,
        eoi_token_id=95,
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    torch.manual_seed(seed)
    scalars = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *scalars]:
            if weight.ndim >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            else:
                weight.normal_(1, 0.2)
            if "q_norm" in name:
                weight.mul_(len(weight) ** -0.5)
            elif "post_attention_layernorm" in name or name.endswith("post_feedforward_layernorm.weight"):
                weight.mul_(branch)
    model.save_pretrained(folder)


def publish(saved: Path, folder: Path, vision: dict[str, Any] | str | None = "missing") -> None:
    """Rewrite a saved checkpoint in the layout of the published one.

    The config has flat keys for full-attention layers. There are no tied copies and no vision tensors. ``vision`` is
    the value of ``vision_config``, or "missing" to leave the key out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((saved / "config.json").read_text())
    text = config["text_config"]
    full = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = full["head_dim"]
    text["num_global_key_value_heads"] = full.get("num_key_value_heads", text["num_key_value_heads"])
    text.setdefault("final_logit_softcapping", 30.0)
    config["vision_config"] = vision
    if vision == "missing":
        del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = mx.load(str(saved / "model.safetensors"))
    assert isinstance(tensors, dict)
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("model.decoder.")
        or (name.startswith("model.encoder.language_model.") and name.endswith(".layer_scalar"))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), own, metadata={"format": "pt"})


class Reference:
    """A checkpoint that is loaded in the reference, with the cache of one prefix."""

    def __init__(self, folder: Path) -> None:
        loaded = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, dtype=torch.float32
        )
        self.model = loaded.eval()
        self.vocab_size: int = self.model.config.text_config.vocab_size

    def start(self, left_padding: Sequence[int]) -> None:
        """Start a new prefix whose row b has ``left_padding[b]`` positions of padding before its text."""
        self._cache = transformers.DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._left_padding = torch.tensor(left_padding)[:, None]

    def _attention_mask(self, length: int) -> Any:
        return torch.arange(length) >= self._left_padding  # (B, length)

    def encode(self, ids: Array) -> Array:
        """Append ids (B, L) to the prefix and return the hidden states (B, L, M)."""
        encoder = self.model.model.encoder
        begin = self._cache.get_seq_length()
        end = begin + ids.shape[1]
        positions = torch.arange(begin, end)[None]
        with torch.no_grad():
            masks = encoder.create_masks_for_generate(
                config=self.model.config,
                inputs_embeds=torch.empty(*ids.shape, 0),
                attention_mask=self._attention_mask(end),
                cache=self._cache,
                position_ids=positions,
            )
            out = encoder(
                input_ids=torch.tensor(ids), attention_mask=masks, cache=self._cache, position_ids=positions
            )
        hidden: Array = out.last_hidden_state.numpy()
        return hidden

    def decode(self, canvas: Array, self_conditioning: Array | None = None) -> Array:
        """Decode a canvas (B, C) after the prefix and return the logits (B, C, V)."""
        end = self._cache.get_seq_length() + canvas.shape[1]
        with torch.no_grad():
            masks = self.model.model.decoder.create_diffusion_decoder_attention_mask(
                config=self.model.config,
                inputs_embeds=torch.tensor(canvas)[..., None],
                cache=self._cache,
                decoder_attention_mask=self._attention_mask(end),
            )
            out = self.model(
                decoder_input_ids=torch.tensor(canvas),
                decoder_attention_mask=masks,
                cache=self._cache,
                self_conditioning_logits=None if self_conditioning is None else torch.tensor(self_conditioning),
            )
        logits: Array = out.logits.numpy()
        return logits


@dataclass
class Step:
    """One denoising step of a batch in the reference.

    Attributes:
        argmax_canvas: Most probable ids, (B, C).
        current_canvas: The canvas after the step, (B, C).
        accepted_mask: Accepted positions, (B, C).
        entropy: Entropy of each position in nats, (B, C).
        logits: Logits divided by the temperature, (B, C, V).
        finished: Whether each row has stopped, (B,).
    """

    argmax_canvas: Array
    current_canvas: Array
    accepted_mask: Array
    entropy: Array
    logits: Array
    finished: Array


@dataclass
class Generation:
    """A whole generation in the reference.

    Attributes:
        canvases: The denoising steps of each canvas.
        sequences: Ids of prompt and answer, (B, L).
        tokens_per_forward: Generated tokens per denoising step, (B,).
    """

    canvases: list[list[Step]]
    sequences: Array
    tokens_per_forward: Array


def generate(
    model: Any, ids: Array, canvases: Array, uniforms: Array, attention_mask: Array | None = None, **options: Any
) -> Generation:
    """Run the reference's ``generate`` with given randomness.

    ``canvases`` (n, B, C) are the random ids that it starts from. ``uniforms`` (n, B, C) are the numbers from which it
    samples by inversion of the cumulative distribution.
    """
    next_canvas, next_uniform = iter(canvases), iter(uniforms)
    steps: list[list[Step]] = []
    denoising_step = model._denoising_step

    def recorded(**arguments: Any) -> Any:
        out = current, argmax, logits, finished = denoising_step(**arguments)
        if arguments["self_conditioning_logits"] is None:
            steps.append([])
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        accepted = arguments["sampler"].accepted_token_mask
        steps[-1].append(Step(*(x.clone().numpy() for x in (argmax, current, accepted, entropy, logits, finished))))
        return out

    def multinomial(p: Any, num_samples: int) -> Any:
        assert num_samples == 1
        cumulative = p.double().cumsum(-1)
        u = torch.tensor(next(next_uniform)).reshape(-1, 1).double()
        return (cumulative > u * cumulative[:, -1:]).int().argmax(-1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation.EntropyBoundSampler, "initialize_canvas", lambda *_, **__: torch.tensor(next(next_canvas))
        )
        patch.setattr(torch, "multinomial", multinomial)
        patch.setattr(model, "_denoising_step", recorded)
        if attention_mask is not None:
            options["attention_mask"] = torch.tensor(attention_mask)
        if "entropy_bound" in options:
            options["sampler_config"] = generation.EntropyBoundSamplerConfig(options.pop("entropy_bound"))
        out = model.generate(torch.tensor(ids), **options)
    return Generation(steps, out.sequences.numpy(), out.tokens_per_forward.numpy())
