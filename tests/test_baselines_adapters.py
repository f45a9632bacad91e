"""What every adapter baseline must do on every timm family it claims."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters_support import adapted, images, labels, method, perturb, tiny
from torch import nn

from snella.errors import CannotMerge, Unsupported, UserError
from snella.method import trainable
from snella.methods.base import prepare_model

_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "linear": ("linear", {}),
    "bias": ("bias", {}),
    "partial-1": ("partial_1", {}),
    "mlp-3": ("mlp3", {"dropout": 0.0}),
    "vpt-shallow": ("vpt", {"depth": "shallow", "prompts": 3}),
    "vpt-deep": ("vpt", {"prompts": 3}),
    "adapter-8": ("adapter", {}),
    "adapter-noah": ("adapter", {"activation": "quickgelu", "initialisation": "xavier"}),
    "adapter+": ("adapter_plus", {"drop_path": 0.0}),
    "adaptformer": ("adaptformer", {"bottleneck": 8, "dropout": 0.0}),
    "ssf": ("ssf", {}),
    "ssf-paper": ("ssf", {"variant": "paper"}),
    "convpass": ("convpass", {"dropout": 0.0}),
    "convpass-attention": ("convpass", {"dropout": 0.0, "attention_only": True}),
}
_ALL = ("vit", "swin", "convnext")
_FAMILIES = {
    "vpt-shallow": ("vit",),
    "vpt-deep": ("vit", "swin"),
    "adapter+": ("vit", "swin"),
    "adaptformer": ("vit",),
    "convpass": ("vit",),
    "convpass-attention": ("vit",),
}
CASES = [(name, kind) for name in _METHODS for kind in _FAMILIES.get(name, _ALL)]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: value)
_MERGES = {"full", "linear", "bias", "partial-1", "ssf", "ssf-paper"}


def _adapted(name: str, kind: str) -> tuple[Any, nn.Module]:
    file, hyperparameters = _METHODS[name]
    return adapted(kind, file, **hyperparameters)


def _train(model: nn.Module, kind: str, steps: int) -> list[float]:
    """Adam on six fixed images; returns the losses."""
    optimizer = torch.optim.Adam(trainable(model).values(), lr=3e-3, eps=1e-12)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images(kind)), labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_case
def test_only_what_trains_moves_and_all_of_it_does(name: str, kind: str) -> None:
    _, model = _adapted(name, kind)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = _train(model, kind, steps=6)
    assert losses[-1] < losses[0]
    for key, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        assert moved == parameter.requires_grad, key
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, key


@every_case
def test_state_restores_the_logits_in_a_fresh_model(name: str, kind: str) -> None:
    chosen, model = _adapted(name, kind)
    perturb(model)
    model.train()(images(kind))
    state = {key: tensor.clone() for key, tensor in chosen.state(model).items()}
    _, fresh = _adapted(name, kind)
    chosen.load_state(fresh, state)
    torch.testing.assert_close(fresh(images(kind)), model.eval()(images(kind)), rtol=0, atol=0)
    if name != "full":
        backbone = set(tiny(kind).state_dict()) - set(trainable(model))
        assert not backbone & set(state), "frozen weights do not belong into an adapter"


@every_case
def test_merge_gives_the_plain_backbone_with_the_same_logits(name: str, kind: str) -> None:
    chosen, model = _adapted(name, kind)
    perturb(model)
    before = model(images(kind))
    if name not in _MERGES:
        with pytest.raises(CannotMerge):
            chosen.merge(model)
        torch.testing.assert_close(model(images(kind)), before, rtol=0, atol=0)
        return
    chosen.merge(model)
    plain = tiny(kind)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(images(kind)), before, rtol=1e-5, atol=1e-5)


@every_case
def test_runs_in_bf16_train_mode_and_after_deepcopy(name: str, kind: str) -> None:
    _, model = _adapted(name, kind)
    perturb(model)
    expected = model(images(kind))
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(images(kind)), expected, rtol=0, atol=0)
    perturb(clone)
    torch.testing.assert_close(model(images(kind)), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.train()(images(kind))
    F.cross_entropy(logits.float(), labels()).backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


@every_case
def test_same_seed_same_start_in_the_model_s_precision(name: str, kind: str) -> None:
    _, first = _adapted(name, kind)
    _, second = _adapted(name, kind)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
    file, hyperparameters = _METHODS[name]
    double = tiny(kind).double()
    prepare_model(method(file, **hyperparameters), double)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", _ALL)
@pytest.mark.parametrize("name", ["adapter-8", "adaptformer", "convpass"])
def test_zero_up_projections_start_as_the_backbone(name: str, kind: str) -> None:
    if kind in _FAMILIES.get(name, _ALL):
        _, model = _adapted(name, kind)
        expected = tiny(kind).eval()(images(kind))
        torch.testing.assert_close(model(images(kind)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_vpt_uses_its_prompts_and_keeps_the_backbone_s_tokens(kind: str) -> None:
    _, model = _adapted("vpt-deep", kind)
    plain: Any = tiny(kind).eval()
    features = model.forward_features(images(kind))
    assert features.shape == plain.forward_features(images(kind)).shape
    with torch.no_grad():
        first = next(m for m in model.modules() if hasattr(m, "prompt"))
        first.prompt.add_(torch.randn_like(first.prompt))
    assert (model.forward_features(images(kind)) - features).abs().max() > 1e-4


def test_vpt_puts_prompts_after_all_prefix_tokens_and_out_of_the_mean() -> None:
    model: Any = tiny("vit", reg_tokens=2, global_pool="avg").eval()
    prepare_model(method("vpt", prompts=3), model)
    seen = []
    model.blocks[1].register_forward_hook(lambda block, args, output: seen.append(output))
    assert model.forward_features(images("vit")).shape[1] == 3 + 16
    assert seen[0].shape[1] == 3 + 3 + 16


def test_swin_windows_see_prompts_like_appended_tokens() -> None:
    """Extra keys and values equal attention over windows that contain the prompts."""
    _, model = _adapted("vpt-deep", "swin")
    block: Any = model.layers[0].blocks[1]
    x = torch.randn(2, 16, 16, 16)
    windows = x.reshape(32, 16, 16)
    attention, p = block.attn, 3
    attention.context = block.norm1(block.prompt + torch.randn(2, p, 16))  # another per image
    tokens = torch.cat([attention.context.repeat_interleave(16, 0), windows], dim=1)
    q, k, v = attention._heads(tokens)
    bias = torch.zeros(32, attention.num_heads, p + 16, p + 16)
    bias[:, :, p:, p:] = attention._get_rel_pos_bias() + block.attn_mask[:, None].repeat(2, 1, 1, 1)
    weights = (q @ k.transpose(-2, -1) * attention.scale + bias).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))[:, p:]
    torch.testing.assert_close(attention(windows, block.attn_mask), expected)


def test_mlp3_carries_its_batch_norm_statistics() -> None:
    chosen, model = _adapted("mlp-3", "vit")
    model.train()(images("vit"))
    state = chosen.state(model)
    means = [state[key] for key in state if key.endswith("running_mean")]
    assert len(means) == 2 and all(mean.abs().max() > 0 for mean in means)


def test_mlp3_trains_on_a_last_batch_of_one() -> None:
    _, model = _adapted("mlp-3", "vit")
    before = model.head_drop[2].running_mean.clone()
    loss = F.cross_entropy(model.train()(images("vit", 1)), labels(1))
    loss.backward()
    assert torch.equal(model.head_drop[2].running_mean, before)


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    for file, noise in [
        ("vpt", {"prompts": 3, "dropout": 0.5}),
        ("adapter", {"dropout": 0.5, "initialisation": "xavier"}),
        ("adapter_plus", {"drop_path": 0.5}),
        ("adaptformer", {"dropout": 0.5, "scale": 1.0}),
        ("convpass", {"dropout": 0.5}),
        ("mlp3", {"dropout": 0.5}),
    ]:
        _, model = adapted("vit", file, **noise)
        perturb(model)
        assert torch.equal(model(images("vit")), model(images("vit"))), file
        model.train()
        assert not torch.equal(model(images("vit")), model(images("vit"))), file


def test_prompts_of_swin_drop_out_per_image() -> None:
    _, model = adapted("swin", "vpt", prompts=3, dropout=0.5)
    perturb(model)
    same = images("swin", 1).repeat(2, 1, 1, 1)
    torch.testing.assert_close(*model.eval()(same))
    assert not torch.allclose(*model.train()(same))


def test_convpass_handles_grids_that_are_not_square() -> None:
    model = tiny("vit", img_size=(32, 48)).eval()
    prepare_model(method("convpass"), model)
    perturb(model)
    assert model(torch.randn(2, 3, 32, 48)).isfinite().all()


def test_ssf_refuses_what_it_cannot_fold_before_changing_anything() -> None:
    chosen, model = _adapted("ssf", "convnext")
    with torch.no_grad():
        model.norm_pre.ssf_scale[0] = 0.0
    before = model(images("convnext"))
    with pytest.raises(CannotMerge, match="close to zero"):
        chosen.merge(model)
    assert torch.equal(model(images("convnext")), before)


def test_ssf_leaves_out_layers_without_bias() -> None:
    model: Any = tiny("vit", qkv_bias=False)
    chosen = method("ssf")
    prepare_model(chosen, model)
    assert not hasattr(model.blocks[0].attn.qkv, "ssf_scale")
    expected = model.eval()(images("vit"))
    chosen.merge(model)
    torch.testing.assert_close(model(images("vit")), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vpt-shallow", "swin"),
        ("vpt-shallow", "convnext"),
        ("adapter+", "convnext"),
        ("adaptformer", "swin"),
        ("convpass", "swin"),
    ],
)
def test_refuses_other_families_with_a_reason(name: str, kind: str) -> None:
    with pytest.raises(Unsupported, match=kind):
        _adapted(name, kind)


def test_refusals_of_single_models() -> None:
    with pytest.raises(Unsupported, match="only 3 blocks"):
        prepare_model(method("partial_1", last=4), tiny("vit"))
    with pytest.raises(Unsupported, match="no linear classifier"):
        prepare_model(method("mlp3"), tiny("vit", num_classes=0))
    parallel = tiny("vit", block_fn=_parallel_block())
    with pytest.raises(Unsupported, match="plain pre-norm Block"):
        prepare_model(method("adaptformer"), parallel)
    with pytest.raises(UserError, match="bottleneck"):
        method("adapter", bottleneck=0)


def _parallel_block() -> Callable[..., nn.Module]:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


def test_key_biases_are_inert() -> None:
    """9,216 of Bias's 102,912 parameters cannot change the output: the softmax cancels them."""
    _, model = _adapted("bias", "vit")
    expected = model(images("vit"))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[48:96] += 1.0
    torch.testing.assert_close(model(images("vit")), expected)
