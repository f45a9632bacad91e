"""Backbones load from the containers, prefixes and formats of common releases."""

from __future__ import annotations

import argparse
import json

import formats
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_backbones import KWARGS, entry, flax, same_backbone

from snella.errors import UserError
from snella.models.backbone_files import check_entry, file_digest, input_size, present
from snella.models.backbones import build_backbone


@pytest.fixture
def source():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **KWARGS, num_classes=21)


def named(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def releases(state):
    """Containers of releases: MoCo v3 and v2, DINO, DINOv2's training, training checkpoints."""
    encoder = {n: t for n, t in state.items() if not n.startswith("head.")}
    return {
        "moco v3": {
            "epoch": 300, "arch": "vit_base",
            "state_dict": named("module.base_encoder.", encoder)
            | {"module.base_encoder.head.0.weight": torch.ones(4, 4)}
            | named("module.momentum_encoder.", other(encoder))
            | {"module.predictor.0.weight": torch.ones(4, 4)},
            "optimizer": {"state": {}, "param_groups": []},
        },
        "moco v3 linear probe": {
            "epoch": 90, "arch": "vit_base", "best_acc1": torch.tensor(76.6),
            "state_dict": named("module.", state),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        },
        "moco v2": {
            "state_dict": named("module.encoder_q.", state)
            | named("module.encoder_k.", other(state))
            | {"module.queue": torch.ones(3, 3)}
        },
        "dino": {
            "student": named("module.backbone.", other(encoder))
            | {"module.head.mlp.0.weight": torch.ones(2, 2)},
            "teacher": named("backbone.", encoder) | {"head.mlp.0.weight": torch.ones(2, 2)},
            "args": argparse.Namespace(lr=1e-3, output_dir="x"), "epoch": 3,
        },
        "two branches": named("student.backbone.", other(encoder))
        | named("teacher.backbone.", encoder),
        "timm training": {
            "arch": "vit", "state_dict": state, "metric": np.float64(0.5),
            "args": argparse.Namespace(mean=np.array([0.5, 0.5])),
        },
        "lightning": {
            "epoch": 3, "state_dict": named("net.", state), "hyper_parameters": {"lr": 1e-3},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
        "compiled and parallel": {"model": named("_orig_mod.module.", state)},
        "momentum encoder alone": {"state_dict": named("module.momentum_encoder.", encoder)},
        "a criterion beside": {
            "state_dict": named("model.", state) | {"criterion.weight": torch.ones(3)}
        },
        "torch's average": {"n_averaged": torch.tensor(5)} | named("module.", state),
        "mae": {
            "model": encoder
            | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.bias": torch.ones(8)}
        },
    }  # fmt: skip


@pytest.mark.parametrize("release", list(releases({})))
def test_containers_and_prefixes(tmp_path, source, release):
    torch.save(releases(source.state_dict())[release], tmp_path / "x.pth")
    assert same_backbone(build_backbone(entry(tmp_path / "x.pth"), 5), source)


def chunked(state, sizes, through):
    """Names of blocks as DINOv2 trains them, in chunks; numbered ``through``, or anew in each."""
    chunks = [chunk for chunk, size in enumerate(sizes) for _ in range(size)]

    def renamed(name):
        head, _, rest = name.partition("blocks.")
        if head or not rest:
            return name
        number, _, tail = rest.partition(".")
        block, chunk = int(number), chunks[int(number)]
        return f"blocks.{chunk}.{block if through else block - chunks.index(chunk)}.{tail}"

    return {renamed(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("kind", ["teacher", "training", "bare"])
def test_dinov2_checkpoints_with_blocks_in_chunks(tmp_path, kind, through):
    """teacher_checkpoint.pth, a training checkpoint with both branches, and the backbone alone."""
    torch.manual_seed(0)
    kwargs = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 12, "num_heads": 2}
    arch = {"arch": "vit_small_patch14_dinov2", "kwargs": kwargs}
    source = build_backbone(arch | {"file": "random"}, 5)
    state = {n: t for n, t in source.state_dict().items() if not n.startswith("head.")}
    state = chunked(state, [3, 3, 3, 3], through) | {"mask_token": torch.zeros(1, 24)}
    heads = {
        f"{head}.{name}": torch.ones(2, 2)
        for head in ("dino_head", "ibot_head")
        for name in ("mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v")
    }
    branch = named("backbone.", state) | heads
    content = {
        "bare": state,
        "teacher": {"teacher": branch},
        "training": {
            "model": named("student.", other(branch)) | named("teacher.", branch),
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3)}]},
            "iteration": 1249,
        },
    }[kind]
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    loaded = build_backbone(arch | {"file": str(tmp_path / "teacher_checkpoint.pth")}, 5)
    assert same_backbone(loaded, source)


def test_one_processs_part_of_a_model_is_refused(tmp_path):
    torch.save({"model": {"teacher.backbone._fsdp_wrapped_module._flat_param": torch.ones(9)}},
               tmp_path / "model_0001249.rank_0.pth")  # fmt: skip
    with pytest.raises(UserError, match=r"one process's part.*teacher_checkpoint\.pth"):
        build_backbone(entry(tmp_path / "model_0001249.rank_0.pth"), 5)


class Settings(dict):
    """What a training script keeps beside its weights."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["settings", "teacher", "module"])
def test_what_is_not_read_is_named_with_a_command_that_helps(tmp_path, source, kind, zipped):
    state, file = source.state_dict(), tmp_path / "x.pth"
    contents = {
        "settings": {"model": state, "config": Settings(lr=1.0), "optimizer": {"state": {}}},
        "teacher": {"student": other(state), "teacher": state, "config": Settings()},
        "module": source,
    }
    torch.save(contents[kind], file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"not read.*keep the tensors only") as caught:
        build_backbone(entry(file), 5)
    text = str(caught.value)
    assert ("timm." if kind == "module" else "Settings") in text
    assert "\n" not in text and "damaged" not in text
    made = tmp_path / "weights.pth"
    code = (
        text.partition('python -c "')[2].removesuffix('"').replace("'weights.pth'", repr(str(made)))
    )
    exec(code, {})
    assert same_backbone(build_backbone(entry(made), 5), source)


def test_a_container_can_be_chosen(tmp_path, source):
    torch.save({"teacher": other(source.state_dict()), "student": source.state_dict()},
               tmp_path / "x.pth")  # fmt: skip
    chosen = entry(tmp_path / "x.pth") | {"key": "student"}
    assert same_backbone(build_backbone(chosen, 5), source)
    with pytest.raises(UserError, match="no container 'ema'; it has: teacher, student"):
        build_backbone(chosen | {"key": "ema"}, 5)


def test_torch_files_without_checksums(tmp_path, source):
    """`set_crc32_options(False)` writes zeros in their place."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_backbone(build_backbone(entry(tmp_path / "x.pth"), 5), source)


def test_legacy_tar_files(tmp_path, source):
    torch.save({"state_dict": source.state_dict()}, tmp_path / "old.pth.tar",
               _use_new_zipfile_serialization=False)  # fmt: skip
    assert same_backbone(build_backbone(entry(tmp_path / "old.pth.tar"), 5), source)


def nested(tensors):
    """A module tree that holds ``tensors`` under their dotted names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(tensor))
    return root


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning", "ignore:.*jit:DeprecationWarning")
def test_openai_clip_is_a_torchscript_archive(tmp_path):
    arch, kwargs = "vit_base_patch16_clip_quickgelu_224", KWARGS
    source = timm.create_model(arch, **kwargs, num_classes=7)
    tower = openai_clip(source.state_dict()) | {"logit_scale": torch.ones(())}
    torch.jit.script(nested(tower)).save(str(tmp_path / "ViT-B-16.pt"))
    model = build_backbone(
        {"arch": arch, "kwargs": kwargs, "file": str(tmp_path / "ViT-B-16.pt")}, 5
    )
    assert same_backbone(model, source)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_openai_clip_visual_tower_alone(tmp_path, prefix):
    """`model.visual.state_dict()`, as many codes save it."""
    arch, kwargs = "vit_base_patch16_clip_quickgelu_224", KWARGS
    source = timm.create_model(arch, **kwargs, num_classes=7)
    tower = {n.removeprefix("visual."): t for n, t in openai_clip(source.state_dict()).items()
             if n.startswith("visual.")}  # fmt: skip
    torch.save(named(prefix, tower | {"proj": torch.ones(48, 8)}), tmp_path / "visual.pth")
    built = {"arch": arch, "kwargs": kwargs, "file": str(tmp_path / "visual.pth")}
    assert same_backbone(build_backbone(built, 5), source)


def openai_clip(state):
    """Names of OpenAI's release for timm's, and one tensor of the text tower."""
    out = {"token_embedding.weight": torch.ones(3, 3)}
    swaps = [
        ("patch_embed.proj.", "conv1."), ("blocks.", "transformer.resblocks."),
        ("norm_pre.", "ln_pre."), ("norm1.", "ln_1."), ("norm2.", "ln_2."),
        ("attn.qkv.", "attn.in_proj_"), ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
    ]  # fmt: skip
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        if name in ("cls_token", "pos_embed"):
            renamed = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}[name]
            tensor = tensor[0, 0] if name == "cls_token" else tensor[0]
        elif name.startswith("norm."):
            renamed = name.replace("norm.", "ln_post.")
        else:
            renamed = name
            for ours, theirs in swaps:
                renamed = renamed.replace(ours, theirs)
        out[f"visual.{renamed}"] = tensor.clone()
    return out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Quota exceeded</html>", "a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_what_is_no_weights_file_is_named_at_plan_time(tmp_path, content, match, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    for look in (check_entry, lambda e: build_backbone(e, 5)):
        with pytest.raises(UserError, match=match) as caught:
            look(entry(tmp_path / f"w{suffix}"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"lr": 1.0}}])
def test_files_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"no tensors|holds a list"):
        build_backbone(entry(tmp_path / "x.pth"), 5)


def test_a_backbone_needs_a_file():
    for file in (None, ""):
        with pytest.raises(UserError, match=r"has no `file:`.*file: random"):
            build_backbone(entry() | {"file": file}, 5)
    check_entry(entry())


def test_layer_scales_are_not_dropped(tmp_path, source):
    state = source.state_dict() | {"blocks.0.ls1.gamma": torch.ones(48)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no place for blocks\.0\.ls1\.gamma; check"):
        build_backbone(entry(tmp_path / "x.safetensors"), 5)
    ignoring = entry(tmp_path / "x.safetensors") | {"ignore": ["blocks.0.ls1."]}
    assert same_backbone(build_backbone(ignoring, 5), source)


def test_pooled_tokens_and_their_norm(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    pooled = entry(tmp_path / "x.safetensors", global_pool="avg")
    with pytest.raises(UserError, match="fc_norm: false"):
        build_backbone(pooled, 5)
    kept = build_backbone(entry(tmp_path / "x.safetensors", global_pool="avg", fc_norm=False), 5)
    assert torch.equal(kept.norm.weight, source.norm.weight)
    build_backbone(pooled | {"ignore": ["norm."], "fresh": ["fc_norm."]}, 5)
    fine_tuned = timm.create_model("vit_tiny_patch16_224", **KWARGS, global_pool="avg")
    save_file(fine_tuned.state_dict(), tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="global_pool: avg"):
        build_backbone(entry(tmp_path / "y.safetensors"), 5)


def test_the_two_vit_b16_releases_are_told_apart(tmp_path, source):
    original = flax(source)
    np.savez(tmp_path / "orig.npz", **original)
    np.savez(tmp_path / "aug.npz", **{k: v for k, v in original.items() if "pre_log" not in k})
    build_backbone(entry(tmp_path / "orig.npz") | {"holds": ["pre_logits"]}, 5)
    build_backbone(entry(tmp_path / "aug.npz") | {"lacks": ["pre_logits"]}, 5)
    with pytest.raises(UserError, match="holds 'pre_logits', so it is not AugReg"):
        build_backbone(
            entry(tmp_path / "orig.npz") | {"lacks": ["pre_logits"], "title": "AugReg"}, 5
        )
    with pytest.raises(UserError, match=r"is not the published one: its MD5 begins \w{6}, not abc"):
        build_backbone(entry(tmp_path / "orig.npz") | {"md5": "abc"}, 5)


def test_what_timm_does_not_check_of_a_flax_file(tmp_path, source):
    np.savez(tmp_path / "v.npz", **flax(source))
    with pytest.raises(UserError, match="it has 2 blocks, the model 1"):
        build_backbone(entry(tmp_path / "v.npz", depth=1), 5)
    with pytest.raises(UserError, match="it has 3 heads, the model 2"):
        build_backbone(entry(tmp_path / "v.npz", num_heads=2), 5)
    larger = build_backbone(entry(tmp_path / "v.npz", img_size=64), 5)
    assert larger.pos_embed.shape[1] == 17
    with pytest.raises(UserError, match="it has 16 pixels along a patch, the model 8"):
        build_backbone(entry(tmp_path / "v.npz", patch_size=8), 5)
    scale = np.full_like(flax(source)["Transformer/encoder_norm/scale"], np.nan)
    np.savez(tmp_path / "nan.npz", **flax(source) | {"Transformer/encoder_norm/scale": scale})
    with pytest.raises(UserError, match=r"norm.weight holds NaN"):
        build_backbone(entry(tmp_path / "nan.npz"), 5)


def test_patches_of_another_size_are_not_resampled(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "v.pth")
    with pytest.raises(UserError, match="patches of 16 x 16 pixels, the model of 8 x 8"):
        build_backbone(entry(tmp_path / "v.pth", patch_size=8), 5)


@pytest.mark.parametrize(
    ("arch", "kwargs", "size"),
    [
        ("vit_base_patch16_224", {}, 224), ("vit_base_patch16_224.orig_in21k", {}, 224),
        ("vit_base_patch14_dinov2.lvd142m", {}, 518), ("convnext_base", {}, None),
        ("swin_base_patch4_window7_224", {"img_size": 384}, 384),
        ("vit_base_patch16_clip_quickgelu_224", {"dynamic_img_size": True}, None),
    ],
)  # fmt: skip
def test_image_sizes_are_known_without_the_model(arch, kwargs, size):
    assert input_size({"arch": arch, "kwargs": kwargs}) == size


def test_image_size_is_checked_at_plan_time():
    check_entry(entry(), image_size=32)
    with pytest.raises(UserError, match=r"takes images of 32 .*them 224.*img_size: 224"):
        check_entry(entry(), image_size=224)


def transformers_models():
    import transformers as t

    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
            "intermediate_size": 192, "image_size": 32}  # fmt: skip
    swin = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
            "window_size": 4}  # fmt: skip
    return {
        "vit": (t.ViTModel(t.ViTConfig(**size, patch_size=16)), {}),
        "vitmae": (t.ViTMAEForPreTraining(t.ViTMAEConfig(
            **size, patch_size=16, decoder_num_hidden_layers=1, decoder_hidden_size=48,
            decoder_num_attention_heads=3, decoder_intermediate_size=48)), {}),
        "deit": (t.DeiTModel(t.DeiTConfig(**size, patch_size=16)),
                 {"arch": "deit_tiny_distilled_patch16_224"}),
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**size, mlp_ratio=4, patch_size=16)),
                   {"init_values": 1e-5}),
        "registers": (t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(
            **size, mlp_ratio=4, patch_size=16)),
            {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}),
        "clip": (t.CLIPVisionModel(t.CLIPVisionConfig(**size, patch_size=16)),
                 {"arch": "vit_base_patch16_clip_quickgelu_224"}),
        "swin": (t.SwinModel(t.SwinConfig(**swin)),
                 {"arch": "swin_tiny_patch4_window7_224", "embed_dim": 16, "depths": (1, 1),
                  "num_heads": (1, 2), "window_size": 4}),
        "convnext": (t.ConvNextModel(t.ConvNextConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32])),
            {"arch": "convnext_tiny", "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["vit", "vitmae", "deit", "dinov2", "registers", "clip", "swin", "convnext"]
)
def test_transformers_folders(tmp_path, name):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs, options = transformers_models()[name]
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    theirs.eval().save_pretrained(tmp_path / "m")
    options = dict(options)
    arch = options.pop("arch", "vit_tiny_patch16_224")
    kwargs = options if arch.startswith(("swin", "convnext")) else {**KWARGS, **options}
    if arch.startswith("swin"):
        kwargs["img_size"] = 32
    ours = build_backbone({"arch": arch, "kwargs": kwargs, "file": str(tmp_path / "m")}, 5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = ours.forward_features(images)
        if name == "vitmae":
            embeddings = theirs.vit.embeddings
            expected = embeddings.cls_token + embeddings.position_embeddings[:, :1]
            found = ours.cls_token + ours.pos_embed[:, :1]
        elif name == "clip":
            expected, found = theirs(images).pooler_output, found[:, 0]
        elif name == "convnext":
            expected = theirs(images).pooler_output
            found = ours.forward_head(found, pre_logits=True)
        else:
            expected = theirs(images).last_hidden_state
            found = found.flatten(1, -2)
    assert torch.allclose(expected, found, atol=2e-4), (expected - found).abs().max()
    assert file_digest(tmp_path / "m") == file_digest(tmp_path / "m" / "model.safetensors")


def test_sharded_folders(tmp_path, source):
    state = source.state_dict()
    names = list(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({n: state[n] for n in part}, tmp_path / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_backbone(build_backbone(entry(tmp_path), 5), source)
    assert len(file_digest(tmp_path)) == 64


def test_timm_tags_come_from_the_cache_only(monkeypatch, tmp_path, source):
    import huggingface_hub

    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def cached(repository, name):
        asked.append(repository)
        return str(tmp_path / name) if name.endswith(".safetensors") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    tagged = entry("timm", arch="vit_tiny_patch16_224.augreg_in21k")
    assert same_backbone(build_backbone(tagged, 5), source)
    assert asked == ["timm/vit_tiny_patch16_224.augreg_in21k"]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    with pytest.raises(UserError, match=r"hf download timm/vit_tiny.*augreg_in21k"):
        check_entry(tagged)
    with pytest.raises(UserError, match="needs a tag"):
        check_entry(entry("timm"))
    assert present(entry()) == []


def test_onnx_exports_of_dinov2(tmp_path):
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    theirs = t.Dinov2Model(t.Dinov2Config(**size, mlp_ratio=4, patch_size=16)).eval()
    tensors, nodes = {}, []
    for name, tensor in theirs.state_dict().items():
        name = f"backbone.{name}"
        if name.endswith("position_embeddings"):
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = (
                part.numpy() for part in tensor.split([1, 4], dim=1)
            )
        elif tensor.ndim == 2 and name.endswith("weight"):
            made_up = f"onnx::MatMul_{len(nodes)}"
            tensors[made_up] = tensor.T.numpy()
            path = "/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append((f"{path}/MatMul", "MatMul", ["x", made_up]))
        elif "mask_token" not in name:
            tensors[name] = tensor.numpy()
    tensors["decoder.bn1.weight"] = np.ones(3, np.float32)
    formats.onnx(tmp_path / "m.onnx", tensors, nodes)
    options = {**KWARGS, "init_values": 1e-5}
    chosen = {"arch": "vit_tiny_patch16_224", "kwargs": options, "file": str(tmp_path / "m.onnx")}
    ours = build_backbone(chosen, 5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        assert torch.allclose(ours.forward_features(images), expected, atol=1e-4)


def test_weights_inside_a_package(tmp_path, monkeypatch, source):
    place = tmp_path / "weights_here" / "models"
    place.mkdir(parents=True)
    (tmp_path / "weights_here" / "__init__.py").write_text("raise RuntimeError('imported')")
    save_file(source.state_dict(), place / "w.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    inside = entry("package:weights_here/models/w.safetensors")
    assert same_backbone(build_backbone(inside, 5), source)
    with pytest.raises(UserError, match=r"SHA256 begins \w{6}, not 000000"):
        build_backbone(inside | {"sha256": "0" * 64}, 5)
    away = entry("package:nowhere_at_all/w.safetensors") | {"package": "nowhere==1"}
    with pytest.raises(UserError, match="pip install --no-deps nowhere==1"):
        check_entry(away)


def test_folders_of_whole_pipelines(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="is empty"):
        check_entry(entry(tmp_path / "transformer"))
    (tmp_path / "transformer" / "w.safetensors").write_bytes(b"1")
    check_entry(entry(tmp_path))
    before = file_digest(tmp_path)
    (tmp_path / "transformer" / "w.safetensors").write_bytes(b"2")
    assert len(before) == 64 and file_digest(tmp_path) != before
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        build_backbone(entry(tmp_path), 5)
