"""MoSA, NOAH, Res-Tuning, VQT, SynQT, PYRA, DyLoRA, TR-PTS, KARST: formulas, counts, contract."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from method_contract import (
    backbone,
    batch,
    check_contract,
    functions,
    make,
    parameters_on,
    prepared,
)
from torch import Tensor, nn

from snella.errors import CannotMerge
from snella.method import Method, count_parameters
from snella.methods.base import prepare_model

MEAN_VTAB_HEAD = 38_046
ROWS = [
    ("dylora", "vit"), ("dylora", "swin"), ("dylora", "convnext"), ("karst", "vit"),
    ("karst", "swin"), ("vqt", "vit"), ("synqt", "vit"), ("pyra", "vit"), ("noah", "vit"),
    ("mosa", "vit"), ("res_tuning", "vit"), ("tr_pts", "vit"), ("vpt", "convnext"),
    ("fixed_mask", "vit"), ("fixed_mask", "swin"), ("fixed_mask", "convnext"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), ROWS)
def test_contract(name: str, family: str) -> None:
    settings = {"karst": {"factor": 4, "rank": 2}, "fixed_mask": {"rank": 4}}.get(name, {})
    check_contract(make(name, **settings), family)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dylora", {"rank": 8}, 294_912),
        ("karst", {"rescale": "none"}, 12 * 2 * (4 * 64 + 12_288)),
        ("karst", {"rescale": "scalar"}, 12 * (2 * (4 * 64 + 12_288) + 6)),
        ("karst", {}, 466_944),
        ("vqt", {"queries": 1}, 9_216),
        ("vqt", {"queries": 10}, 92_160),
        ("synqt", {"queries": 1}, 2_604_397),
        ("pyra", {"schedule": "low"}, 303_536),
        ("pyra", {"schedule": "high"}, 294_912 + 8_448 + 189),
        ("pyra", {"schedule": "low", "norm_affine": True}, 303_536 + 16_896),
        ("noah", {"prompts": (5,), "lora": (0,), "adapter": (0,)}, 12 * 5 * 768),
        ("noah", {}, 12 * (5 * 768 + 5 * 3_072 + 5 * 1_537 + 768)),
        ("mosa", {}, 350_400),
        ("fixed_mask", {}, 5_308_416 + 72 * 4),
        ("fixed_mask", {"kernel": "piecewise-linear"}, 5_308_416 + 72 * 2),
        ("res_tuning", {}, 470_136),
        ("res_tuning", {"prefix": 0, "prompt": 0}, 193_656),
    ],
)
def test_parameters_on_vit_b16(name: str, settings: dict[str, Any], expected: int) -> None:
    assert parameters_on("vit_base_patch16_224", make(name, **settings)) == expected


def test_published_totals() -> None:
    """Sparse-Tuning's Table 1 prints 0.51 (with classifier), 0.30, and 2.73 (with unused ones)."""
    assert round((470_136 + MEAN_VTAB_HEAD) / 1e6, 2) == 0.51
    assert round(303_536 / 1e6, 2) == 0.30
    tokens = [16] * 9 + [4] * 6 + [1] * 4  # of the public configurations
    synqt = 2_595_181 + 9_216 * sum(tokens) / 19 + 18_469 + MEAN_VTAB_HEAD
    assert int(synqt / 1e4) / 100 == 2.73


def plain_vit(depth: int = 2) -> Any:
    return backbone(depth=depth).eval()


def tokens_of(model: Any, images: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def masked_block(block: Any, x: Tensor, extra: Tensor) -> Tensor:
    """The block on [x; extra] where nobody sees ``extra``; an oracle for query-only tokens."""
    joined = block.norm1(torch.cat([x, extra], dim=1))
    qkv = block.attn.qkv(joined).reshape(*joined.shape[:2], 3, block.attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * block.attn.scale
    scores[..., x.shape[1] :] = float("-inf")
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    both = torch.cat([x, extra], dim=1) + block.attn.proj(mixed)
    return both + block.mlp(block.norm2(both))


def test_vqt_reads_and_leaves_the_features() -> None:
    method = make("vqt", queries=3, dropout=0.0)
    model, plain = prepared(method), plain_vit(3)
    images = batch()["image"]
    assert torch.allclose(model.forward_features(images), plain.forward_features(images), atol=1e-6)
    x, parts = tokens_of(plain, images), []
    for block, query in zip(plain.blocks, model.blocks.queries, strict=True):
        both = masked_block(block, x, query.expand(len(x), -1, -1))
        parts.append(F.normalize(both[:, x.shape[1] :].flatten(1), dim=1))
        x = both[:, : x.shape[1]]
    features = torch.cat([F.normalize(plain.norm(x)[:, 0], dim=1), *parts], dim=1)
    expected = F.linear(features, model.head.weight, model.head.bias)
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert model.head.in_features == 48 * (1 + 3 * 3)
    assert model.blocks.outputs == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [("vqt", {}), ("noah", {"lora": (0,), "adapter": (0,)}), ("vpt", {"prompts": 3})],
)
def test_prompt_dropout_is_drawn_for_each_image(name: str, settings: dict[str, Any]) -> None:
    """As in all three codes; a mask shared by the batch would be noise of another kind."""
    model = prepared(make(name, dropout=0.5, **settings)).train()
    first, second = model(batch()["image"][:1].expand(2, -1, -1, -1))
    assert not torch.allclose(first, second)


def test_starts_are_those_of_the_released_layers() -> None:
    """KARST's A is stored (r, out / f); NOAH's subnets are slices of layers 100 wide."""
    model = prepared(make("karst", factor=4, rank=2))
    left = model.blocks[0].mlp.fc1.left
    assert 0.9 < left.abs().max() * (192 / 4) ** 0.5 <= 1
    block = prepared(make("noah", prompts=(50,))).blocks[0]
    assert 0.99 < block.prompt.abs().max() / (6 / (101 * 48)) ** 0.5 <= 1
    assert 0.9 < block.adapter.up.weight.abs().max() / (6 / (48 + 100)) ** 0.5 <= 1


def test_vqt_lasso_is_over_the_inputs_of_the_classifier() -> None:
    method = make("vqt", lasso=0.5)
    model = prepared(method)
    expected = 0.5 * model.head.weight.square().sum(0).sqrt().sum()
    torch.testing.assert_close(method.auxiliary_loss(model, batch(), lambda m, b: None), expected)
    assert make("vqt").auxiliary_loss(model, batch(), lambda m, b: None) is None


def test_synqt_queries_read_the_frozen_tokens() -> None:
    file = functions(make("synqt"))
    block = plain_vit().blocks[0]
    x, query = torch.randn(2, 17, 48), torch.randn(2, 3, 48)
    tokens, outcome, read, change = file._with_query(block, x, query)
    both = masked_block(block, x, query)
    assert torch.allclose(tokens, block(x), atol=1e-5)
    assert torch.allclose(outcome, both[:, 17:], atol=1e-5)
    assert torch.allclose(query + read + change, outcome, atol=1e-5)
    model = prepared(make("synqt", queries=2))
    assert model.forward_features(batch()["image"]).shape == (8, 1, 48)


def test_synqt_weights_features_by_the_first() -> None:
    settings = SimpleNamespace(width=4, dropout=0.0, drop_path=0.0)
    combine = functions(make("synqt"))._Combine(6, 4, settings).eval()
    features = torch.randn(2, 4, 6)
    refined = features + combine.refine(combine.norm(features))
    weights = F.gelu(combine.weigh(refined[:, 0])).tanh()
    expected = (refined[:, 0] + (weights[..., None] * refined[:, 1:]).sum(1)) / 4
    torch.testing.assert_close(combine(features)[:, 0], expected)


def naive_merge(x: Tensor, size: Tensor, keys: Tensor, number: int) -> list[list[int]]:
    """Groups of token indices after one step of ToMe for one image."""
    metric = F.normalize(keys, dim=-1)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {i: max(odd, key=lambda j, i=i: float(metric[i] @ metric[j])) for i in even[1:]}
    order = sorted(best, key=lambda i: -float(metric[i] @ metric[best[i]]))[:number]
    groups = {i: [i] for i in range(len(x)) if i not in order}
    for i in order:
        groups[best[i]].append(i)
    return [groups[i] for i in even if i in groups] + [groups[j] for j in odd]


def test_pyra_merges_the_most_similar_and_starts_as_tome() -> None:
    file = functions(make("pyra"))
    x, keys, size = torch.randn(2, 17, 48), torch.randn(2, 17, 16), torch.rand(2, 17, 1) + 0.5
    reactivate = file._Reactivate(5, 48, False)
    merged, sizes = file.merge_similar(x, size, keys, 5, reactivate)
    assert merged.shape == (2, 12, 48)
    for image in range(2):
        groups = naive_merge(x[image], size[image], keys[image], 5)
        for row, group in enumerate(groups):
            weight = size[image, group]
            mean = (x[image, group] * weight).sum(0) / weight.sum()
            torch.testing.assert_close(merged[image, row], mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sizes[image, row], weight.sum(0))
    assert torch.allclose(merged[:, 0], x[:, 0])


def test_pyra_reactivates_by_channel_and_token() -> None:
    layer = functions(make("pyra"))._Reactivate(3, 4, False)
    nn.init.normal_(layer.channels)
    s, t = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    pairs = F.layer_norm(s + t, (4,))
    a = 2 * torch.sigmoid(torch.einsum("rz,brd->bzd", layer.tokens, pairs))
    b = 2 * torch.sigmoid(torch.einsum("zd,brd->brz", layer.channels, pairs)) - 1
    torch.testing.assert_close(layer(s, t), s + s * a * b)


def test_pyra_schedules() -> None:
    merged_tokens = functions(make("pyra")).merged_tokens
    assert merged_tokens("low", 12, 196) == [16] * 11 + [10]
    assert sum(merged_tokens("high", 12, 196)) == 192
    assert merged_tokens("low", 24, 196) == [8] * 23 + [6]
    assert merged_tokens("high", 24, 196)[:6] == [20, 19, 18, 17, 15, 13]
    assert sum(merged_tokens("high", 24, 196)) == 192
    for depth, patches in ((2, 16), (6, 16), (24, 196), (12, 49)):
        numbers = merged_tokens("high", depth, patches)
        assert len(numbers) == depth and sum(numbers) < patches


def test_noah_is_prompts_lora_and_adapter() -> None:
    method = make("noah", prompts=(2,), lora=(3,), adapter=(4,), dropout=0.0)
    model, plain = prepared(method), plain_vit(3)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == 3:
            nn.init.normal_(module.weight, std=0.1)
    images = batch()["image"]
    x = tokens_of(plain, images)
    count = x.shape[1]
    for ours, block in zip(model.blocks, plain.blocks, strict=True):
        x = torch.cat([x[:, :count], ours.prompt.expand(len(x), -1, -1)], dim=1)
        lora = ours.attn.lora
        block.attn.qkv.weight.data += lora.up.weight @ lora.down.weight
        x = x + block.attn(block.norm1(x))
        h = block.mlp(block.norm2(x))
        z = ours.adapter.down(h)
        x = x + h + ours.adapter.up(z * torch.sigmoid(1.702 * z))
    expected = plain.forward_head(plain.norm(x[:, :count]))
    assert torch.allclose(model(images), expected, atol=1e-4)


def test_mosa_evaluates_the_mean_of_its_experts() -> None:
    method = make("mosa", bottleneck=6, dropout=0.0)
    model = prepared(method)
    layer = model.blocks[0].adapter
    nn.init.normal_(layer.up)
    nn.init.normal_(layer.biases)
    sizes = layer.part.flatten().bincount()
    assert sizes.max() - sizes.min() <= 1 and len(sizes) == 4
    z = torch.randn(2, 5, 48)
    h = F.gelu(layer.down(layer.norm(z)))
    weights = [layer.up * (layer.part == e) for e in range(4)]
    experts = [F.linear(h, w, b) for w, b in zip(weights, layer.biases, strict=True)]
    torch.testing.assert_close(layer(z), 0.1 * sum(experts) / 4)
    torch.manual_seed(0)
    layer.train()(z).sum().backward()
    used = layer.biases.grad.abs().sum(1) > 0
    assert used.sum() == 1
    assert torch.equal(layer.up.grad != 0, layer.part == int(used.nonzero()))


def test_mosa_consistency_is_a_symmetric_divergence() -> None:
    method = make("mosa")
    model = prepared(method).train()
    for block in model.blocks:
        nn.init.normal_(block.adapter.up)

    def loss_fn(model: nn.Module, data: Any) -> Tensor:
        return F.cross_entropy(model(data["image"]), data["label"])

    loss_fn(model, batch())
    assert method.auxiliary_loss(model, batch(), loss_fn).item() > 0
    assert method.auxiliary_loss(model.eval(), batch(), loss_fn) is None
    p, q = torch.randn(3, 5), torch.randn(3, 5)
    a, b = p.log_softmax(-1), q.log_softmax(-1)
    expected = ((a.exp() * (a - b)).sum() + (b.exp() * (b - a)).sum()) / 6
    torch.testing.assert_close(functions(method).symmetric_kl(p, q), expected)


def test_res_tuning_adds_three_tuners() -> None:
    method = make("res_tuning", prefix=3, adapter=4, prompt=2)
    model, plain = prepared(method), plain_vit(3)
    ours, block = model.blocks[0], plain.blocks[0]
    x = torch.randn(2, 17, 48)
    normed = block.norm1(x)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        q = block.attn.qkv(normed)[..., :48].unflatten(-1, (3, 16)).transpose(1, 2)
        k, v = (t.unflatten(-1, (3, 16)).transpose(0, 1) for t in (keys, values))
        mixed = (q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1) @ v
        return block.attn.proj(mixed.transpose(1, 2).flatten(2))

    t = ours.tuners
    z = x + block.attn(normed) + attend(t.keys, t.values)
    y = z + block.mlp(block.norm2(z)) + t.adapter(block.norm2(z))
    qkv = block.attn.qkv(block.norm1(t.prompt))
    expected = y + attend(qkv[:, 48:96], qkv[:, 96:])
    assert torch.allclose(ours(x), expected, atol=1e-5)


def test_dylora_cuts_to_one_rank_per_pass() -> None:
    method = make("dylora", rank=4, update="last")
    model = prepared(method)
    layers = [m for m in model.modules() if hasattr(m, "lora_a")]
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    images = batch()["image"]
    seen = set()
    for _ in range(20):
        model.zero_grad()
        model.train()(images).sum().backward()
        rank = layers[0].draw.now
        seen.add(rank)
        for layer in layers:
            assert (layer.lora_a.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [rank - 1]
    assert seen == {1, 2, 3, 4}
    model.eval()(images)
    assert layers[0].draw.now == 4


@pytest.mark.parametrize("rescale", ["channel", "scalar", "none"])
def test_karst_is_a_sum_of_kronecker_products(rescale: str) -> None:
    method = make("karst", factor=4, rank=2, kernels=3, scale=0.5, rescale=rescale)
    model, plain = prepared(method), plain_vit(3)
    images = batch()["image"]
    assert torch.allclose(model(images), plain(images), atol=1e-5)
    for layer in model.modules():
        if hasattr(layer, "outer"):
            nn.init.normal_(layer.right, std=0.1)
    layer = model.blocks[0].attn.qkv
    expected = torch.cat(
        [
            0.5 * sum(torch.kron(c, a[part] @ b) for c, a, b in
                      zip(layer.outer, layer.left, layer.right, strict=True))
            for part in range(3)
        ]
    )  # fmt: skip
    torch.testing.assert_close(layer.update(), expected)


def test_tr_pts_allocates_by_layer_and_chooses_by_row() -> None:
    choose = functions(make("tr_pts")).choose
    fisher = {"a": torch.tensor([[9.0, 8.0, 1.0], [7.0, 0.1, 6.0]]), "b": torch.full((2, 3), 0.01)}
    assert {k: v.tolist() for k, v in choose(fisher, 4 / 12).items()} == {"a": [0, 1, 3, 5]}
    assert choose(fisher, 1 / 12)["a"].tolist() == [0, 3]
    assert choose({"a": torch.tensor([[3.0, 1.0]] * 8)}, 1 / 16)["a"].numel() == 1


def test_tr_pts_drops_tokens_three_times_at_any_depth() -> None:
    for depth, layers in ((12, (4, 7, 10)), (6, (2, 4, 5))):
        model = backbone(depth=depth)
        prepare_model(make("tr_pts"), model)
        assert model.blocks.layers == layers


def test_tr_pts_merges_the_rest_by_attention() -> None:
    file = functions(make("tr_pts"))
    x, attention = torch.randn(1, 5, 3), torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    merged = file.merge_rest(x, attention, 2)
    rest = (0.1 * x[:, 1] + 0.2 * x[:, 3]) / 0.3
    torch.testing.assert_close(merged, torch.stack([x[:, 0], x[:, 2], x[:, 4], rest], dim=1))


def test_tr_pts_trains_the_share_and_merges_without_token_selection() -> None:
    method = make("tr_pts", share=0.05, keep=1.0, images=8)
    model = prepared(method)
    total = sum(p.numel() for n, p in model.named_parameters() if ".weight" in n and p.ndim == 2
                and n.startswith("blocks"))  # fmt: skip

    def loss_fn(model: nn.Module, data: Any) -> Tensor:
        return F.cross_entropy(model(data["image"]), data["label"])

    method.calibrate(model, [batch()], loss_fn)
    found = count_parameters(model)["trainable"]
    assert 0.5 < found / (0.05 * total) < 1.5
    method.merge(model)
    with pytest.raises(CannotMerge, match="depends on the image"):
        make("tr_pts").merge(model)


def test_vpt_border_of_a_convnext() -> None:
    method: Method = make("vpt", border=3)
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert parameters_on("convnext_base", make("vpt")) == 13_740
    prepare_model(method, model)
    images = torch.zeros(1, 3, 32, 40)
    (padded,) = model.prompt_border.put(model.stem, (images,))
    assert padded.shape == (1, 3, 38, 46)
    assert torch.equal(padded[..., 3:-3, 3:-3], images)
    whole = model.prompt_border.put(model.stem, (torch.zeros(1, 3, 224, 224),))[0]
    assert torch.equal(whole[0, :, :3], model.prompt_border.rows[:, :3])
    assert torch.equal(whole[0, :, 3:-3, -3:], model.prompt_border.columns[:, :, 3:])


def test_fixed_masks_keep_the_most_sensitive_weights_alone() -> None:
    method = make("fixed_mask", rank=4, share=0.25, scoring_batch_size=4, images=8)
    model = prepared(method)
    plain = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("original")}
    first = [{k: v[i : i + 4] for k, v in batch().items()} for i in (0, 4)]
    gradients = {}
    for name in plain:
        model.get_parameter(name).requires_grad_(True)
    for part in first:
        loss = F.cross_entropy(model(part["image"]), part["label"])
        found = torch.autograd.grad(loss, [model.get_parameter(n) for n in plain])
        for name, gradient in zip(plain, found, strict=True):
            gradients[name] = gradients.get(name, 0) + gradient.square()
    for name in plain:
        model.get_parameter(name).requires_grad_(False)
    method.calibrate(model, first, lambda m, b: F.cross_entropy(m(b["image"]), b["label"]))
    everything = torch.cat([g.flatten() for g in gradients.values()])
    least = everything.sort(descending=True).values[round(0.25 * len(everything)) - 1]
    for name, gradient in gradients.items():
        layer = model.get_submodule(name.partition(".parametrizations")[0])
        changed = layer.weight != plain[name]
        assert not (changed & (gradient < 0.999 * least)).any()
        assert changed[gradient > 1.001 * least].all()


def test_fixed_masks_kernel_is_snellas() -> None:
    from snella.equations.kernels import Kernel, merge

    kind = functions(make("fixed_mask"))._MaskedKernel
    for name, mixed in (("piecewise-linear", False), ("mix-k", True)):
        torch.manual_seed(0)
        kernel = kind(torch.zeros(5, 7), 4, mixed)
        kernel.mask.fill_(True)
        order = {"coefficient_0": 0.1, "coefficient_1": -0.1, "scale": 1.0, "offset": 0.0}
        chosen = Kernel(name, rank=4)
        scalars = torch.tensor([[order[key] for key in chosen.scalars]])
        expected = merge(chosen, kernel.a[None], kernel.b[None], scalars)[0]
        torch.testing.assert_close(kernel(torch.zeros(5, 7)), expected)
