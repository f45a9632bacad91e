"""A pipeline folder in the official structure: reading, caching, sampling, resuming, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_support import official_pipeline, settings, subject, untrained_quick_pipeline

from snella.errors import UserError
from snella.tasks.base import Backbone
from snella.tasks.generation.encode import encode_images, encode_prompts, square
from snella.tasks.generation.pipeline import PipelineFolder
from snella.tasks.generation.sample import Sampling, decode, generate, jobs, read_png
from snella.tasks.generation.task import Generation

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_pipeline(tmp_path_factory.mktemp("sd3"))


def test_everything_equals_diffusers_own_pipeline(folder: Path, tmp_path: Path) -> None:
    """Same prompts, same noise: the images of our parts are those of the whole pipeline."""
    from diffusers import StableDiffusion3Pipeline

    whole = StableDiffusion3Pipeline.from_pretrained(folder)
    whole.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "a blue star"]
    wanted = jobs(tmp_path, "thing", prompts, 1)
    theirs = whole(
        prompts, height=64, width=64, num_inference_steps=3, guidance_scale=4.0,
        max_sequence_length=8, output_type="np",
        generator=[torch.Generator().manual_seed(job.seed) for job in wanted],
    ).images  # fmt: skip

    opened = PipelineFolder(folder)
    model = opened.transformer()
    encoded = encode_prompts(opened, model, [*prompts, ""], 8, "fp32", tmp_path / "cache")
    assert generate(
        opened, model, opened.vae(), encoded, wanted, Sampling(64, 3, 4.0, "", 2)
    ) == len(prompts)
    for job, image in zip(wanted, theirs, strict=True):
        np.testing.assert_allclose(read_png(job.file) / 255, image, atol=1 / 255)


def test_latents_equal_the_vae(folder: Path, tmp_path: Path) -> None:
    opened = PipelineFolder(folder)
    image = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    latents = encode_images(opened, [image], 64, tmp_path)
    vae = opened.vae()
    pixels = torch.from_numpy(square(image, 64).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        expected = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents.mean, expected.mean)
    torch.testing.assert_close(latents.std, expected.std)
    drawn = latents.draw([0], torch.Generator().manual_seed(0))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    normalised = (expected.mean + expected.std * noise - 0.0609) * 1.5305
    torch.testing.assert_close(drawn, normalised)


def test_what_is_encoded_once_is_not_encoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = PipelineFolder(folder)
    model = opened.transformer()
    first = encode_prompts(opened, model, ["a star", ""], 8, "fp32", tmp_path)
    monkeypatch.setattr(PipelineFolder, "with_text_encoders", None)
    again = encode_prompts(opened, model, ["a star", ""], 8, "fp32", tmp_path)
    assert first.tokens.equal(again.tokens) and first.tokens.shape == (2, 77 + 8, 48)
    with pytest.raises(TypeError):
        encode_prompts(opened, model, ["another"], 8, "fp32", tmp_path)


def test_what_is_cached_depends_on_the_text_encoders_that_are_used(
    folder: Path, tmp_path: Path
) -> None:
    """Leaving out the third one, files and all in their place, is another language."""
    null = [None, None]
    without = edited_index(folder, tmp_path / "sd3", text_encoder_3=null, tokenizer_3=null)
    data = subject(tmp_path / "data" / "prepared" / "x")
    chosen = settings(image_size=64, max_sequence_length=8)
    models = [Backbone(name="t", arch="sd3", file=str(place)) for place in (folder, without)]
    first, second = Generation(data, chosen, 2), Generation(data, chosen, 2)
    for task, backbone in zip((first, second), models, strict=True):
        task.build_model(backbone)
    assert first.encoded.tokens[:, 77:].any() and not second.encoded.tokens[:, 77:].any()
    assert set(first._base_folders.values()).isdisjoint(second._base_folders.values())


def test_the_vae_leaves_the_device_after_sampling(folder: Path, tmp_path: Path) -> None:
    """Training needs its room, and its memory must not depend on what was cached."""
    opened, places = PipelineFolder(folder), []
    model, vae = opened.transformer(), opened.vae()
    move = type(vae).to
    vae.to = lambda place: (places.append(torch.device(place).type), move(vae, place))[1]
    encoded = encode_prompts(opened, model, ["a star", ""], 8, "fp32", tmp_path / "cache")
    wanted = jobs(tmp_path / "images", "thing", ["a star"], 1)
    generate(opened, model, vae, encoded, wanted, Sampling(64, 1, 1.0, "", 1))
    assert places == ["cpu", "cpu"] and wanted[0].file.is_file()


def test_interrupted_sampling_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    made = untrained_quick_pipeline(tmp_path / "sd3")
    data = subject(tmp_path / "data" / "prepared" / "x")
    task = Generation(data, settings(), 2)
    model = task.build_model(Backbone(name="t", arch="sd3", file=str(made)))
    assert task.predict(model, "test", tmp_path / "a") == 2 * 2 + 2
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 2 * 6
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    gone = tmp_path / "b" / "images" / "p000_s1.png"
    gone.unlink()
    kept = tmp_path / "b" / "images" / "p000_s0.png"
    stamp = kept.stat().st_mtime_ns
    assert task.predict(model, "test", tmp_path / "b") == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert kept.stat().st_mtime_ns == stamp
    # the unadapted model's images lie beside the model's own, which is unadapted here
    same = [tmp_path / "a" / d / "drift" / "p000_s0.png" for d in (".", "base")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_seeds_belong_to_subject_prompt_and_sample(tmp_path: Path) -> None:
    first = jobs(tmp_path, "dog", ["a", "b"], 2)
    assert len({job.seed for job in first}) == 4
    assert [j.seed for j in jobs(tmp_path, "dog", ["b"], 2)] == [j.seed for j in first[2:]]
    assert {j.seed for j in jobs(tmp_path, "cat", ["a", "b"], 2)}.isdisjoint(j.seed for j in first)


def test_nan_is_one_clear_line(folder: Path) -> None:
    vae = PipelineFolder(folder).vae()
    with pytest.raises(UserError, match="generates NaN: half precision"):
        decode(vae, torch.full((1, 16, 8, 8), float("nan")))


def edited_index(folder: Path, out: Path, **changes: object) -> Path:
    shutil.copytree(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index | changes))
    return out


def test_sd3_without_its_third_encoder(folder: Path, tmp_path: Path) -> None:
    null = [None, None]
    made = edited_index(folder, tmp_path / "sd3", text_encoder_3=null, tokenizer_3=null)
    shutil.rmtree(made / "text_encoder_3")
    opened = PipelineFolder(made)
    model = opened.transformer()
    found = encode_prompts(opened, model, ["a star"], 8, "fp32", tmp_path)
    assert found.tokens.shape == (1, 85, 48) and not found.tokens[:, 77:].any()


def test_other_folders_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a pipeline folder: set `file:`"):
        PipelineFolder(None)
    with pytest.raises(UserError, match="is missing; download it"):
        PipelineFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no model_index.json.*from_single_file"):
        PipelineFolder(tmp_path / "empty")
    (tmp_path / "sd3_medium.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"sd3_medium.safetensors has no .*from_single_file"):
        PipelineFolder(tmp_path / "sd3_medium.safetensors")
    flux = edited_index(folder, tmp_path / "flux", _class_name="FluxPipeline")
    with pytest.raises(UserError, match="holds a FluxPipeline; generation trains a Stable"):
        PipelineFolder(flux)
    (flux / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index.json is damaged"):
        PipelineFolder(flux)
    alone = edited_index(folder, tmp_path / "alone", tokenizer_3=[None, None])
    with pytest.raises(UserError, match="names text_encoder_3 alone"):
        PipelineFolder(alone)
    other = edited_index(folder, tmp_path / "other", vae=["os", "system"])
    with pytest.raises(UserError, match="vae is of the unknown library 'os'"):
        PipelineFolder(other).vae()


def edited_config(folder: Path, part: str, **changes: object) -> None:
    file = folder / part / ("tokenizer_config.json" if "tokenizer" in part else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vae", {"latent_channels": 4}, "in_channels is 16, the vae's latent_channels 4"),
        ("text_encoder", {"projection_dim": 9}, "projection_dim is 40, the text encoders' .* 33"),
        ("text_encoder", {"hidden_size": 99}, "joint_attention_dim is 48, .* hidden_size .* 123"),
        ("text_encoder_3", {"d_model": 64}, "joint_attention_dim is 48, the text_encoder_3's .*64"),
        ("tokenizer_2", {"model_max_length": 99}, "tokenizer_2's model_max_length is 99, .* 77"),
    ],
)
def test_parts_of_different_models_are_refused(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, object], message: str
) -> None:
    made = edited_index(folder, tmp_path / "sd3")
    edited_config(made, part, **changes)
    with pytest.raises(UserError, match=f"{message}; its parts are of different models"):
        PipelineFolder(made)


def test_parts_of_another_class_are_refused(folder: Path, tmp_path: Path) -> None:
    for part, cls in (("transformer", "FluxTransformer2DModel"), ("scheduler", "DDIMScheduler")):
        made = edited_index(folder, tmp_path / part, **{part: ["diffusers", cls]})
        with pytest.raises(UserError, match=f"{part} is a {cls}; Stable Diffusion 3 has a "):
            PipelineFolder(made)


def test_a_tokenizer_without_words_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would make one that reads every text alike."""
    made = edited_index(folder, tmp_path / "sd3")
    (made / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(UserError, match="tokenizer_2 holds no words"):
        PipelineFolder(made)


def test_larger_images_than_the_table_of_positions(folder: Path) -> None:
    """Positions lie closer over the same range; the smaller size is what it was."""
    opened = PipelineFolder(folder)
    plain, same, large = (opened.transformer("fp32", size) for size in (None, 128, 256))
    table = plain.pos_embed.pos_embed
    assert table.shape == (1, 8 * 8, 32) and same.pos_embed.pos_embed.equal(table)
    finer = large.pos_embed.pos_embed.view(16, 16, 32)
    torch.testing.assert_close(finer[::2, ::2], table.view(8, 8, 32))
    batch = {"encoder_hidden_states": torch.zeros(1, 3, 48), "timestep": torch.ones(1),
             "pooled_projections": torch.zeros(1, 40)}  # fmt: skip
    with torch.inference_mode():
        made = large(hidden_states=torch.zeros(1, 16, 32, 32), **batch).sample
    assert made.shape == (1, 16, 32, 32)
    copy = type(large)(**large.config)  # as an exported transformer is read
    copy.load_state_dict(large.state_dict())


@pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder_3", "tokenizer", "vae"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    made = edited_index(folder, tmp_path / "sd3")
    shutil.rmtree(made / part)
    with pytest.raises(UserError, match=f"has no {part} "):
        PipelineFolder(made)


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    made = edited_index(folder, tmp_path / "sd3")
    (made / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be loaded as SD3Transformer2DModel"):
        PipelineFolder(made).transformer()


def test_a_size_that_does_not_fit(tmp_path: Path) -> None:
    made = untrained_quick_pipeline(tmp_path / "sd3")
    data = subject(tmp_path / "data" / "prepared" / "x")
    task = Generation(data, settings(image_size=30), 2)
    with pytest.raises(UserError, match="`image_size: 30` does not fit the pipeline"):
        task.build_model(Backbone(name="t", arch="sd3", file=str(made)))
