"""The small models of quick generation: a Stable Diffusion 3 and a CLIP of the libraries' classes.

The text-to-image model is a folder in diffusers' layout of ``StableDiffusion3Pipeline``: an
``SD3Transformer2DModel`` of 3 million parameters, two tiny CLIP text encoders, no third one (as in
SD3 without T5), a flow-matching scheduler, and in the VAE's place a codec that keeps pixels as
they are. The tokenizer is a real CLIP tokenizer whose merges make each word of the scenes one
token; other words fall apart into letters.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from snella.files import atomic, write_json, write_text
from snella.quick.generation_scenes import vocabulary

CONTEXT = 20
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
TRANSFORMER: dict[str, Any] = {
    "sample_size": 32, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 5,
    "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128,
    "joint_attention_dim": 2 * TEXT_WIDTH, "pooled_projection_dim": 2 * TEXT_WIDTH,
    "pos_embed_max_size": 8,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32, "patch_size": 4, "width": 128, "layers": 4, "head_width": 32,
    },
    "text_cfg": {
        "context_length": CONTEXT, "width": 128, "heads": 4, "layers": 2,
        "hf_tokenizer_name": "this folder",
    },
}  # fmt: skip


class PixelCodec(ModelMixin, ConfigMixin):
    """Pixels as latents, behind the interface of diffusers' ``AutoencoderKL``."""

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (3,),
        scaling_factor: float = 1.4,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # gives dtype and device

    def encode(self, x: Tensor) -> Any:
        """A latent distribution without spread: images (n, 3, H, W) in [-1, 1]."""
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: x, sample=lambda generator=None: x)
        )

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Images of latents (n, 3, H, W)."""
        return SimpleNamespace(sample=z) if return_dict else (z,)


# ------------------------------------------------------------------------------------ tokenizer


def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a CLIP tokenizer that knows the scenes' words as one token each.

    A word is merged from its end, one letter at a time, so that merges of different words never
    compete: the right half of every merge ends the word.
    """
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)]
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in vocabulary():
        tail = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            merges[letter, tail] = None
            tail = letter + tail
    names += ["".join(pair) for pair in merges]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    vocab |= {START: len(vocab), END: len(vocab) + 1}
    return vocab, list(merges)


def tokenizer() -> Any:
    """The CLIP tokenizer of the small models."""
    from transformers import CLIPTokenizer

    vocab, merges = bpe()
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=CONTEXT,
    )


def token_ids(texts: list[str]) -> Tensor:
    """Token numbers of ``texts``, int64 (N, CONTEXT)."""
    found = tokenizer()(texts, padding="max_length", truncation=True, max_length=CONTEXT)
    return torch.tensor(found["input_ids"])


# --------------------------------------------------------------------------------------- models


def text_encoder() -> Any:
    """A fresh CLIP text encoder of 2 layers and width 64, as in SD3."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vocab, _ = bpe()
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
        projection_dim=TEXT_WIDTH, bos_token_id=vocab[START], eos_token_id=vocab[END],
        pad_token_id=vocab[END],
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def transformer(**changes: Any) -> Any:
    """A fresh SD3 transformer."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**{**TRANSFORMER, **changes})


def clip_model() -> Any:
    """A fresh open_clip model."""
    import open_clip

    config = clip_config()
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def clip_config() -> dict[str, Any]:
    """The open_clip ``model_cfg`` of the small CLIP."""
    return {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": len(bpe()[0])}}


def text_features(encoders: list[Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token features (n, CONTEXT, 128) and pooled ones (n, 128), as SD3's pipeline joins them."""
    found = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([out.hidden_states[-2] for out in found], -1)
    return tokens, torch.cat([out.text_embeds for out in found], -1)


# ---------------------------------------------------------------------------------------- files


def save_pipeline(folder: Path, model: Any, encoders: list[Any]) -> None:
    """Write a folder in the layout of ``StableDiffusion3Pipeline``; weights in half precision."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model.half().save_pretrained(folder / "transformer")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
        encoder.half().save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(folder / name)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.save_pretrained(folder / "scheduler")
    PixelCodec().half().save_pretrained(folder / "vae")
    clip = ["transformers", "CLIPTextModelWithProjection"]
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["snella.quick.generation_models", "PixelCodec"],
    }
    write_json(folder / "model_index.json", index)


def save_clip(folder: Path, model: nn.Module) -> None:
    """Write a folder that open_clip reads with its ``local-dir:`` prefix."""
    from safetensors.torch import save_file

    content = {
        "model_cfg": clip_config(),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
    }
    write_json(folder / "open_clip_config.json", content)
    weights = {n: t.half().contiguous() for n, t in model.state_dict().items()}
    with atomic(folder / "open_clip_model.safetensors") as temporary:
        save_file(weights, temporary)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer in CLIP's own files, which every version of transformers reads."""
    vocab, merges = bpe()
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    write_text(folder / "merges.txt", "\n".join(lines))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {**special, "model_max_length": CONTEXT, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
