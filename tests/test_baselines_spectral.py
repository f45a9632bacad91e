"""baselines/s2ft.py, fact.py and hydralora.py: golden vectors, equations and the contract."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_contract import (
    backbone,
    batch,
    check_contract,
    functions,
    logits,
    loss_fn,
    make,
    parameters_on,
    prepared,
    train,
)
from torch import Tensor, nn

from snella.errors import CannotMerge, Unsupported
from snella.method import Method, count_parameters, trainable
from snella.methods.base import build_method, prepare_model
from snella.suite import plan
from snella.suite.config import load

GOLDEN = Path(__file__).parent / "golden" / "baselines"
S2FT = functions(make("s2ft"))


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items() if k != "settings"}


# --- S2FT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["square", "fused_qkv", "fc1", "fc2"])
def test_s2ft_shares_the_transform_of_fourierft(part: str) -> None:
    gold = {k.split("/")[1]: v for k, v in golden("fourierft_delta").items() if k.startswith(part)}
    weight, values = gold["base_weight"].float(), gold["coefficients"].float().requires_grad_()
    points = gold["indices"][0].long() * weight.shape[1] + gold["indices"][1]
    delta = S2FT.spectral_delta(values, points, weight.shape, float(gold["scaling"]))
    torch.testing.assert_close(delta.detach(), gold["delta_weight"], atol=1e-6, rtol=1e-5)
    y = F.linear(gold["x"].float(), weight + delta, gold["base_bias"].float())
    torch.testing.assert_close(y.detach(), gold["y"], atol=1e-5, rtol=1e-5)
    (y * gold["grad_output"].float()).sum().backward()
    torch.testing.assert_close(values.grad, gold["grad_coefficients"], atol=1e-5, rtol=1e-4)


def spectra(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "_Spectrum"}


def test_s2ft_adapts_query_and_value_in_the_reordered_basis() -> None:
    """ΔW[π_r][:, π_c] is the inverse transform, and nothing but W + ΔW is the new weight."""
    method = make("s2ft", reference_width=None, points=20, alpha=30)
    model = prepared(method)
    assert len(spectra(model)) == 6
    method.calibrate(model, [batch()], loss_fn)
    spectrum = spectra(model)["blocks.1.attn.qkv.v.parametrizations.weight.0"]
    change = model.blocks[1].attn.qkv.v.weight - backbone().blocks[1].attn.qkv.weight[96:]
    rows, columns = spectrum.rows.argsort(), spectrum.columns.argsort()
    assert rows.sort().values.tolist() == list(range(48)) and rows.tolist() != list(range(48))
    full = torch.zeros(48 * 48, dtype=torch.complex64)
    full[spectrum.points] = spectrum.values.detach() + 0j
    expected = 30 * torch.fft.ifft2(full.view(48, 48)).real
    torch.testing.assert_close(change[rows][:, columns], expected, atol=1e-6, rtol=1e-5)


def test_s2ft_estimate_is_the_negative_gradient_sum_of_the_pretrained_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, seen = make("s2ft", reference_width=None, points=20, images=7, batch_size=3), []
    model = prepared(method)
    spectrum = type(next(iter(spectra(model).values())))
    monkeypatch.setattr(spectrum, "follow", lambda self, change, settings: seen.append(change))
    before = logits(model)
    method.calibrate(model, [batch(5), batch(5)], loss_fn)
    assert torch.equal(logits(model), before)
    plain = backbone().eval()
    plain.head.load_state_dict(model.head.state_dict())
    for size in (5, 2):  # the first seven images
        data = {key: value[:size] for key, value in batch(5).items()}
        (-loss_fn(plain, data) * size).backward()
    for found, block in zip(seen[::2], plain.blocks, strict=True):
        expected = block.attn.qkv.weight.grad[:48].double()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_s2ft_order_is_greedy_and_smooths() -> None:
    torch.manual_seed(0)
    smooth = torch.outer(torch.linspace(-1, 1, 30), torch.ones(8)).double()
    matrix = smooth[torch.randperm(30)]
    order = S2FT.nearest_neighbour_order(matrix)
    unvisited = set(range(30)) - {int(order[0])}
    for here, there in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
        nearest = min((matrix[here] - matrix[j]).norm().item() for j in unvisited)
        assert (matrix[here] - matrix[there]).norm().item() == pytest.approx(nearest, abs=1e-9)
        unvisited.remove(there)
    assert (matrix[order].diff(dim=0).norm(dim=1).sum()) < matrix.diff(dim=0).norm(dim=1).sum() / 4


def test_s2ft_points_follow_the_amplitudes() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(10, 10)
    weight[2:4] = 1.0
    points = S2FT.draw_points(weight, 20, dedupe=False)
    assert sorted(points.tolist()) == list(range(20, 40))
    drawn = torch.cat([S2FT.draw_points(1 + weight, 1, dedupe=False) for _ in range(2000)])
    inside = ((drawn >= 20) & (drawn < 40)).double().mean().item()
    assert inside == pytest.approx(40 / 120, abs=0.04)
    distinct = S2FT.draw_points(torch.ones(10, 7), 35, dedupe=True)
    mirror = {(-u % 10) * 7 + (-v % 7) for u, v in (divmod(int(p), 7) for p in distinct)}
    own = {p for p in distinct.tolist() if p == (-(p // 7) % 10) * 7 + (-(p % 7) % 7)}
    assert len(set(distinct.tolist())) == 35 and not (mirror - own) & set(distinct.tolist())


def test_s2ft_real_coefficients_reach_the_symmetric_half_only() -> None:
    points = torch.arange(36)
    shape = torch.Size((6, 6))
    flip = -torch.arange(6) % 6
    real = S2FT.spectral_delta(torch.randn(36), points, shape, 1.0)
    torch.testing.assert_close(real, real[flip][:, flip])
    any_matrix = torch.randn(6, 6)
    values = torch.fft.fft2(any_matrix).flatten()
    torch.testing.assert_close(S2FT.spectral_delta(values, points, shape, 1.0), any_matrix)


@pytest.mark.parametrize("family", ["vit", "swin", "sam"])
@pytest.mark.parametrize(
    "settings", [{}, {"coefficients": "complex", "dedupe": True, "init": "zeros", "gamma": 0.0}]
)
def test_s2ft_contract(family: str, settings: dict) -> None:
    check_contract(
        make("s2ft", reference_width=None, points=30, alpha=5, **settings), family, lr=1e-4
    )


def test_s2ft_counts_and_sizes() -> None:
    assert parameters_on("vit_base_patch16_224", make("s2ft")) == 72_000
    model = prepared(make("s2ft"))
    one = next(iter(spectra(model).values()))
    assert len(one.points) == round(3000 / 256) and one.alpha == pytest.approx(300 / 256)
    with pytest.raises(Unsupported, match="3000 points do not fit"):
        prepared(make("s2ft", reference_width=None))
    with pytest.raises(Unsupported, match="no q/v linear layers"):
        method = make("s2ft", reference_width=None, points=10)
        method.adapt(backbone("convnext"))


def test_s2ft_has_the_papers_number_of_points_in_each_matrix_of_sd3() -> None:
    config = load(overrides={"suite": "dreambooth"})
    row = plan.resolve(config, "s2ft-8000", "dreambooth-cat", 0).method
    method = build_method(Path(row.file), row.hyperparameters)
    spectrum = S2FT._Spectrum(method, torch.empty(1536, 1536))
    assert (len(spectrum.points), spectrum.alpha) == (8000, 300)


def test_s2ft_coefficients_have_their_own_rate() -> None:
    method = make("s2ft", reference_width=None, points=10, lr_ratio=50)
    groups = method.parameter_groups(prepared(method), 1e-3, 1e-4)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (6, pytest.approx(0.05), 0.0),
        (1, 1e-3, 1e-4),
        (1, 1e-3, 0.0),
    ]


def test_s2ft_is_deterministic_under_a_seed() -> None:
    method = make("s2ft", reference_width=None, points=10)
    states = []
    for seed in (1, 1, 2):
        model = prepared(method, seed=seed)
        method.calibrate(model, [batch()], loss_fn)
        states.append(torch.cat([s.points for s in spectra(model).values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


# --- FacT --------------------------------------------------------------------------------------


def fact_golden_model(method: Method, gold: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """The plain and the adapted network of the vectors, in double precision."""
    plain = backbone(depth=2)
    plain.load_state_dict({k[2:]: v.float() for k, v in gold.items() if k.startswith("w/")})
    plain = plain.double().eval()
    model = copy.deepcopy(plain)
    prepare_model(method, model)
    state = {n: fact_factor(n, gold, "factor/") for n in trainable(model) if "head" not in n}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return plain, model


def fact_factor(name: str, gold: dict[str, Tensor], prefix: str) -> Tensor:
    """The released factor, or stack of factors, that our parameter ``name`` is."""
    shared = {"fact.u": "FacTu.weight", "fact.v": "FacTv.weight", "fact.c": "FacTc"}
    shared["fact.p"] = "FacTp"
    if name in shared:
        return gold[prefix + shared[name]].double()
    layer = name.removesuffix(".core")
    parts = [layer.replace("qkv", part) for part in "qkv"] if "qkv" in layer else [layer]
    return torch.cat([gold[f"{prefix}{part}_FacTs.weight"].double() for part in parts])


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_is_the_released_one(form: str) -> None:
    gold = golden(f"fact_{form}")
    rank = len(gold["factor/FacTu.weight"])
    method = make("fact", form=form, rank=rank, scale=10, dropout=0, variant="released")
    plain, model = fact_golden_model(method, gold)
    found = model(gold["images"].double())
    loss = F.cross_entropy(found, gold["labels"])
    loss.backward()
    torch.testing.assert_close(found.detach(), gold["logits"], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(loss.detach(), gold["loss"], atol=1e-7, rtol=1e-7)
    for name, parameter in trainable(model).items():
        head = gold.get(f"grad/{name}")
        expected = fact_factor(name, gold, "grad/") if head is None else head
        torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-7)
    method.merge(model)
    torch.testing.assert_close(model(gold["images"].double()), found, atol=1e-10, rtol=1e-10)
    for name, expected in gold.items():
        if name.startswith("delta/"):
            block, part = name.removeprefix("delta/").rsplit(".", 1)
            path = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.get(part, "attn.qkv")
            change = [m.get_parameter(f"{block}.{path}.weight") for m in (model, plain)]
            delta = (change[0] - change[1]).detach()
            if part in "qkv":
                delta = delta.chunk(3)["qkv".index(part)]
            torch.testing.assert_close(delta.float(), expected, atol=1e-6, rtol=1e-5)


def test_fact_tucker_of_the_paper_treats_all_twelve_matrices_alike() -> None:
    method = make("fact", form="tk", rank=3, scale=2, dropout=0)
    model = prepared(method)
    nn.init.normal_(model.fact.v)
    u, v, c, p = (getattr(model.fact, name).detach() for name in "uvcp")
    plain = copy.deepcopy(model)
    expected = [2 * v @ (c @ p[:, i]).T @ u for i in range(12, 24)]
    method.merge(model)
    paths = {"attn.qkv": 0, "attn.proj": 0, "mlp.fc1": 0, "mlp.fc2": 1}
    found = []
    for path, axis in paths.items():
        before, after = (m.blocks[1].get_parameter(f"{path}.weight") for m in (plain, model))
        found += (after - before).split(48, dim=axis)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_fact_contract(form: str, variant: str) -> None:
    check_contract(make("fact", form=form, rank=4, scale=10, dropout=0, variant=variant))


def test_fact_copies_share_nothing_and_states_hold_each_factor_once() -> None:
    model = prepared(make("fact", rank=4))
    assert sum("fact." in key for key in model.state_dict()) == 2
    twin = copy.deepcopy(model)
    assert twin.blocks[0].mlp.fc1.factors[0] is twin.fact


@pytest.mark.parametrize(
    ("form", "rank", "expected"), [("tt", 16, 61_440), ("tk", 16, 30_976), ("tk", 32, 86_528)]
)
def test_fact_parameters_on_vit_b16(form: str, rank: int, expected: int) -> None:
    assert parameters_on("vit_base_patch16_224", make("fact", form=form, rank=rank)) == expected


def test_fact_refuses_what_it_cannot_cut_into_blocks() -> None:
    model = backbone(depth=1, mlp_ratio=2.5)
    with pytest.raises(Unsupported, match="blocks of 48 x 48"):
        prepare_model(make("fact"), model)
    with pytest.raises(Unsupported, match="does not support swin"):
        prepared(make("fact"), "swin")


# --- HydraLoRA ---------------------------------------------------------------------------------


def test_hydralora_is_its_equation() -> None:
    method = make("hydralora", rank=4, experts=3, alpha=8)
    model = prepared(method)
    layer = model.blocks[0].attn.qkv.v
    nn.init.normal_(layer.b.weight)
    x = torch.randn(2, 7, 48)
    routes = (x @ layer.router.weight.T).softmax(-1)
    expected = x @ layer.weight.T + layer.bias
    for i, b in enumerate(layer.b.weight.split(4, dim=1)):
        expected = expected + 8 / 4 * routes[..., i : i + 1] * (x @ layer.a.weight.T @ b.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "swin", "sam"])
@pytest.mark.parametrize("experts", [1, 3])
def test_hydralora_contract(experts: int, family: str) -> None:
    dead = ("router",) if experts == 1 else ()
    check_contract(make("hydralora", rank=4, experts=experts), family, dead=dead)


def test_hydralora_starts_at_the_backbone_and_merges_with_one_expert_only() -> None:
    method = make("hydralora")
    model = prepared(method)
    torch.testing.assert_close(logits(model), logits(backbone().eval()))
    train(method, model, steps=2)
    with pytest.raises(CannotMerge, match="for every token"):
        method.merge(model)
    assert count_parameters(model)["trainable"] == 6 * (8 * 48 + 2 * 8 * 48 + 2 * 48)


def test_hydralora_parameters_on_vit_b16() -> None:
    assert parameters_on("vit_base_patch16_224", make("hydralora")) == 479_232
    settings = {"experts": 4, "roles": ["q"]}
    assert parameters_on("vit_base_patch16_224", make("hydralora", **settings)) == 405_504
