"""baselines/spt.py and baselines/gps.py: the authors' own numbers, and the contract."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from method_contract import (
    Batch,
    backbone,
    batch,
    check_contract,
    functions,
    logits,
    loss_fn,
    make,
    prepared,
)
from torch import Tensor, nn

from snella.errors import CannotMerge, Unsupported, UserError
from snella.method import Method, count_parameters, first_images, trainable
from snella.methods.base import prepare_model

Loss = Callable[[nn.Module, Batch], Tensor]
GOLDEN = Path(__file__).parent / "golden" / "spt_gps"
ALLOCATIONS = [(module, size) for module in ("lora", "adapter") for size in (10_000, 4_000)]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The numeric arrays below ``prefix``, as tensors by the rest of their name."""
    return {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(value))
        for key, value in arrays.items()
        if key.startswith(prefix) and value.dtype.kind != "U"
    }


INPUTS = golden("inputs")
IMAGES = torch.from_numpy(INPUTS["images"]).float()
VIEW2 = torch.from_numpy(INPUTS["images_view2"]).float()
LABELS = torch.from_numpy(INPUTS["labels"])
SCORING = [
    {"image": IMAGES[i : i + 4], "view2": VIEW2[i : i + 4], "label": LABELS[i : i + 4]}
    for i in range(0, 16, 4)
]
ALL = {"image": IMAGES, "label": LABELS}


def golden_model() -> nn.Module:
    model = backbone(depth=2)
    weights = under(INPUTS, "weight/")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def five_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(5):
        loss = loss_fn(model, ALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` times the largest expected value."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=tolerance * scale)


# --- SPT ---------------------------------------------------------------------------------------


def spt(module: str, size: int) -> Method:
    return make(
        "spt", module=module, budget=size / 10_000, unit=10_000, variant="released",
        dropout=0.0, drop_path=0.0, scoring_batch_size=4,
    )  # fmt: skip


def ours(name: str) -> str:
    """The released name of a parameter, in a timm model with split qkv."""
    for part in ("q", "k", "v"):
        name = name.replace(f"attn.{part}.", f"attn.qkv.{part}.")
        name = name.replace(f"attn.structured_{part}.", f"attn.qkv.{part}.branch.")
    for part in ("proj", "fc1", "fc2"):
        name = name.replace(f"structured_{part}.", f"{part}.branch.")
    name = name.replace("learnable.0", "down").replace("learnable.1", "up")
    name = name.replace("learnable.2", "up")
    for part in ("weight", "bias"):
        name = name.replace(f".sparse_{part}", f".parametrizations.{part}.0.values")
    return name


def sensitivity(method: Method, model: nn.Module) -> dict[str, Tensor]:
    file, scores = functions(method), {}
    for gradients in file.batch_gradients(
        model, file.candidates(model), SCORING, loss_fn, training=True
    ):
        for name, gradient in gradients.items():
            scores[name] = scores.get(name, 0) + gradient.square()
    return scores


def test_spt_sensitivity_is_the_released_one() -> None:
    arrays = golden("spt_sensitivity")
    method, model = spt("lora", 10_000), golden_model()
    prepare_model(method, model)
    scores = sensitivity(method, model)
    assert list(scores) == [ours(name) for name in arrays["ranked_names"].tolist()]
    loss = sum(loss_fn(golden_model(), part).item() for part in SCORING) / len(SCORING)
    assert loss == pytest.approx(float(arrays["mean_loss"]), rel=1e-6)
    largest = max(float(score.max()) for score in scores.values())
    stored = under(arrays, "sensitivity/")
    for name in arrays["ranked_names"].tolist():
        assert (scores[ours(name)] - stored[name]).abs().max() < 1e-6 * largest, name


@pytest.mark.parametrize("source", ["stored", "recomputed"])
@pytest.mark.parametrize(("module", "size"), ALLOCATIONS)
def test_spt_allocation_is_exactly_the_released_one(module: str, size: int, source: str) -> None:
    arrays, prefix = golden("spt_allocation"), f"{module}/budget_{size}/"
    method, model = spt(module, size), golden_model()
    prepare_model(method, model)
    scores = sensitivity(method, model)
    if source == "stored":
        stored = under(golden("spt_sensitivity"), "sensitivity/")
        scores = {name: stored[name.replace("qkv.", "")] for name in scores}
    found = method.allocate(model, scores)
    assert found.top_k == arrays[prefix + "top_k"]
    assert found.size + 48 == arrays[prefix + "params_total"]
    single = sum(map(len, found.entries.values()))
    assert single == arrays[prefix + "params_unstructured"]
    assert found.size - single == arrays[prefix + "params_structured"]
    vectors = [ours(name) for name in arrays[prefix + "tuned_vectors"].tolist()]
    roles = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    table = arrays[prefix + "structured_matrices"]
    matrices = [f"blocks.{b}.{roles[o]}.weight" for b, o in np.argwhere(table).tolist()]
    assert sorted(found.whole) == sorted(vectors + matrices)
    for name, mask in under(arrays, prefix + "mask/").items():
        expected = mask.flatten().nonzero().flatten()
        assert torch.equal(found.entries.get(ours(name), expected[:0]), expected), name


@pytest.mark.parametrize(("module", "size"), ALLOCATIONS)
def test_spt_five_steps_are_the_released_ones(module: str, size: int) -> None:
    arrays, prefix = golden("spt_finetune"), f"{module}/budget_{size}/"
    method, model = spt(module, size), golden_model()
    prepare_model(method, model)
    method.calibrate(model, SCORING, loss_fn)
    sizes = dict(
        zip(arrays[prefix + "trainable_names"], arrays[prefix + "trainable_sizes"], strict=True)
    )
    assert {n: p.numel() for n, p in trainable(model).items()} == {
        ours(str(name)): int(n) for name, n in sizes.items()
    }
    counts = count_parameters(model)
    assert counts["trainable"] == arrays[prefix + "reported_params_without_head"]
    assert counts["head"] == arrays[prefix + "reported_params_head"]
    start = {ours(name): value for name, value in under(arrays, prefix + "init/").items()}
    assert not model.load_state_dict(start, strict=False).unexpected_keys
    initial = {n: p.detach().clone() for n, p in trainable(model).items()}
    close(logits(model, IMAGES), under(arrays, prefix)["logits_before"])
    losses = five_steps(model, torch.optim.AdamW(method.parameter_groups(model, 1e-3, 1e-4)))
    assert losses == pytest.approx(arrays[prefix + "losses"].tolist(), rel=1e-6)
    close(logits(model, IMAGES), under(arrays, prefix)["logits_after"])
    for name, expected in under(arrays, prefix + "final/").items():
        if "structured_k.learnable.2.bias" in name:
            continue  # no true gradient: a constant added to all keys
        found = trainable(model)[ours(name)].detach()
        if "sparse" in name:
            found = found - initial[ours(name)]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_spt_counts_of_all_released_allocations() -> None:
    """266 files: the modules' sizes on ViT-B/16 and the sum of the parts."""
    shapes = {r: (768, 768) for r in ("q", "k", "v", "proj")}
    shapes |= {"fc1": (3072, 768), "fc2": (768, 3072)}
    module_size = functions(make("spt")).module_size
    rows = list(csv.DictReader((GOLDEN / "spt_released_allocations.csv").open()))
    assert len(rows) == 266
    for row in rows:
        number = {key: int(value) for key, value in row.items() if value.isdecimal()}
        modules = sum(
            number[f"structured_{role}"] * module_size(row["structured_type"], 8, *shape)
            for role, shape in shapes.items()
        )
        assert modules == number["structured_matrix_params"]
        parts = ("full_vector_params", "unstructured_weight_entries", "unstructured_bias_entries")
        trained = modules + sum(number[part] for part in parts) + 768
        assert trained == number["trained_params_without_head"]
        assert trained + number["unstructured_norm_entries"] == number["allocated_params"]


def test_spt_unit_is_a_million_on_vit_b16(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make("spt")
    monkeypatch.setitem(type(method).allocate.__globals__, "search", lambda *args: args[3:])
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    method.adapt(model)
    names = functions(method).candidates(model)
    assert len(names) == 12 * 16 + 2
    scores = {name: model.get_parameter(name) for name in names}
    assert method.allocate(model, scores) == (1_000_000, 0.4 * 1_000_000 - 768)


@pytest.mark.parametrize("module", ["lora", "adapter"])
@pytest.mark.parametrize(
    ("family", "variant", "budget"),
    [
        ("vit", "paper", 2000),
        ("vit", "released", 2000),
        ("swin", "paper", 8000),
        ("convnext", "paper", 2000),
    ],
)
def test_spt_contract(family: str, variant: str, budget: int, module: str) -> None:
    settings = {"dropout": 0.0, "drop_path": 0.0, "rank": 2, "unit": 10_000, "alpha": 2}
    method = make("spt", module=module, variant=variant, budget=budget / 10_000, **settings)
    check_contract(method, family, dead=("qkv.k.branch.up.bias", "qkv.k.bias"))
    model = prepared(method, family)
    method.calibrate(model, [batch()], loss_fn)
    assert count_parameters(model)["trainable"] == pytest.approx(budget, rel=0.3)
    names = list(trainable(model))
    assert any("branch.down" in name for name in names)
    assert any(name.endswith("parametrizations.weight.0.values") for name in names)
    if module == "adapter":
        with pytest.raises(CannotMerge, match="not linear"):
            method.merge(model)


def test_spt_paper_starts_at_the_backbone_and_trains_norm_entries() -> None:
    """The released variant does neither; the paper's trains all that is counted."""
    plain = logits(golden_model().eval(), IMAGES)
    arrays = golden("spt_allocation")
    for variant in ("paper", "released"):
        method = make("spt", unit=10_000, budget=1.0, variant=variant, scoring_batch_size=4)
        model = golden_model().eval()
        prepare_model(method, model)
        method.calibrate(model, SCORING, loss_fn)
        same = torch.allclose(logits(model, IMAGES), plain, atol=1e-5)
        counted = count_parameters(model)["trainable"] == arrays["lora/budget_10000/params_total"]
        assert same == counted == (variant == "paper")


def test_spt_scores_the_first_512_images_in_batches_of_32() -> None:
    for loaded in (1, 20, 64, 100, 1000):
        images = torch.arange(1000).split(loaded)
        scored = list(first_images(({"image": x, "label": x} for x in images), 512, 32))
        assert [len(part["label"]) for part in scored] == [32] * 16
        assert torch.equal(torch.cat([part["image"] for part in scored]), torch.arange(512))
    few = list(first_images([{"image": torch.arange(40)}], 512, 32))
    assert [len(part["image"]) for part in few] == [32, 8]


# --- GPS ---------------------------------------------------------------------------------------


def contrastive(method: Method) -> Loss:
    def loss(model: nn.Module, data: Batch) -> Tensor:
        views = data["image"], data["view2"]
        return functions(method).contrastive_loss(model, *views, data["label"])

    return loss


def gps_gradients(
    method: Method, model: nn.Module, loss: Loss, names: list[str]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for gradients in functions(method).batch_gradients(model, names, SCORING, loss, training=True):
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient
    return total


def test_gps_contrastive_loss_is_the_released_one() -> None:
    arrays = under(golden("gps_gradients"), "supcon/")
    features = arrays["features"].requires_grad_()
    loss = functions(make("gps")).supcon(features, arrays["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-6)
    close(features.grad, arrays["grad"])


def test_gps_features_are_the_class_token_after_the_last_norm() -> None:
    arrays, model = under(golden("gps_gradients"), ""), golden_model().eval()
    features = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    close(features, arrays["features"], 2e-6)
    close(model(IMAGES), arrays["logits"], 2e-6)


@pytest.mark.parametrize("score", ["contrastive", "cross_entropy"])
def test_gps_gradients_and_masks_are_the_released_ones(score: str) -> None:
    arrays = golden("gps_gradients" + ("_ce" if score == "cross_entropy" else ""))
    masks = golden("gps_masks")
    method, model = make("gps"), golden_model()
    loss = loss_fn if score == "cross_entropy" else contrastive(method)
    losses = [loss(model, part).item() for part in SCORING]
    assert losses == pytest.approx(arrays[f"{score}/batch_losses"].tolist(), rel=1e-5)
    expected = under(arrays, f"{score}/grad/")
    gradients = gps_gradients(method, model, loss, list(expected))
    for name, gradient in expected.items():
        close(gradients[name], gradient, 5e-6)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    in_head = sum(n for name, n in sizes.items() if name.startswith("head."))
    for k in (1, 2):
        trains = dict.fromkeys(sizes, 0)
        for name, mask in under(masks, f"{score}/k{k}/trainable/").items():
            part = functions(method).trained_part(name, mask)
            found = torch.full(mask.shape, part == "whole")
            if part == "rows":
                found.view(-1)[functions(method).top_entries(gradients[name], k)] = True
            assert torch.equal(found, mask), name
            trains[name] = int(found.sum())
        total = [sum(trains.values()), sum(sizes.values())]
        counts = under(masks, f"{score}/k{k}/counts_")
        assert counts["total"].tolist() == total
        assert counts["head"].tolist() == [in_head, in_head]
        assert counts["without_head"].tolist() == [n - in_head for n in total]


def gps_golden_model(k: int) -> tuple[Method, nn.Module]:
    """The model whose selection comes from the stored views instead of random ones."""
    method, model = make("gps", connections=k, score="cross-entropy"), golden_model()
    prepare_model(method, model)
    method.calibrate(model, SCORING, contrastive(method))
    return method, model


@pytest.mark.parametrize("k", [1, 2])
def test_gps_five_steps_are_masked_full_training(k: int) -> None:
    """The vectors of the released masked training; the optimizer here holds the selection only."""
    arrays, masks = golden("gps_steps"), golden("gps_masks")
    method, model = gps_golden_model(k)
    counts = count_parameters(model)
    assert counts["trainable"] == masks[f"contrastive/k{k}/counts_without_head"][0]
    assert counts["head"] == masks[f"contrastive/k{k}/counts_head"][0]
    optimizer = torch.optim.Adam(method.parameter_groups(model, float(arrays["lr"]), 0.0))
    losses = five_steps(model, optimizer)
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert held == counts["trainable"] + counts["head"]
    prefix = f"k{k}/adam_wd0/"
    assert losses == pytest.approx(arrays[prefix + "losses"].tolist(), rel=1e-6)
    close(logits(model, IMAGES), under(arrays, prefix)["logits_after"])
    method.merge(model)
    start, weights = golden_model().state_dict(), model.state_dict()
    for name, expected in under(arrays, prefix + "final/").items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6)
    for name, mask in under(masks, f"contrastive/k{k}/trainable/").items():
        assert torch.equal(weights[name][~mask], start[name][~mask]), name


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam_wd0", "adamw_wd0", "adamw_wd0.01"])
def test_gps_reference_training_shows_why_decay_must_not_reach_frozen_weights(
    optimizer: str, k: int
) -> None:
    """Masking gradients as released reproduces its vectors, with frozen weights moved by decay."""
    arrays, masks = golden("gps_steps"), under(golden("gps_masks"), f"contrastive/k{k}/trainable/")
    decay = float(optimizer.partition("_wd")[2])
    model = golden_model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n[:3] not in ("cls", "pos")]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n[:3] in ("cls", "pos")]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    assert arrays["parameter_names"].tolist() == list(start)
    prefix = f"k{k}/{optimizer}/"
    kind = torch.optim.Adam if optimizer == "adam_wd0" else torch.optim.AdamW
    losses = five_steps(model, kind(groups, lr=float(arrays["lr"])))
    assert losses == pytest.approx(arrays[prefix + "losses"].tolist(), rel=1e-6)
    close(logits(model, IMAGES), under(arrays, prefix)["logits_after"])
    for name, expected in under(arrays, prefix + "final/").items():
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=2e-6)
    changes = [((p - start[n]) * ~masks[n]).abs().max().item() for n, p in model.named_parameters()]
    assert max(changes) == pytest.approx(float(arrays[prefix + "max_change_of_frozen"]), rel=1e-3)


def test_gps_mask_rule_on_segment_anything() -> None:
    arrays = golden("segmentation_sam")
    gradients = under(arrays, "mask_rule/grad/")
    file = functions(make("gps"))
    for k in (1, 2):
        for name, mask in under(arrays, f"mask_rule/k{k}/trainable/").items():
            part = file.trained_part(name, mask)
            found = torch.full(mask.shape, part == "whole")
            if part == "rows":
                found.view(-1)[file.top_entries(gradients[name], k)] = True
            assert torch.equal(found, mask), name


@pytest.mark.parametrize("k", [1, 2, 15])
def test_gps_parameters_on_vit_b16(k: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        method = make("gps", connections=k)
        prepare_model(method, model)
        file = functions(method)
        for name, parameter in list(model.named_parameters()):
            if file.trained_part(name, parameter) == "rows":
                file.train_entries(model, name, file.top_entries(parameter, k))
    assert count_parameters(model)["trainable"] == 83_712 * (k + 1)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("score", ["supcon", "cross-entropy"])
def test_gps_contract(score: str, family: str) -> None:
    check_contract(make("gps", score=score), family)


def test_gps_contract_on_segment_anything() -> None:
    check_contract(make("gps", score="cross-entropy"), "sam")
    with pytest.raises(Unsupported, match="use score: cross-entropy"):
        prepared(make("gps"), "sam")


def test_gps_views_are_random_and_keep_the_range() -> None:
    images = batch()["image"]
    view = functions(make("gps")).random_view
    torch.manual_seed(3)
    first, second = view(images), view(images)
    torch.manual_seed(3)
    assert torch.equal(view(images), first)
    assert first.shape == images.shape and not torch.allclose(first, second)
    for channel in range(3):
        assert first[:, channel].min() >= images[:, channel].min() - 1e-4
        assert first[:, channel].max() <= images[:, channel].max() + 1e-4


def test_calibration_without_a_gradient_says_so() -> None:
    method = make("gps", score="cross-entropy")
    model = prepared(method)
    with pytest.raises(UserError, match="training batches"):
        method.calibrate(model, [], loss_fn)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UserError, match="not all zero"):
        method.calibrate(model, [batch()], loss_fn)


def test_gps_scores_whole_batches_and_given_views() -> None:
    file = functions(make("gps"))
    parts = [{"image": torch.zeros(n)} for n in (8, 8, 3)]
    assert [len(part["image"]) for part in file.whole_batches(parts)] == [8, 8]
    assert [len(part["image"]) for part in file.whole_batches(parts[2:])] == [3]
    model, data = backbone().eval(), batch()
    views = torch.stack([data["image"], data["image"].flip(-1)], 1)
    given = file.augmented_loss(model, {"views": views, "label": data["label"]})
    expected = file.contrastive_loss(model, data["image"], data["image"].flip(-1), data["label"])
    torch.testing.assert_close(given, expected)
    assert type(make("gps")).calibration_order == "shuffled"
