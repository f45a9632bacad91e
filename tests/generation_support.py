"""What the tests of generation share: a tiny pipeline folder in Stable Diffusion 3's structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from snella.data.prepared import Prepared, write_prepared
from snella.quick import generation_models as small
from snella.runs.run import Run
from snella.tasks.generation.settings import GenerationSettings

ROOT = Path(__file__).resolve().parents[1]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PROMPTS = ["a {0} {1} in the snow", "a red {0} {1}"]


def official_pipeline(folder: Path) -> Path:
    """A folder with everything that SD3-medium's has, of a few kilobytes: three text encoders with
    their tokenizers, an AutoencoderKL of 16 channels, a scheduler with shift 3."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    torch.manual_seed(0)
    vocab, _ = small.bpe()
    for name, width in (("text_encoder", 16), ("text_encoder_2", 24)):
        config = CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
            projection_dim=width, eos_token_id=vocab[small.END], bos_token_id=vocab[small.START],
        )  # fmt: skip
        CLIPTextModelWithProjection(config).save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        small.save_tokenizer(folder / name)
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    T5EncoderModel(
        T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "text_encoder_3")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    model = Tokenizer(models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=48, pooled_projection_dim=40, pos_embed_max_size=8,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=2, sample_size=64, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).save_pretrained(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    clip = ["transformers", "CLIPTextModelWithProjection"]
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.29.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def untrained_quick_pipeline(folder: Path) -> Path:
    """The quick pipeline's structure with a transformer of one narrow block."""
    torch.manual_seed(0)
    model = small.transformer(
        num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32
    )
    small.save_pipeline(folder, model, [small.text_encoder(), small.text_encoder()])
    return folder


def subject(folder: Path, size: int = 32, images: int = 3) -> Prepared:
    """A prepared subject of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (images, size, size, 3), dtype=np.uint8)
    info = {"subject": "thing", "class_word": "circle", "prompts": PROMPTS, "num_classes": 1}
    columns = {"image": pixels}
    write_prepared(folder, {"train": columns, "test": columns}, sealed=("image",), info=info)
    return Prepared.open(folder)


def settings(**changes: Any) -> GenerationSettings:
    """Settings of seconds."""
    values: dict[str, Any] = {
        "image_size": 32, "instance_prompt": "a {token} {class_word}", "max_sequence_length": 1,
        "samples_per_prompt": 2, "inference_steps": 2, "guidance": 2.0, "generation_batch": 3,
        "drift_prompts": ("a blue star",), "drift_samples": 2, **changes,
    }  # fmt: skip
    return GenerationSettings(**values)


def workplace(folder: Path) -> Path:
    """Untrained models and a subject, shared by all runs; and with them what they cache."""
    import timm

    untrained_quick_pipeline(folder / "sd3")
    torch.manual_seed(0)
    small.save_clip(folder / "clip", small.clip_model())
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    save_file(model.state_dict(), folder / "vit.safetensors")
    subject(folder / "data" / "prepared" / "thing")
    return folder


def make(place: Path, results: Path, method: str = "peft", **protocol: Any) -> Run:
    """A run of seconds in a :func:`workplace`."""
    vit = (place / "vit.safetensors").as_posix()
    own = settings(
        epoch_batches=2, clip_model=f"local-dir:{place / 'clip'}", lpips_net="dino",
        dino_model="vit_tiny_patch16_224", dino_kwargs=VIT, dino_file=vit,
        dinov2_model="vit_tiny_patch16_224", dinov2_kwargs=VIT, dinov2_file=vit,
    )  # fmt: skip
    common = {
        "steps": 4, "batch_size": 2, "accumulation": 2, "lr": 1e-2, "schedule": "constant",
        "warmup_epochs": 0, "evaluate_every": 1000, **protocol,
    }  # fmt: skip
    return Run.model_validate({
        "suite": "test",
        "backbone": {"name": "tiny", "arch": "sd3", "file": (place / "sd3").as_posix()},
        "dataset": {
            "name": "thing", "task": "generation",
            "prepared": (place / "data" / "prepared" / "thing").as_posix(),
        },
        "method": {"name": method, "file": (ROOT / "baselines" / f"{method}.py").as_posix()},
        "protocol_name": "test",
        "protocol": common,
        "settings": own.model_dump(mode="json"),
        "results": results.as_posix(),
    })  # fmt: skip


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same numbers have in common."""
    keep = ("identity", "status", "metrics", "groups", "parameters", "merge", "files")
    return {name: record[name] for name in keep}
