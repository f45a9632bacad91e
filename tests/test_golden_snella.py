"""The released code's numbers: single layers, allocator traces, schedules, a whole training run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from snella_golden import (
    GOLDEN,
    load,
    snella_parameters,
    snella_tensor,
    tiny_vit,
)
from torch import Tensor

from snella import SnellaConfig
from snella.equations.allocation import Importance, Schedule, allocate, allocate_released
from snella.equations.kernels import Kernel, merge
from snella.equations.sparsify import budget_from_sparsity, keep_mask, select, sparsify

MODULES = sorted(path.name for path in (GOLDEN / "modules").glob("*.npz"))
DOUBLE = [name for name in MODULES if "float32" not in name]


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def golden_layer(name: str) -> tuple[dict[str, np.ndarray], Kernel, Tensor, Tensor, Tensor]:
    data = load(f"modules/{name}")
    mixed = "alpha" in data
    kernel = Kernel(
        "mix-k" if mixed else "piecewise-linear",
        int(data["rank"]),
        int(data["pieces"]),
        learnable_coefficients=False,
        temperature=True,
    )
    a, b = tensor(data["In_Qs"])[None], tensor(data["Out_Qs"])[None]
    scalars = a.new_zeros(1, 0)
    if mixed:
        scalars = torch.stack([tensor(data[k]) for k in ("alpha", "beta", "gamma")], 1)
    for leaf in (a, b, scalars):
        leaf.requires_grad_()
    return data, kernel, a, b, scalars


def close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-9) -> None:
    reference = tensor(expected).to(actual)
    torch.testing.assert_close(
        actual.detach(), reference, rtol=rtol, atol=rtol * float(reference.abs().max()) + 1e-300
    )


@pytest.mark.parametrize("name", DOUBLE)
def test_single_layer(name: str) -> None:
    data, kernel, a, b, scalars = golden_layer(name)
    merged = merge(kernel, a, b, scalars)[0]
    close(merged, data["merged"].T)
    update = merged
    if not np.isnan(data["sparsity"]):
        budget = budget_from_sparsity(float(data["sparsity"]), merged.numel(), "quantile")
        assert budget == int(data["kept"])
        update = sparsify(merged, budget, "released")
        assert int((update != 0).sum()) == budget
    close(update, data["sparse"].T)
    x = tensor(data["x"]).requires_grad_()
    y = x @ update.T
    close(y, data["y"])
    (y * tensor(data["g"])).sum().backward()
    for leaf, key in ((x, "grad_x"), (a, "grad_In_Qs"), (b, "grad_Out_Qs")):
        close(leaf.grad.view(data[key].shape), data[key])
    for k, key in enumerate(("grad_alpha", "grad_beta", "grad_gamma")):
        if key in data:
            close(scalars.grad[:, k], data[key])


def mostly_close(actual: Tensor, expected: np.ndarray, rtol: float, share: float) -> None:
    """Entries nearer to the threshold than rounding may be kept here and dropped there."""
    reference = tensor(expected).to(actual)
    near = (actual - reference).abs() <= rtol * reference.abs().max()
    assert near.float().mean() >= share


def test_wide_single_precision_layer() -> None:
    (name,) = set(MODULES) - set(DOUBLE)
    data, kernel, a, b, scalars = golden_layer(name)
    merged = merge(kernel, a, b, scalars)[0]
    close(merged[:16, :16], data["merged_block"].T, 1e-5)
    assert float(merged.detach().double().norm()) == pytest.approx(
        float(data["merged_fro"]), rel=1e-5
    )
    close(merged.double().sum(0), data["merged_rowsum"], 1e-5)
    budget = budget_from_sparsity(0.9, merged.numel(), "quantile")
    assert abs(budget - int(data["kept"])) <= 2
    update = sparsify(merged, budget, "released")
    assert int(keep_mask(merged, select(merged, budget)).sum()) == budget
    assert float(update.detach().double().norm()) == pytest.approx(
        float(data["sparse_fro"]), rel=1e-5
    )
    x = tensor(data["x"]).requires_grad_()
    y = x @ update.T
    mostly_close(y.detach(), data["y"], 1e-4, 0.99)
    (y * tensor(data["g"])).sum().backward()
    mostly_close(x.grad, data["grad_x"], 1e-4, 0.99)
    for leaf, key in ((a, "grad_In_Qs"), (b, "grad_Out_Qs")):
        mostly_close(leaf.grad[0, :, :16, :4], data[f"{key}_block"], 1e-3, 0.99)
        assert float(leaf.grad.norm()) == pytest.approx(float(data[f"{key}_fro"]), rel=1e-3)


@pytest.mark.parametrize("trace", ["plain", "skewed", "nan"])
def test_allocator_trace(trace: str) -> None:
    data = load(f"allocator_trace_{trace}.npz")
    sizes = [int(n * m) for n, m in data["sizes"]]
    total, steps, epochs = sum(sizes), int(data["steps_per_epoch"]), int(data["total_epochs"])
    importance = Importance(
        float(data["beta1"]), float(data["beta2"]), from_first=False, skip_nonfinite=False
    )
    schedule = Schedule(
        (1 - float(data["init_sparsity"])) * total,
        (1 - float(data["target_sparsity"])) * total,
        reach_target=False,
    )
    for epoch in range(4):
        assert schedule.budget(epoch, epochs) == int(data["total_budget"][epoch])
        assert schedule.reallocates(epoch, epochs) == bool(data["allocated"][epoch])
        if epoch:
            means = [float(score) for score in importance.scores()]
            scores = [a + b for a, b in zip(means[::2], means[1::2], strict=True)]
            np.testing.assert_allclose(scores, data["score_raw"][epoch], rtol=1e-12)
            granted = allocate_released(scores, sizes, schedule.budget(epoch, epochs))
            assert granted == data["layer_budget"][epoch].tolist()
        if epoch == int(data["epochs_fed"]):
            break
        for step in range(epoch * steps, (epoch + 1) * steps):
            keys = [f"{side}_{layer}" for layer in range(len(sizes)) for side in ("In", "Out")]
            importance.update(
                [tensor(data[f"param_{key}"][step])[None] for key in keys],
                [tensor(data[f"grad_{key}"][step])[None] for key in keys],
            )
        for key, sensitivity, uncertainty in zip(
            keys, importance.sensitivity, importance.uncertainty, strict=True
        ):
            close(sensitivity[0], data[f"ema_sens_{key}"][epoch], 1e-12)
            close(uncertainty[0], data[f"ema_unc_{key}"][epoch], 1e-12)


def test_sharing_rule_alone() -> None:
    data = load("budget_allocation_cases.npz")
    for k in range(int(data["cases"])):
        sizes, budget = data[f"sizes_{k}"].tolist(), int(data[f"budget_{k}"])
        scores = data[f"score_{k}"].tolist()
        released = np.array(allocate_released(scores, sizes, budget))
        assert np.array_equal(released, data[f"alloc_{k}"])
        exact = np.array(allocate(scores, sizes, budget))
        assert np.abs(exact - data[f"alloc_{k}"]).max() <= 10
        assert exact.sum() == min(budget, sum(sizes))


@pytest.mark.parametrize("name", ["budget_schedule.npz", "budget_schedule_warmup.npz"])
def test_schedule(name: str) -> None:
    data = load(name)
    total, epochs = int(data["total_weights"]), int(data["total_epochs"])
    settings = (int(data[k]) for k in ("init_warmup", "final_warmup", "mask_interval"))
    warmup, cooldown, interval = settings
    for (start, target), budget, allocated in zip(
        data["pairs"], data["budget"], data["allocated"], strict=True
    ):
        schedule = Schedule(
            (1 - start) * total, (1 - target) * total, "cubic", warmup, cooldown, interval, False
        )
        assert [schedule.budget(e, epochs) for e in range(epochs)] == [int(b) for b in budget]
        assert [schedule.reallocates(e, epochs) for e in range(epochs)] == allocated.tolist()


def adapted_tiny_vit(run: dict[str, np.ndarray]) -> PeftModel:
    weights = load("vit_tiny_weights.npz")
    config = SnellaConfig(
        rank=int(run["rank"]),
        variant="released",
        dropout=0.0,
        drop_path=0.0,
        initial_sparsity=float(run["init_sparsity"]),
        target_sparsity=float(run["target_sparsity"]),
    )
    model = get_peft_model(tiny_vit(run, weights), config).double()
    for name, parameter in model.named_parameters():
        if "head" in name or "cls_token" in name:
            parameter.requires_grad_(True)
    with torch.no_grad():
        for block, layer, field, parameter in snella_parameters(model):
            parameter.copy_(snella_tensor(weights, block, layer, field))
    return model


def optimizer_of(model: PeftModel, run: dict[str, np.ndarray]) -> torch.optim.Optimizer:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim == 1 or "cls_token" in n]
    decayed = [p for n, p in named if not (p.ndim == 1 or "cls_token" in n)]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": float(run["weight_decay"])},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=float(run["lr"]),
        betas=tuple(map(float, run["adam_betas"])),
        eps=float(run["adam_eps"]),
    )


def test_whole_model_run() -> None:
    """Five AdamW steps over three epochs through the public API, fused qkv as three slices."""
    run = load("vit_tiny_run.npz")
    model = adapted_tiny_vit(run)
    optimizer = optimizer_of(model, run)
    images, labels = tensor(run["x"]).double(), tensor(run["labels"])
    model.eval()
    with torch.no_grad():
        close(model(images[0]), run["eval_logits_before"])
    model.train()
    for step, epoch in enumerate(run["step_epoch"].tolist()):
        if step == 0 or epoch != run["step_epoch"][step - 1]:
            model.on_epoch_start(epoch, int(run["total_epochs"]))
            check_budgets(model, run["layer_budget"][epoch])
        logits = model(images[step])
        loss = torch.nn.functional.cross_entropy(logits, labels[step])
        optimizer.zero_grad()
        loss.backward()
        close(logits, run["logits"][step])
        assert loss.item() == pytest.approx(float(run["losses"][step]), rel=1e-9)
        if step == 0:
            check_tensors(model, load("vit_tiny_grads_step0.npz"), "grad")
        optimizer.step()
        model.on_step_end()
    check_tensors(model, load("vit_tiny_after.npz"), "data")
    model.eval()
    with torch.no_grad():
        close(model(images[0]), run["eval_logits_after"])


def check_budgets(model: PeftModel, expected: np.ndarray) -> None:
    if expected[0] < 0:  # nothing allocated yet
        return
    budgets = [b for n, v in model.named_buffers() if "snella_budget" in n for b in v.tolist()]
    # The released quantile never keeps the smallest entry of a matrix with its full budget.
    sizes = [48 * 48] * 4 + [48 * 192] * 2
    assert budgets == np.minimum(expected, np.array(sizes * 2) - 1).tolist()


def check_tensors(model: PeftModel, expected: dict[str, np.ndarray], attribute: str) -> None:
    for block, layer, field, parameter in snella_parameters(model):
        actual = getattr(parameter, attribute)
        reference = snella_tensor(expected, block, layer, field)
        close(actual, reference.numpy(), 1e-7)
    for name, parameter in model.named_parameters():
        if "head" in name or "cls_token" in name:
            key = name.removeprefix("base_model.model.")
            close(getattr(parameter, attribute), expected[key], 1e-9)
