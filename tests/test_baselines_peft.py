"""baselines/peft.py: every library method on every family, and what PEFT leaves to the caller."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from method_contract import backbone as tiny
from method_contract import logits, loss_fn
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load, save
from torch import Tensor, nn

from snella.check import Subject
from snella.check.contract import base_count
from snella.errors import Unsupported, UserError
from snella.method import Method, count_parameters, trainable
from snella.methods.base import build_method, prepare_model
from snella.models.tiny import toy_batch

FILE = Path(__file__).parents[1] / "baselines" / "peft.py"
GOLDEN = Path(__file__).parent / "golden" / "baselines"
SETTINGS = {
    "lora": {"rank": 4},
    "lora_plus": {"rank": 4},
    "lora_fa": {"rank": 4},
    "rslora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "olora": {"rank": 4, "alpha": 6},
    "corda": {"rank": 4, "alpha": 6},
    "lora_ga": {"rank": 4},
    "adalora": {"rank": 2},
    "fourierft": {"alpha": 10, "options": {"n_frequency": 40}},
    "waveft": {"options": {"n_frequency": 40}},
    "vera": {"rank": 16},
    "shira": {"rank": 2},
    "oft": {"options": {"oft_block_size": 8}},
    "hra": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {"rank": 4},
    "miss": {"rank": 4},
    "delora": {"rank": 4},
    "randlora": {"rank": 4},
}
NOT_IDENTICAL_AT_START = {"fourierft"}
FAMILIES = ["vit", "swin", "convnext", "sam"]


def make(name: str, **settings: object) -> Method:
    return build_method(FILE, {"method": name, **SETTINGS[name], **settings})


def backbone(family: str = "vit") -> nn.Module:
    return tiny(family, **({"depth": 2} if family == "vit" else {}))


def batch() -> dict[str, Tensor]:
    return toy_batch(size=6)


def prepared(method: Method, family: str = "vit", seed: int = 1) -> nn.Module:
    model = backbone(family).eval()
    torch.manual_seed(seed)
    prepare_model(method, model)
    return model


def fit(method: Method, model: nn.Module, epochs: int = 4, lr: float = 5e-3) -> list[float]:
    """Two steps per epoch on one batch, with all hooks; returns the losses."""
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr, 1e-4))
    losses = []
    for epoch in range(epochs):
        method.on_epoch_start(model, epoch, epochs)
        for _ in range(2):
            loss = loss_fn(model, batch())
            extra = method.auxiliary_loss(model, batch(), loss_fn)
            optimizer.zero_grad()
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
            method.on_step_end(model)
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_contract(name: str, family: str) -> None:
    """Starts where the backbone is, learns, moves nothing frozen, restores, merges."""
    if name == "oft" and family in {"convnext", "sam"}:
        with pytest.raises(Unsupported, match="OFT"):
            prepared(make(name), family)
        return
    method = make(name)
    plain = backbone(family).eval()
    keys, types = list(plain.state_dict()), [type(m) for m in plain.modules()]
    model = prepared(method, family)
    method.calibrate(model, [batch(), batch()], loss_fn)
    if name not in NOT_IDENTICAL_AT_START:
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.clone() for n, p in trainable(model).items()}
    losses = fit(method, model, epochs=1 if name == "adalora" else 4)  # later it prunes
    assert min(losses[-2:]) < losses[0]
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n
        else:
            assert not torch.equal(p, start[n]), n

    expected = logits(model)
    state = load(save(method.state(model)))
    fresh = prepared(method, family, seed=2)
    method.load_state(fresh, state)
    assert torch.equal(logits(fresh), expected)
    assert method.state(fresh).keys() == state.keys()

    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(twin.train()).isfinite().all()
    method.merge(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types


def test_every_kind_is_tested() -> None:
    choices = type(make("lora")).model_json_schema()["properties"]["method"]["enum"]
    assert set(choices) == set(SETTINGS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 8, "roles": ["q", "k", "v"], "fused_qkv": True}, 294_912),
        ({"rank": 16, "roles": ["q", "k", "v"], "fused_qkv": True}, 589_824),
        ({"rank": 8, "roles": ["q", "v"]}, 294_912),
        ({"method": "lora_plus", "rank": 8, "roles": ["q", "v"]}, 294_912),
        ({"method": "lora_fa", "rank": 8, "roles": ["q", "v"]}, 147_456),
        ({"rank": 8}, 1_327_104),
        ({"method": "dora", "rank": 8}, 1_327_104 + 12 * (4 * 768 + 3072 + 768)),
        ({"method": "fourierft", "roles": ["q", "v"], "options": {"n_frequency": 3000}}, 72_000),
        ({"method": "fourierft", "roles": ["q", "v"], "options": {"n_frequency": 6000}}, 144_000),
    ],
)
def test_parameters_on_vit_b16(settings: dict, expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    prepare_model(build_method(FILE, settings), model)
    assert count_parameters(model) == {
        "trainable": expected,
        "head": 7690,
        "total": 85_798_656 + 7690 + expected + (147_456 if "fa" in str(settings) else 0),
    }


def test_the_lora_row_on_a_backbone_without_attention() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_base", num_classes=10)
    prepare_model(build_method(FILE, {"roles": ["q", "k", "v"], "fused_qkv": True}), model)
    depths, widths = (3, 3, 27, 3), (128, 256, 512, 1024)
    expected = sum(n * 2 * 8 * 5 * width for n, width in zip(depths, widths, strict=True))
    assert count_parameters(model)["trainable"] == expected == 1_443_840


def test_parameters_on_sam_vit_b() -> None:
    """SNELLA's Table 5: 4.72 M = 4,058,596 of the decoder + 663,552, if qkv and fc1 are meant."""
    modeling = pytest.importorskip("segment_anything.modeling")
    with torch.device("meta"):
        model = modeling.ImageEncoderViT(embed_dim=768, depth=12, num_heads=12)
    settings = {"rank": 8, "roles": ["q", "k", "v", "fc1"], "fused_qkv": True}
    prepare_model(build_method(FILE, settings), model)
    assert count_parameters(model)["trainable"] == 663_552


def test_lora_is_its_equation() -> None:
    method = make("lora", alpha=8, roles=["v"])
    model = prepared(method)
    fit(method, model, epochs=1)
    plain, layer = backbone().blocks[0].attn.qkv, model.blocks[0].attn.qkv.v
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 7, 48)
    expected = x @ (plain.weight[96:] + 8 / 4 * b @ a).T + plain.bias[96:]
    torch.testing.assert_close(model.blocks[0].attn.qkv(x)[..., 96:], expected)


def test_patch_embedding_and_head_are_never_wrapped() -> None:
    model = prepared(make("lora"))
    assert type(model.patch_embed.proj) is nn.Conv2d
    assert type(model.get_classifier()) is nn.Linear


@pytest.mark.parametrize("part", ["square", "fused_qkv", "fc1", "fc2"])
def test_fourierft_golden(part: str) -> None:
    gold = {
        k.split("/")[1]: v for k, v in np.load(GOLDEN / "fourierft_delta.npz").items() if part in k
    }
    roles = {"square": ["proj"], "fused_qkv": ["q", "k", "v"], "fc1": ["fc1"], "fc2": ["fc2"]}
    path = {"square": "attn.proj", "fused_qkv": "attn.qkv"}.get(part, f"mlp.{part}")
    count = {"n_frequency": gold["coefficients"].size}
    settings = {"roles": roles[part], "fused_qkv": True, "options": count}
    method = make("fourierft", alpha=float(gold["scaling"]), **settings)
    model = prepared(method)
    path = f"blocks.0.{path}"
    layer = model.get_submodule(path)
    assert torch.equal(layer.indices["default"], torch.from_numpy(gold["indices_seed777"]).long())

    state = method.state(model)
    state[f"{path}.indices"] = torch.from_numpy(gold["indices"]).long()
    state[f"{path}.fourierft_spectrum.default"] = torch.from_numpy(gold["coefficients"]).float()
    method.load_state(model, state)
    base = layer.get_base_layer()
    base.weight.data = torch.from_numpy(gold["base_weight"]).float()
    base.bias.data = torch.from_numpy(gold["base_bias"]).float()
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, torch.from_numpy(gold["delta_weight"]), atol=1e-6, rtol=1e-5)
    y = layer(torch.from_numpy(gold["x"]).float())
    torch.testing.assert_close(y, torch.from_numpy(gold["y"]), atol=1e-5, rtol=1e-5)
    (y * torch.from_numpy(gold["grad_output"]).float()).sum().backward()
    found = layer.fourierft_spectrum["default"].grad
    expected = torch.from_numpy(gold["grad_coefficients"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_lora_fa_trains_b_alone_and_saves_a() -> None:
    method = make("lora_fa", roles=["q"])
    model = prepared(method)
    assert not [n for n in trainable(model) if "lora_A" in n]
    assert sum("lora_A" in n for n in method.state(model)) == 2


def test_lora_plus_speeds_up_b_alone() -> None:
    method = make("lora_plus", lr_ratio=8)
    model = prepared(method)
    rates = {
        id(p): group["lr"]
        for group in method.parameter_groups(model, 1e-3, 0.1)
        for p in group["params"]
    }
    for name, parameter in trainable(model).items():
        assert rates[id(parameter)] == (8e-3 if "lora_B" in name else 1e-3), name


def test_lr_ratio_spares_the_head() -> None:
    model = prepared(method := make("fourierft", lr_ratio=100))
    groups = method.parameter_groups(model, 1e-3, 0.1)
    assert {g["lr"] for g in groups} == {1e-3, 0.1}
    slow = [p.shape for g in groups if g["lr"] == 1e-3 for p in g["params"]]
    assert sorted(slow) == [(5,), (5, 48)]


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga"])
def test_changed_weights_are_restored_under_another_decomposition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's SVD may flip signs: the initial factors in the state settle it."""
    method = make(name)
    model = prepared(method)
    method.calibrate(model, [batch()], loss_fn)
    fit(method, model)
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def flipped(*args: Tensor, **kwargs: bool) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = svd(*args, **kwargs)
        return -u.flip(1), s.flip(0), -v.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    monkeypatch.setattr(torch.linalg, "qr", lambda w: (-qr(w)[0], -qr(w)[1]))
    fresh = prepared(method, seed=3)
    method.load_state(fresh, method.state(model))
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=1e-5)


def test_vera_shares_and_saves_its_projections_once() -> None:
    method = make("vera")
    state = method.state(prepared(method))
    assert sum("vera_A" in name for name in state) == 1
    fresh = prepared(method)
    key = next(name for name in state if "vera_A" in name)
    state[key] = torch.randn_like(state[key])
    method.load_state(fresh, state)
    for block in fresh.blocks:
        assert torch.equal(block.mlp.fc2.vera_A["default"], state[key])


@pytest.mark.parametrize("size", [1, 4, 6])
def test_corda_equals_peft(size: int) -> None:
    """In batches of any size, covariances and factors are those of PEFT's, image by image."""
    single = [{k: v[i : i + 1] for k, v in batch().items()} for i in range(6)]
    batches = [{k: v[i : i + size] for k, v in batch().items()} for i in range(0, 6, size)]
    method = make("corda", alpha=4, roles=["proj", "fc2"])
    model = prepared(method)
    method.calibrate(model, batches, loss_fn)

    theirs = backbone().eval()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["attn.proj", "mlp.fc2"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    )
    preprocess_corda(theirs, config, lambda: [theirs(b["image"]) for b in single])
    theirs = peft.get_peft_model(theirs, config).base_model.model
    for block, other in zip(model.blocks, theirs.blocks, strict=True):
        for layer, reference in (
            (block.attn.proj, other.attn.proj),
            (block.mlp.fc2, other.mlp.fc2),
        ):
            close = {} if size == 1 else {"rtol": 1e-3, "atol": 1e-4}  # another order of the sums
            torch.testing.assert_close(layer.weight, reference.weight, **close)
            a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
            torch.testing.assert_close(layer.initial_B @ layer.initial_A, b @ a, **close)


def test_lora_ga_equals_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], v[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)  # the library's draws random vectors
    method = make("lora_ga", roles=["proj"])
    model = prepared(method)
    method.calibrate(model, [batch(), batch()], loss_fn)

    theirs = backbone()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["attn.proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    theirs.requires_grad_(False)
    preprocess_loraga(theirs, config, lambda: loss_fn(theirs, batch()).backward())
    theirs = peft.get_peft_model(theirs, config).base_model.model
    for block, other in zip(model.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(block.attn.proj.weight, other.attn.proj.weight)
        assert block.attn.proj.weight.grad is None


def test_adalora_penalty_is_the_one_peft_drops() -> None:
    method = make("adalora")
    model = prepared(method)

    class Output:
        loss = torch.zeros(())

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self) -> Output:
            return Output()

    config = peft.AdaLoraConfig(target_r=2, init_r=3, total_step=10, target_modules=["fc1"])
    tuner = peft.AdaLoraModel(Wrapped(backbone()), config, "default")
    tuner.model = Wrapped(model)
    expected = tuner.forward().loss
    torch.testing.assert_close(
        method.auxiliary_loss(model, batch(), loss_fn), expected.detach(), check_device=False
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_adalora_ends_at_its_target(rank: int) -> None:
    method = make("adalora", rank=rank)
    model = prepared(method)
    fit(method, model, epochs=10)
    ranks = [int((m.lora_E["default"] != 0).sum()) for m in model.modules() if hasattr(m, "lora_E")]
    assert sum(ranks) == rank * len(ranks)
    assert len(set(ranks)) > 1
    assert not [n for n in method.training_state(model) if n.startswith("ipt")]


def test_adalora_resumes_to_the_identical_model() -> None:
    method = make("adalora")

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            method.on_epoch_start(model, epoch, 10)
            for _ in range(2):
                optimizer.zero_grad()
                loss_fn(model, batch()).backward()
                optimizer.step()
                method.on_step_end(model)

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(method.parameter_groups(model, 0.1, 0.0))

    whole = prepared(method)
    run(whole, sgd(whole), range(10))
    for stop in (4, 8):
        model, resumed = prepared(method), prepared(method, seed=2)
        run(model, sgd(model), range(stop))
        method.load_state(resumed, method.state(model))
        method.load_training_state(resumed, method.training_state(model))
        run(resumed, sgd(resumed), range(stop, 10))
        assert torch.equal(logits(resumed), logits(whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"options": {"use_dorra": True}}, "Did you mean 'use_dora'"),
        ({"options": {"use_dora": "perhaps"}}, "use_dora of PEFT's LoraConfig"),
        ({"options": {"target_modules": ["proj"]}}, "Unknown option"),
        ({"method": "vera", "alpha": 2}, "VeraConfig has no alpha"),
        ({"method": "fourierft", "rank": 2}, "FourierFTConfig has no rank"),
        ({"fused_qkv": True, "roles": ["q", "v"]}, "fused_qkv"),
        ({"rank": 0}, "rank"),
        ({"roles": ["query"]}, "roles"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_method(FILE, settings)
    assert "\n" not in str(caught.value)


def test_a_size_the_library_refuses_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="shira"):
        prepared(make("shira", rank=100))


def test_adalora_trains_no_counter_of_ranks() -> None:
    """PEFT marks it where it moves a layer, e.g. to the device on which parameters are counted."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    prepare_model(method := build_method(FILE, {"method": "adalora", "rank": 8}), model)
    assert method.count(model)["trainable"] == 1_327_104 + 72 * 8
    assert base_count(Subject(method, "vit")) == "1,327,680"


def test_adalora_counts_the_ranks_of_its_budget() -> None:
    method = make("adalora", rank=2)
    model = prepared(method)
    layers = [m for m in model.modules() if hasattr(m, "lora_E")]
    one = sum(m.lora_A["default"].shape[1] + m.lora_B["default"].shape[0] + 1 for m in layers)
    assert count_parameters(model)["trainable"] == 3 * one
    assert method.count(model)["trainable"] == 2 * one
    fit(method, model, epochs=10)
    kept = sum(
        int((m.lora_E["default"] != 0).sum())
        * (m.lora_A["default"].shape[1] + m.lora_B["default"].shape[0] + 1)
        for m in layers
    )
    assert method.count(model)["trainable"] == kept


@pytest.mark.parametrize("rank", [2, 4])
def test_adalora_has_scale_one_at_every_rank_unless_told(rank: int) -> None:
    model = prepared(make("adalora", rank=rank))
    layer = next(m for m in model.modules() if hasattr(m, "lora_E"))
    assert layer.scaling["default"] / float(layer.ranknum["default"]) == pytest.approx(1.0)


def test_fourierft_decays_its_spectrum_as_released() -> None:
    method = make("fourierft", rank=None, options={"n_frequency": 10})
    model = prepared(method)
    decays = {
        id(p): group["weight_decay"]
        for group in method.parameter_groups(model, 0.1, 1e-3)
        for p in group["params"]
    }
    spectra = [p for n, p in model.named_parameters() if "spectrum" in n]
    assert spectra and {decays[id(p)] for p in spectra} == {1e-3}
