"""Each metric on cases whose value is known, and against libraries where they have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_support import PROMPTS, settings, subject
from PIL import Image
from safetensors.torch import save_file

from snella.errors import UserError
from snella.quick import generation_models as small
from snella.tasks.generation import metrics
from snella.tasks.generation.features import Clip, Perceptual, TimmFeatures, map_distance
from snella.tasks.generation.sample import jobs, write_png
from snella.tasks.generation.score import SubjectScorer

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_vendi_score_counts_different_things() -> None:
    assert metrics.vendi(np.tile(unit(1, 8), (5, 1))) == pytest.approx(1.0)
    assert metrics.vendi(np.eye(6)) == pytest.approx(6.0)
    assert metrics.vendi(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3.0)
    assert metrics.vendi(np.eye(3, 9)) == pytest.approx(3.0)  # fewer images than features
    assert metrics.vendi(unit(50, 4)) <= 4.0


def test_vendi_score_equals_the_library() -> None:
    from vendi_score import vendi

    x = unit(7, 5)
    assert metrics.vendi(x) == pytest.approx(vendi.score_K(x @ x.T), rel=1e-6)


def test_similarities_of_known_features() -> None:
    x = np.eye(3)
    assert metrics.similarity_to(x, x[:2]).tolist() == [0.5, 0.5, 0.0]
    assert metrics.similarity_within(x) == 0.0
    assert metrics.similarity_within(np.tile(x[:1], (4, 1))) == pytest.approx(1.0)
    assert metrics.drift(x, x).tolist() == [0.0, 0.0, 0.0]
    assert metrics.drift(x, -x).tolist() == [2.0, 2.0, 2.0]
    assert metrics.matches(x, x, np.array([0, 1, 1])).tolist() == [1.0, 1.0, 0.0]
    assert metrics.pairs_within(np.array([0, 1, 0, 1, 1])) == [(0, 2), (1, 3), (1, 4), (3, 4)]


def timm_features(tmp_path: Path) -> TimmFeatures:
    import timm

    file = tmp_path / "vit.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    save_file(model.state_dict(), file)
    return TimmFeatures("vit_tiny_patch16_224", TINY_VIT, str(file), "dino")


def noise(n: int, size: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (n, size, size, 3), dtype=np.uint8))


def test_perceptual_distance_of_feature_maps(tmp_path: Path) -> None:
    dino = timm_features(tmp_path)
    distance = Perceptual("dino", None, 32, dino)
    images = noise(3)
    zero, one, two = distance.pairs([*images, images[0]], [(0, 3), (0, 1), (1, 0)])
    assert zero == 0.0 and one == pytest.approx(two) and one > 0
    x, y = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    x[0, 0], y[0, 1] = 3.0, 5.0  # orthogonal whatever their length: |x̂ - ŷ|² = 2
    assert map_distance([(x, y), (x, x)]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_the_library_with_the_weights_of_a_file(net: str, tmp_path: Path) -> None:
    lpips = pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    name = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    network = getattr(torchvision.models, name)(weights=None)
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    mine = Perceptual(net, str(file), 64, timm_features(tmp_path))
    images = noise(2, 64)

    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    for own, layer in zip(
        (m for m in theirs.net.modules() if isinstance(m, torch.nn.Conv2d)),
        (m for m in network.features.modules() if isinstance(m, torch.nn.Conv2d)),
        strict=True,
    ):
        own.load_state_dict(layer.state_dict())
    x, y = (torch.from_numpy(i).permute(2, 0, 1)[None] / 127.5 - 1 for i in images)
    with torch.inference_mode():
        expected = float(theirs(x, y))
    assert mine.pairs([*images, images[0]], [(0, 1), (0, 2)]) == pytest.approx([expected, 0.0])
    torch.save({"features.0.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="does not hold torchvision's weights"):
        Perceptual(net, str(file), 64, timm_features(tmp_path))


def clip_folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    small.save_clip(tmp_path / "clip", small.clip_model())
    return f"local-dir:{tmp_path / 'clip'}"


def test_clip_features_are_open_clips(tmp_path: Path) -> None:
    clip = Clip(clip_folder(tmp_path), None, batch=2)
    images = noise(3)
    found = clip.images(images)
    pixels = torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 127.5 - 1 for i in images])
    with torch.inference_mode():
        expected = clip.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    texts = clip.texts(["a red circle", "a blue star on the beach"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    ids = small.token_ids(["a red circle"])
    with torch.inference_mode():
        torch.testing.assert_close(texts[:1], clip.model.encode_text(ids, normalize=True))


TINY_CLIP = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_openais_clip_is_read_with_its_own_activation(tmp_path: Path, monkeypatch: Any) -> None:
    """ViT-B-32.pt is a TorchScript archive in half precision, for QuickGELU alone."""
    import open_clip
    from test_backbone_formats import nested

    for known in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        copy = type(getattr(open_clip.factory, known))(getattr(open_clip.factory, known))
        monkeypatch.setattr(open_clip.factory, known, copy)
    for name, config in (
        ("tiny-quickgelu", TINY_CLIP),
        ("tiny", TINY_CLIP | {"quick_gelu": False}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    theirs = open_clip.create_model("tiny-quickgelu").eval()
    state = {n: t.half() for n, t in theirs.state_dict().items() if n != "attn_mask"}
    sizes = {n: torch.tensor(1.0) for n in ("input_resolution", "context_length", "vocab_size")}
    torch.jit.script(nested(state | sizes)).save(str(tmp_path / "ViT-B-32.pt"))
    file = str(tmp_path / "ViT-B-32.pt")
    images = noise(2)
    clip = Clip("tiny-quickgelu", file)
    pixels = torch.stack([clip.transform(Image.fromarray(i)) for i in images])
    with torch.inference_mode():
        expected = theirs.encode_image(pixels, normalize=True)
    torch.testing.assert_close(clip.images(images), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="trained with QuickGELU; set `clip_model: tiny-quickgelu`"):
        Clip("tiny", file)


def scorer(tmp_path: Path, **changes: object) -> SubjectScorer:
    timm_features(tmp_path)
    vit = str(tmp_path / "vit.safetensors")
    chosen = settings(
        clip_model=clip_folder(tmp_path), dino_model="vit_tiny_patch16_224", dino_kwargs=TINY_VIT,
        dino_file=vit, dinov2_model="vit_tiny_patch16_224", dinov2_kwargs=TINY_VIT,
        dinov2_file=vit, lpips_net="dino", **changes,
    )  # fmt: skip
    return SubjectScorer(subject(tmp_path / "data" / "prepared" / "x"), chosen)


def predictions(folder: Path, images: list[np.ndarray], base: list[np.ndarray]) -> Path:
    for place, pixels in (("images", images), ("base/images", base)):
        for job, image in zip(jobs(folder / place, "thing", PROMPTS, 2), pixels, strict=True):
            write_png(job.file, image)
    for place in ("drift", "base/drift"):
        for job in jobs(folder / place, "drift", ["a blue star"], 2):
            write_png(job.file, images[0])
    return folder


def test_scores_of_a_subjects_own_photographs(tmp_path: Path) -> None:
    """Generated images that are one photograph: full fidelity to it, no diversity, no drift."""
    found = scorer(tmp_path)
    photo = found.data.images("train")[0]
    folder = predictions(tmp_path / "run", [photo] * 4, noise(4))
    scores = {name: score.value for name, score in found.score(folder, "test").items()}
    assert [scores["vendi"], scores["vendi_prompt"]] == pytest.approx([1.0, 1.0])
    assert scores["lpips"] == scores["drift"] == pytest.approx(0.0, abs=1e-6)
    assert scores["text_match"] == 0.5  # one image cannot be closest to both prompts
    assert scores["base_lpips"] > 0 and scores["real_lpips"] > 0
    clip = found.clip.images(list(found.data.images("train")))
    assert scores["clip_i"] == pytest.approx(float((clip[0] @ clip.T).mean()), abs=1e-5)
    assert -1 <= scores["clip_t"] <= 1
    assert found.chance() == {"text_match": 0.5}
    from snella.tasks import find_task

    known = {metric.name: metric for metric in find_task("generation").metrics}
    assert scores.keys() == known.keys()
    assert all(known[n].lower <= v <= known[n].upper for n, v in scores.items())


def test_scores_by_prompt_and_image(tmp_path: Path) -> None:
    found = scorer(tmp_path, unadapted=False)
    folder = predictions(tmp_path / "run", noise(4), noise(4))
    scores = found.score(folder, "test")
    assert not any(name.startswith("base_") for name in scores)
    clip_i = scores["clip_i"]
    assert clip_i.per_example is not None and clip_i.per_example.shape == (4,)
    assert list(clip_i.per_group) == PROMPTS
    assert clip_i.value == pytest.approx(clip_i.per_example.mean())


def test_what_scoring_needs_is_named(tmp_path: Path) -> None:
    found = scorer(tmp_path)
    folder = predictions(tmp_path / "run", noise(4), noise(4))
    (folder / "images" / "p001_s0.png").write_bytes(b"half")
    with pytest.raises(UserError, match=r"p001_s0.png is missing or damaged"):
        found.score(folder, "test")
    with pytest.raises(UserError, match="is missing; delete the run's folder"):
        found.score(tmp_path / "nothing", "test")
    with pytest.raises(UserError, match="weights of CLIP ViT-B-32 are not configured; set `clip_f"):
        Clip("ViT-B-32", None)
    with pytest.raises(UserError, match="Unknown CLIP architecture of open_clip 'ViT-B-33'"):
        Clip("ViT-B-33", None)
    with pytest.raises(UserError, match="`dinov2_file: no` does not exist"):
        TimmFeatures("vit_tiny_patch16_224", {}, "no", "dinov2")
    with pytest.raises(UserError, match=r"Unknown timm architecture in `dino_model:`"):
        TimmFeatures("vit_tinny", {}, None, "dino")
