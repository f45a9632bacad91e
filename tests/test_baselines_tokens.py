"""Methods that skip tokens: Sparse-Tuning (paper and public code) and DyT."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from method_contract import backbone, loss_fn
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from snella.errors import CannotMerge, Unsupported, UserError
from snella.method import Method, count_parameters, trainable
from snella.methods.base import build_method, prepare_model
from snella.models.tiny import toy_batch

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "baselines"
METHODS = {
    "paper": ("sparse_tuning", {}),
    "average": ("sparse_tuning", {"fuse": "average", "keep": 0.5}),
    "inputs": ("sparse_tuning", {"fusion": "input", "links": [1]}),
    "outputs": ("sparse_tuning", {"fusion": "output"}),
    "public_code": ("sparse_tuning", {"variant": "public_code", "bottleneck": 8}),
    "dyt": ("dyt", {"dropout": 0.0}),
    "dyt_released": ("dyt", {"variant": "released", "dropout": 0.0}),
    "dyt_experts": ("dyt", {"experts": 3, "dropout": 0.0}),
}


def make(name: str, **settings: object) -> Method:
    file, preset = METHODS[name]
    return build_method(ROOT / "baselines" / f"{file}.py", preset | settings)


def tiny(depth: int = 12, mlp_ratio: float = 2) -> nn.Module:
    return backbone(depth=depth, mlp_ratio=mlp_ratio).eval()


def prepared(method: Method, seed: int = 1, **sizes: float) -> nn.Module:
    model = tiny(**sizes)
    torch.manual_seed(seed)
    prepare_model(method, model)
    return model


def batch() -> dict[str, Tensor]:
    return toy_batch(size=6)


def objective(method: Method, model: nn.Module) -> Tensor:
    loss = loss_fn(model, batch())
    extra = method.auxiliary_loss(model, batch(), loss_fn)
    return loss if extra is None else loss + extra


def gold(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "settings"}
    return {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}


def weights(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str) -> None:
    """Learns with every tensor alive, moves nothing frozen, restores exactly, cannot merge."""
    method = make(name)
    model = prepared(method)
    plain = tiny()
    assert [
        k for k in model.state_dict() if ".adapter" not in k and ".dispatcher" not in k
    ] == list(plain.state_dict())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    alive: set[str] = set()
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 5e-3, 1e-4))
    model.train()
    losses = []
    for _ in range(8):
        loss = objective(method, model)
        optimizer.zero_grad()
        loss.backward()
        alive |= {n for n, p in trainable(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert alive == set(trainable(model))
    for n, p in model.named_parameters():
        assert n not in frozen or torch.equal(p, frozen[n]), n

    objective(method, model)  # a copy is possible while a pass's graph is alive
    twin = copy.deepcopy(model).eval()
    expected = model.eval()(batch()["image"])
    assert torch.equal(twin(batch()["image"]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(batch()["image"]).isfinite().all()
        assert model.eval()(batch()["image"]).isfinite().all()
    fresh = prepared(method, seed=2)
    method.load_state(fresh, load(save(method.state(model))))
    assert torch.equal(fresh(batch()["image"]), expected)
    with pytest.raises(CannotMerge):
        method.merge(model)


@pytest.mark.parametrize("fuse", ["fuse", "nofuse"])
@pytest.mark.parametrize("keep", [5, 7, 9])
def test_public_code_golden(keep: int, fuse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = gold("sparse_tuning_public_code")
    fusing = {"fuse": "attention", "nofuse": "none"}[fuse]
    method = make("public_code", keep=keep / 10, fuse=fusing)
    model = prepared(method).double()
    adapters = {k.replace("adaptmlp", "adapter"): v for k, v in weights(arrays, "adapter/").items()}
    model.load_state_dict(weights(arrays, "w/") | adapters, strict=True)

    kept: list[Tensor] = []
    names = type(method).adapt.__globals__
    original = names["sparsify"]

    def spy(tokens: Tensor, index: Tensor, fused: Tensor | None) -> Tensor:
        kept.append(index)
        return original(tokens, index, fused)

    monkeypatch.setitem(names, "sparsify", spy)
    prefix = f"keep{keep}_{fuse}"
    logits = model(arrays["images"])
    torch.testing.assert_close(logits, arrays[f"{prefix}/logits"], atol=1e-12, rtol=0)
    for index, layer in zip(kept, (4, 7, 10), strict=True):
        assert torch.equal(index, arrays[f"{prefix}/kept_layer{layer}"].long())
    if prefix == "keep7_fuse":
        loss = F.cross_entropy(logits, arrays["labels"])
        torch.testing.assert_close(loss, arrays["loss"])
        loss.backward()
        for name, parameter in trainable(model).items():
            expected = arrays["grad/" + name.replace("adapter", "adaptmlp")]
            torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-5)


def test_public_code_layers_golden() -> None:
    arrays = gold("sparse_tuning_public_code")
    model = prepared(make("public_code", keep=0.7)).double()
    adapters = {k.replace("adaptmlp", "adapter"): v for k, v in weights(arrays, "adapter/").items()}
    model.load_state_dict(weights(arrays, "w/") | adapters, strict=True)
    outputs, inputs = [], []
    for block in model.blocks:
        block.adapter.register_forward_hook(lambda m, i, out: outputs.append(out[0]))
    for norm in (*(block.norm1 for block in model.blocks), model.norm):
        norm.register_forward_pre_hook(lambda m, args: inputs.append(args[0][0]))
    model(arrays["images"][:1])
    for number, out in enumerate(outputs, start=1):
        expected = arrays[f"image0/block{number}_adapter_out"]
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
        after = inputs[number]
        if number % 3 == 0:  # the sums between blocks, which the stored outputs are without
            after = after - sum(outputs[number - 3 : min(number, 11)])
        if number == 3:
            after = after - inputs[0]
        expected = arrays[f"image0/block{number}_out"]
        torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)


def test_public_adapter_golden() -> None:
    arrays = gold("sparse_tuning_public_adapter")
    adapter = prepared(make("public_code")).double().blocks[0].adapter
    adapter.load_state_dict(weights(arrays, "w/"))
    torch.testing.assert_close(adapter(arrays["x"]), arrays["y"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("fuse", ["fuse", "nofuse"])
@pytest.mark.parametrize("keep", [5, 7, 9])
def test_token_sparsification_golden(keep: int, fuse: str) -> None:
    """The paper's variant with its adapters still zero is the authors' selection alone."""
    arrays = gold("token_sparsification_block")
    fusing = {"fuse": "attention", "nofuse": "none"}[fuse]
    method = make("paper", keep=keep / 10, fuse=fusing, layers=[1])
    model = prepared(method, depth=1, mlp_ratio=4).double()
    block = model.blocks[0]
    block.load_state_dict(weights(arrays, "w/"), strict=False)
    names = type(method).adapt.__globals__
    qkv = block.attn.qkv(block.norm1(arrays["tokens_in"]))
    attention = names["class_attention"](block.attn, qkv)
    torch.testing.assert_close(attention, arrays["class_attention"], atol=1e-12, rtol=0)
    prefix = f"keep{keep}_{fuse}"
    index = attention.topk(arrays[f"{prefix}/kept"].shape[1], dim=1).indices
    assert torch.equal(index, arrays[f"{prefix}/kept"].long())
    (tokens,) = model.blocks.attend(1, block, arrays["tokens_in"], [])
    expected = arrays[f"{prefix}/tokens_before_mlp"]
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-5)
    out = model.blocks(arrays["tokens_in"])
    torch.testing.assert_close(out, arrays[f"{prefix}/block_out"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "downs", "ups", "printed"),
    [
        ({}, 32, 12, None),
        ({"links": [1]}, 23, 12, 0.95),  # Table 4 (b)
        ({"links": []}, 12, 12, None),
        ({"fusion": "input"}, 12, 12, None),
        ({"fusion": "output"}, 32, 32, 1.68),  # Table 5 (c)
    ],
)
def test_counts_of_the_ablations(
    settings: dict[str, object], downs: int, ups: int, printed: float | None
) -> None:
    """Projections per variant; two printed counts are these with a head of 100 classes."""
    model = prepared(make("paper", bottleneck=8, **settings))
    width = model.embed_dim

    def count(width: int, bottleneck: int) -> int:
        return downs * (width + 1) * bottleneck + ups * (bottleneck + 1) * width

    adapters = [p for n, p in model.named_parameters() if ".adapter" in n]
    assert sum(p.numel() for p in adapters) == count(width, 8)
    if printed is not None:
        assert round((count(768, 32) + 769 * 100) / 1e6, 2) == printed


def test_inputs_are_summed_before_within_or_after_an_adapter() -> None:
    x, *links = torch.randn(3, 2, 5, tiny().embed_dim).unbind()
    for fusion in ("input", "output"):
        adapter = prepared(make("paper", fusion=fusion)).blocks[3].adapter
        parts = [adapter] if fusion == "input" else list(adapter)
        for part in parts:
            nn.init.normal_(part.up.weight)
        inputs = (x, *links)
        if fusion == "input":
            expected = adapter.up(adapter.down[0](x + links[0] + links[1]).relu())
        else:
            expected = sum(p.up(p.down[0](i).relu()) for p, i in zip(parts, inputs, strict=True))
        torch.testing.assert_close(adapter(*inputs), expected)


def test_token_sparsification_alone_trains_the_head() -> None:
    model = prepared(make("paper", fusion="none", keep=0.5))
    assert {name.partition(".")[0] for name in trainable(model)} == {"head"}
    zero = prepared(make("paper", keep=0.5)).eval()
    zero.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(model(batch()["image"]), zero(batch()["image"]))


def test_dense_adapters_are_equation_3() -> None:
    """Without sparsification: DA_n from its block's tokens and the adapters 1 and 3 before."""
    model = prepared(make("paper", keep=1.0)).double()
    for block in model.blocks:
        nn.init.normal_(block.adapter.up.weight, std=0.1)
        nn.init.normal_(block.adapter.up.bias, std=0.1)
    x = model.patch_embed(batch()["image"].double())
    x = model._pos_embed(x)
    expected, updates = x, []
    for n, block in enumerate(model.blocks):
        z = expected + block.attn(block.norm1(expected))
        inputs = [z] + ([updates[n - 1]] if n > 0 else []) + ([updates[n - 3]] if n > 2 else [])
        down = block.adapter.down
        h = sum(i @ d.weight.T + d.bias for i, d in zip(inputs, down, strict=True))
        updates.append(h.relu() @ block.adapter.up.weight.T + block.adapter.up.bias)
        expected = z + block.mlp(block.norm2(z)) + updates[-1]
    torch.testing.assert_close(model.blocks(x), expected)


def test_stored_outputs_are_sparsified_with_the_same_choice() -> None:
    """With an identity in place of attention and MLP, tokens and stored outputs stay aligned."""
    model = prepared(make("paper", keep=0.5))
    seen: dict[int, list[Tensor]] = {}
    for n, block in enumerate(model.blocks, start=1):
        block.adapter.register_forward_hook(lambda m, inputs, out, n=n: seen.update({n: inputs}))
    model(batch()["image"])
    lengths = [inputs[0].shape[1] for inputs in seen.values()]
    assert lengths == [17] * 3 + [10] * 3 + [7] * 3 + [5] * 3
    assert all(
        {part.shape[1] for part in inputs} == {n}
        for inputs, n in zip(seen.values(), lengths, strict=True)
    )
    assert [len(inputs) for inputs in seen.values()] == [1, 2, 2] + [3] * 9


def gflops(keep: float, bottleneck: int) -> float:
    """Multiply-adds as fvcore counts them: layers, attention products, 5 per LayerNorm element."""
    d, h, total, tokens = 768, 3072, 196.0 * 768**2, 197
    for n in range(1, 13):
        after = tokens
        if n in (4, 7, 10) and (kept := math.ceil(keep * (tokens - 1))) < tokens - 1:
            after = kept + 2
        downs = 1 + (n > 1) + (n > 3)
        total += 4 * tokens * d * d + 2 * tokens**2 * d + 2 * after * d * h
        total += 5 * d * (tokens + after) + after * d * bottleneck * (downs + 1)
        tokens = after
    return (total + 5 * d * tokens) / 1e9


@pytest.mark.parametrize(
    ("keep", "bottleneck", "expected"),
    [(0.5, 8, 8.851), (0.7, 8, 11.654), (0.9, 8, 15.457), (0.5, 32, 8.920), (0.7, 32, 11.752)],
)
def test_gflops_formula(keep: float, bottleneck: int, expected: float) -> None:
    assert round(gflops(keep, bottleneck), 3) == expected


@pytest.mark.parametrize(("keep", "published"), [(0.5, 8.94), (0.7, 11.65), (0.9, 15.62)])
def test_gflops_of_vit_b16(keep: float, published: float) -> None:
    """The real forward pass costs what the formula says; torch's counter leaves out norms."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
        prepare_model(make("paper", keep=keep), model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    tokens = {0.5: (100, 52, 28), 0.7: (140, 100, 72), 0.9: (179, 163, 148)}[keep]
    after = [197] * 3 + [n for n in tokens for _ in range(3)]
    normed = sum([197, *after[:-1]]) + sum(after) + after[-1]  # norm1, norm2 and the last norm
    norms = 5 * 768 * normed / 1e9
    counted = counter.get_total_flops() / 2e9 + norms
    assert counted == pytest.approx(gflops(keep, 8), abs=5e-4)  # the class row again
    assert counted == pytest.approx(published, rel=0.011)
    if keep == 0.7:
        assert f"{gflops(keep, 8):.2f}" == "11.65"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("paper", {}, 279_808),
        ("paper", {"bottleneck": 16}, 550_400),
        ("paper", {"bottleneck": 32}, 1_091_584),
        ("paper", {"bottleneck": 64}, 2_173_952),
        ("paper", {"bottleneck": 128}, 4_338_688),
        ("public_code", {"bottleneck": 64}, 1_314_432),
        ("dyt", {}, 156_768 + 9_228),
        ("dyt", {"bottleneck": 16}, 304_320 + 9_228),
        ("dyt", {"bottleneck": 64, "experts": 4}, 4_795_440 + 9_228),
    ],
)
def test_parameters_on_vit_b16(name: str, settings: dict, expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        prepare_model(make(name, **settings), model)
    assert count_parameters(model)["trainable"] == expected


def dyt_from_gold(**settings: object) -> tuple[Method, nn.Module, dict[str, Tensor]]:
    arrays = gold("dyt")
    method = make("dyt", **settings)
    model = prepared(method, depth=3, mlp_ratio=4).double()
    names = {"adaptmlp.down_proj": "adapter.down", "adaptmlp.up_proj": "adapter.up"}
    names["mlp_token_select.mlp_head"] = "dispatcher"
    own = weights(arrays, "dyt/")
    for theirs, ours in names.items():
        own = {k.replace(theirs, ours): v for k, v in own.items()}
    model.load_state_dict(weights(arrays, "w/") | own, strict=True)
    return method, model, arrays


def test_dyt_golden_inference() -> None:
    _, model, arrays = dyt_from_gold()
    logits: list[Tensor] = []
    for block in model.blocks:
        block.dispatcher.register_forward_hook(lambda m, i, out: logits.append(out[..., 0]))
    torch.testing.assert_close(model(arrays["images"]), arrays["logits"], atol=1e-12, rtol=0)
    found = torch.stack(logits, dim=1)
    torch.testing.assert_close(found, arrays["token_logits"], atol=1e-12, rtol=0)
    assert torch.equal(found > 0, arrays["token_selected"])
    model.blocks.complete = True
    found = model(arrays["images"])
    torch.testing.assert_close(found, arrays["logits_all_tokens"], atol=1e-12, rtol=0)


def test_dyt_golden_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training pass without its noise and at tau = 1 has the authors' loss and gradients."""
    method, model, arrays = dyt_from_gold(tau=1.0)
    monkeypatch.setitem(type(method).adapt.__globals__, "logistic_noise", torch.zeros_like)
    model.train()
    logits = model(arrays["images"])
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-12, rtol=0)
    rate = method.auxiliary_loss(model, {}, loss_fn)
    torch.testing.assert_close(rate, arrays["loss_token_rate"])
    loss = F.cross_entropy(logits, arrays["labels"]) + rate
    torch.testing.assert_close(loss, arrays["loss"])
    loss.backward()
    names = {"adapter.down": "adaptmlp.down_proj", "adapter.up": "adaptmlp.up_proj"}
    names["dispatcher"] = "mlp_token_select.mlp_head"
    for name, parameter in trainable(model).items():
        theirs = name
        for ours, their in names.items():
            theirs = theirs.replace(ours, their)
        torch.testing.assert_close(parameter.grad, arrays[f"grad/{theirs}"], atol=1e-10, rtol=1e-8)


def test_dyt_released_adds_a_complete_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    method, model, arrays = dyt_from_gold(variant="released")
    monkeypatch.setitem(type(method).adapt.__globals__, "logistic_noise", torch.zeros_like)
    model.train()
    data = {"image": arrays["images"], "label": arrays["labels"]}
    loss_fn(model, data)
    found = method.auxiliary_loss(model, data, loss_fn)
    full, skipped = arrays["logits_all_tokens"].log_softmax(-1), arrays["logits"].log_softmax(-1)
    kl = (full.exp() * (full - skipped)).sum(-1).mean()
    expected = arrays["loss_token_rate"] + F.nll_loss(full, arrays["labels"]) + kl
    torch.testing.assert_close(found, expected)
    assert method.auxiliary_loss(model, data, loss_fn) is None


def test_dyt_mixes_the_weights_of_its_experts_for_each_image() -> None:
    """softmax(W_r mean x) over the experts; experts that are equal are one adapter."""
    adapter = prepared(make("dyt_experts", scale=0.5), depth=1).double().blocks[0].adapter
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 7, 48, dtype=torch.float64)
    found = adapter(x)
    for image, tokens in zip(x, found, strict=True):
        shares = (adapter.router(image.mean(0))).softmax(0)

        def mean(layer: str, name: str, shares: Tensor = shares) -> Tensor:
            parts = [getattr(getattr(e, layer), name) for e in adapter.experts]
            return sum(s * p for s, p in zip(shares, parts, strict=True))

        hidden = F.linear(image, mean("down", "weight"), mean("down", "bias")).relu()
        expected = 0.5 * F.linear(hidden, mean("up", "weight"), mean("up", "bias"))
        torch.testing.assert_close(tokens, expected)
    for expert in adapter.experts:
        expert.load_state_dict(adapter.experts[0].state_dict())
    torch.testing.assert_close(adapter(x), adapter.experts[0](x))


def test_dyt_spends_flops_on_chosen_tokens_alone() -> None:
    model = prepared(make("dyt"), depth=3, mlp_ratio=4)

    def flops(bias: float) -> int:
        for block in model.blocks:
            nn.init.constant_(block.dispatcher.bias, bias)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch()["image"])
        return counter.get_total_flops()

    assert flops(9.0) - flops(-9.0) == 2 * 3 * 6 * 16 * 2 * 48 * 192


def test_dyt_rate_loss_moves_the_rate() -> None:
    method = make("dyt", rate=0.2)
    model = prepared(method, depth=3).train()
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 1e-2, 0.0))
    for _ in range(60):
        loss_fn(model, batch())
        optimizer.zero_grad()
        method.auxiliary_loss(model, batch(), loss_fn).backward()
        optimizer.step()
    loss_fn(model, batch())
    assert torch.cat(model.blocks.gates).mean().item() == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("name", ["paper", "dyt"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 1)}),
        ("vit_tiny_patch16_224", {"img_size": 32, "class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"img_size": 32, "reg_tokens": 4}),
    ],
)
def test_other_backbones_are_refused(name: str, kind: str, settings: dict) -> None:
    with torch.device("meta"):
        model = timm.create_model(kind, num_classes=5, **settings)
    with pytest.raises(Unsupported):
        prepare_model(make(name), model)


def test_layers_follow_the_depth() -> None:
    assert prepared(make("paper")).blocks.layers == (4, 7, 10)
    assert prepared(make("paper"), depth=6).blocks.layers == (2, 4, 5)
    assert prepared(make("paper", layers=[2, 5, 8]), depth=6).blocks.layers == (1, 3, 4)
    with pytest.raises(Unsupported, match="12 blocks"):
        prepared(make("public_code"), depth=6)


@pytest.mark.parametrize(
    "settings", [{"keep": 0.0}, {"keep": 1.5}, {"fuse": "sum"}, {"kepp": 0.5}, {"layers": [13]}]
)
def test_bad_settings_are_one_clear_line(settings: dict) -> None:
    with pytest.raises(UserError) as caught:
        make("paper", **settings)
    assert "\n" not in str(caught.value)
