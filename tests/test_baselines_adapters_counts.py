"""Trainable parameters of the adapter baselines on ViT-B/16, Swin-B and ConvNeXt-B."""

from typing import Any

import pytest
from adapters_support import real_on_meta

from snella.method import count_parameters


@pytest.mark.parametrize(
    ("kind", "file", "hyperparameters", "expected"),
    [
        ("vit", "linear", {}, 0),
        ("vit", "bias", {}, 102_912),
        ("vit", "full", {}, 85_798_656),
        ("vit", "partial_1", {}, 7_089_408),
        ("vit", "vpt", {"depth": "shallow"}, 38_400),
        ("vit", "vpt", {"depth": "deep"}, 460_800),
        ("vit", "adapter", {"bottleneck": 8}, 156_768),
        ("vit", "adapter", {"bottleneck": 32}, 599_424),
        ("vit", "adapter", {"bottleneck": 64}, 1_189_632),
        ("vit", "adapter_plus", {"bottleneck": 8}, 165_984),
        ("vit", "adapter_plus", {"bottleneck": 16}, 313_536),
        ("vit", "adaptformer", {"bottleneck": 8}, 156_768),
        ("vit", "adaptformer", {"bottleneck": 64}, 1_189_632),
        ("vit", "ssf", {}, 205_824),
        ("vit", "convpass", {}, 327_552),
        ("vit", "convpass", {"attention_only": True}, 163_776),
        ("swin", "linear", {}, 0),
        ("swin", "bias", {}, 200_760),
        ("swin", "full", {}, 86_743_224),
        ("swin", "partial_1", {}, 12 * 1024**2 + 13 * 1024 + 13**2 * 32 + 2048),
        ("swin", "vpt", {"depth": "deep", "prompts": 10}, 120_320),
        ("swin", "adapter", {"bottleneck": 8}, 204_736),
        ("swin", "ssf", {}, 267_264),
        ("swin", "ssf", {"variant": "paper"}, 267_264 + 7_168),
        ("convnext", "linear", {}, 0),
        ("convnext", "full", {}, 87_566_464),
        ("convnext", "partial_1", {}, 8 * 1024**2 + 58 * 1024 + 2048),
        ("convnext", "adapter", {"bottleneck": 8}, 307_104),
        ("convnext", "ssf", {}, 255_232),
        ("convnext", "ssf", {"variant": "paper"}, 255_232 + 5_376),
    ],
)
def test_trainable_parameters_of_the_real_backbones(
    kind: str, file: str, hyperparameters: dict[str, Any], expected: int
) -> None:
    model = real_on_meta(kind, file, **hyperparameters)
    width = model.num_features
    assert count_parameters(model)["trainable"] == expected
    assert count_parameters(model)["head"] == 10 * width + 10


@pytest.mark.parametrize(("kind", "width"), [("vit", 768), ("swin", 1024), ("convnext", 1024)])
def test_mlp3_counts_its_hidden_layers(kind: str, width: int) -> None:
    counts = count_parameters(real_on_meta(kind, "mlp3"))
    hidden = 2 * (width * width + 3 * width)
    assert counts["trainable"] == hidden
    assert counts["head"] == 10 * width + 10
    assert kind != "vit" or hidden == 1_184_256
