"""Quick generation: scenes and captions agree, words are tokens, subjects are new, recipes run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from snella.errors import UserError
from snella.quick import generation, pretrain_clip, pretrain_sd3
from snella.quick import generation_models as small
from snella.quick import generation_scenes as scenes

pytest.importorskip("diffusers")


def test_captions_say_what_is_painted() -> None:
    rng = np.random.default_rng(0)
    drawn = scenes.draw_scenes(rng, 300)
    texts = scenes.captions(rng, drawn)
    for i, text in enumerate(texts):
        words = text.split()
        assert scenes.SHAPES[drawn.shape[i]] in words
        grounds = [g for g in scenes.BACKGROUNDS if g in text]
        assert grounds in ([], [scenes.BACKGROUNDS[drawn.background[i]]])
    assert set(" ".join(texts).split()) <= set(scenes.vocabulary())
    assert not set(" ".join(texts).split()) & set(scenes.RARE_TOKENS)


def test_painting_is_the_same_every_time() -> None:
    drawn = scenes.draw_scenes(np.random.default_rng(1), 60)
    image = scenes.paint(drawn, seed=3)
    assert image.shape == (60, 3, 32, 32) and image.dtype == torch.uint8
    assert image.equal(scenes.paint(drawn, seed=3))


def test_a_named_wall_has_its_colour() -> None:
    for name, colour in scenes.COLOURS.items():
        number = scenes.BACKGROUNDS.index(f"on a {name} wall")
        image = scenes.backdrop(number, 4, torch.Generator().manual_seed(0))
        assert (image.mean((0, 2, 3)) - torch.tensor(colour)).abs().max() < 0.06


def test_every_word_is_one_token_and_others_fall_apart() -> None:
    tokenizer = small.tokenizer()
    assert all(tokenizer.tokenize(w) == [f"{w}</w>"] for w in scenes.vocabulary())
    assert len(tokenizer.tokenize("teapot")) == 6
    vocab, _ = small.bpe()
    assert vocab[small.END] == max(vocab.values()) == len(vocab) - 1
    drawn = scenes.draw_scenes(np.random.default_rng(0), 500)
    ids = small.token_ids(scenes.captions(np.random.default_rng(0), drawn))
    assert (ids[:, -1] == vocab[small.END]).all()  # no caption is cut off


def test_saved_tokenizer_reads_the_same(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    small.save_tokenizer(tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a sks circle on a checkered floor, teapot"
    assert read(text)["input_ids"] == small.tokenizer()(text)["input_ids"]
    assert read.model_max_length == small.CONTEXT


def test_subjects_have_five_pictures_on_grounds_that_no_prompt_names() -> None:
    for name, subject in generation.SUBJECTS.items():
        pixels, info = generation.make(name)
        assert pixels.shape == (5, 32, 32, 3)
        assert np.array_equal(pixels, generation.make(name)[0])
        assert subject.class_word in scenes.SHAPES and info["class_word"] == subject.class_word
    for prompt in generation.PROMPTS:
        assert not any(ground in prompt for ground in generation.GROUNDS)
    known = set(scenes.vocabulary())
    assert all(set(p.format("sks", "star").split()) <= known for p in generation.PROMPTS)
    with pytest.raises(UserError, match=r"Unknown quick subject 'robbot'. Did you mean 'robot'"):
        generation.make("robbot")


def test_recipes_write_what_the_suite_reads(tmp_path: Path) -> None:
    from snella.tasks.generation.features import Clip
    from snella.tasks.generation.pipeline import PipelineFolder

    cpu = torch.device("cpu")
    recipe = pretrain_sd3.Recipe(scenes=32, steps=2, batch_size=4)
    record = pretrain_sd3.pretrain(recipe, tmp_path / "sd3", cpu)
    assert record["recipe"]["steps"] == 2
    assert json.loads((tmp_path / "sd3" / "recipe.json").read_text()) == record
    assert PipelineFolder(tmp_path / "sd3").transformer().config.sample_size == 32
    pretrain_clip.pretrain(
        pretrain_clip.Recipe(scenes=32, steps=2, batch_size=4), tmp_path / "clip", cpu
    )
    assert Clip(f"local-dir:{tmp_path / 'clip'}", None).texts(["a star"]).shape == (1, 64)


def test_the_pixel_codec_keeps_pixels() -> None:
    codec = small.PixelCodec()
    x = torch.rand(2, 3, 32, 32)
    assert codec.decode(codec.encode(x).latent_dist.mode()).sample.equal(x)


RESOURCES = Path(__file__).resolve().parents[1] / "workflow" / "resources"


def test_the_shipped_model_paints_what_a_prompt_says(tmp_path: Path) -> None:
    """A wall has the colour, and the object lies on the side, that the prompt asks for."""
    from snella.tasks.generation.encode import encode_prompts
    from snella.tasks.generation.pipeline import PipelineFolder
    from snella.tasks.generation.sample import Sampling, generate, jobs, read_png

    folder = PipelineFolder(RESOURCES / "sd3_quick")
    model = folder.transformer()
    prompts = [f"a red circle on a {wall} wall {side}" for wall in ("blue", "yellow")
               for side in ("on the left", "on the right")]  # fmt: skip
    encoded = encode_prompts(folder, model, [*prompts, ""], 1, "fp32", tmp_path)
    wanted = jobs(tmp_path, "test", prompts, 1)
    generate(folder, model, folder.vae(), encoded, wanted, Sampling(32, 8, 3.0, "", 4))
    for prompt, job in zip(prompts, wanted, strict=True):
        image = read_png(job.file).astype(float) / 255
        wall = torch.tensor(image[-3:]).mean((0, 1))
        names = {n: (torch.tensor(c) - wall).abs().sum() for n, c in scenes.COLOURS.items()}
        assert min(names, key=names.__getitem__) in prompt
        red = (image[..., 0] - image[..., 1:].max(-1)).clip(0).sum(0)
        assert (red[:16].sum() > red[16:].sum()) == ("on the left" in prompt)


def test_the_shipped_clip_tells_grounds_apart() -> None:
    from snella.tasks.generation.features import Clip

    clip = Clip(f"local-dir:{RESOURCES / 'clip_quick'}", None)
    grounds = list(scenes.SCENERY)
    pixels = generation.pictures(generation.SUBJECTS["robot"], tuple(grounds))
    found = (clip.images(list(pixels)) @ clip.texts([f"a square {g}" for g in grounds]).T).argmax(1)
    assert (found == torch.arange(len(grounds))).float().mean() >= 0.9
