"""The hooks in every order and with every optimizer: right ones train, wrong ones are errors."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_tuner import IMAGES, LABELS, adapted, backbone, budgets, layers, logits, trainable
from torch import nn

from snella import (
    SnellaConfig,
    load_training_state,
    on_epoch_start,
    on_step_end,
    training_state,
)
from snella.errors import UserError

OPTIMIZERS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def loop(
    order: str,
    model: PeftModel | None = None,
    epochs: int = 3,
    wrapped: Any = None,
    **optimizer: Any,
) -> PeftModel:
    """Train; a round in order: F forward and backward, S step, H hook, Z and z clear gradients.

    wrapped: what is called in the place of the model.
    """
    model = model or adapted(target_sparsity=0.7)
    called = model if wrapped is None else wrapped
    update = torch.optim.AdamW(trainable(model), lr=1e-2, **optimizer)
    for epoch in range(epochs):
        model.on_epoch_start(epoch, epochs)
        for _ in range(4):
            for event in order:
                if event == "F":
                    nn.functional.cross_entropy(called(IMAGES), LABELS).backward()
                elif event == "S":
                    update.step()
                elif event == "H":
                    model.on_step_end()
                else:
                    update.zero_grad(set_to_none=event == "Z")
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_right_orders_train(optimizer: dict[str, bool], mode: bool) -> None:
    results = [
        loop(order, adapted(target_sparsity=0.7).train(mode), **optimizer)
        for order in ("FSHZ", "ZFSH", "FSHz")
    ]
    assert len({tuple(budgets(model)) for model in results}) == 1
    assert sum(budgets(results[0])) == int(
        0.3 * sum(b.slice_size * b.slices for b in layers(results[0]))
    )
    loop("FFSHZ", **optimizer)  # two micro-batches


WRONG = {
    "FHSZ": "before optimizer.step",
    "ZFHS": "before optimizer.step",
    "FHFSHZ": "without an optimizer step",
    "FSHHZ": "called twice for one step",
    "FSzH": "All gradients that on_step_end.* were zero",
    "FSZH": "found no gradients",
    "FSZ": "two calls that were never made",
}


# A second hook is then seen as one without a step.
WRONG_COMPILED = WRONG | {"FSHHZ": "without an optimizer step"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("order", WRONG)
def test_wrong_orders_are_errors(order: str, optimizer: dict[str, bool]) -> None:
    with pytest.raises(UserError, match=WRONG[order]):
        loop(order, **optimizer)


@pytest.mark.parametrize("order", ["FSHZ", "FSHz", "FFSHZ", *WRONG])
def test_orders_of_a_compiled_model(order: str) -> None:
    """Its forward passes are not seen; whether gradients are new ones is."""
    model = adapted(target_sparsity=0.7)
    error = pytest.raises(UserError, match=WRONG_COMPILED.get(order)) if order in WRONG else None
    with error or contextlib.nullcontext():
        loop(order, model, wrapped=torch.compile(model, backend="eager"), fused=True)


def test_without_hooks_where_none_are_needed() -> None:
    model = adapted(allocation=False, target_sparsity=0.9)
    update = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    for _ in range(6):
        update.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        update.step()
    for layer in layers(model):
        kept = (layer.get_delta_weight("default").view(layer.slices, -1) != 0).sum(1)
        assert kept.tolist() == layer.snella_budget["default"].tolist()


def test_a_step_that_the_scaler_skips_is_no_wrong_order() -> None:
    model = adapted()
    model.on_epoch_start(0, 2)
    update = torch.optim.SGD(trainable(model), lr=1e-2)
    for step in range(3):
        update.zero_grad()
        model(IMAGES).sum().backward()
        if step == 1:
            trainable(model)[0].grad.fill_(float("inf"))
        else:
            update.step()
        model.on_step_end()


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(IMAGES), LABELS)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_skipped_for_another_gradient_is_left_out(fused: bool, variant: str) -> None:
    """The scaler of fp16 finds an infinite gradient in the head alone; the others stay scaled."""
    scores = []
    for skipped in (True, False):
        model = adapted(variant=variant, dropout=0.0, drop_path=0.0)
        update = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        head = next(p for n, p in model.named_parameters() if "head" in n and p.requires_grad)
        model.on_epoch_start(0, 2)
        for step in range(4):
            update.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if step == 2:
                if not skipped:
                    continue
                head.grad.fill_(float("inf"))
            scaler.step(update)
            scaler.update()
            model.on_step_end()
        scores.append(torch.cat(layers(model)[0].allocators["default"].importance.scores()))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.on_epoch_start(1, 2)
        assert any("left 1 step(s) out" in str(warning.message) for warning in said) == skipped
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-12)


def test_missing_hooks_of_a_compiled_model_are_noticed() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    update = torch.optim.AdamW(trainable(model), lr=1e-3)
    with pytest.raises(UserError, match="two calls that were never made"):
        for _ in range(6):
            update.zero_grad()
            loss_of(compiled).backward()
            update.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scores_are_of_gradients_that_are_not_scaled(optimizer: dict[str, bool]) -> None:
    scores = []
    for scale in (1.0, 2.0**12):
        model = adapted(target_sparsity=0.7)
        update = torch.optim.AdamW(trainable(model), lr=1e-3, **optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model.on_epoch_start(0, 2)
        for _ in range(2):
            update.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(update)
            scaler.update()
            model.on_step_end()
        scores.append(torch.cat(layers(model)[0].allocators["default"].importance.scores()))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-12)


def test_an_optimizer_per_layer() -> None:
    model = adapted(target_sparsity=0.7)
    groups = [[p for p in layer.parameters() if p.requires_grad] for layer in layers(model)]
    updates = [torch.optim.AdamW(group, lr=1e-3) for group in groups]
    for epoch in range(2):
        model.on_epoch_start(epoch, 2)
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            for update in updates:
                update.step()
            model.on_step_end()
    with pytest.raises(UserError, match="two calls that were never made"):
        for _ in range(8):
            model.zero_grad()
            loss_of(model).backward()
            for update in updates:
                update.step()


def test_a_batch_that_needs_no_adapter() -> None:
    """As a batch of texts for a model of images and texts."""
    model = adapted(target_sparsity=0.7)
    update = torch.optim.AdamW(trainable(model), lr=1e-3)
    for epoch in range(2):
        model.on_epoch_start(epoch, 2)
        for step in range(4):
            update.zero_grad()
            if step == 2:
                model.get_base_model().head(torch.ones(4, 24)).sum().backward()
            else:
                loss_of(model).backward()
            update.step()
            model.on_step_end()
    assert sum(budgets(model)) == int(
        0.3 * sum(layer.slice_size * layer.slices for layer in layers(model))
    )


def test_weights_that_move_and_return_within_a_step() -> None:
    """Sharpness-aware minimisation: the second gradient is taken elsewhere, the step is here."""
    model = adapted(target_sparsity=0.7)
    update = torch.optim.SGD(trainable(model), lr=1e-2)
    for epoch in range(2):
        model.on_epoch_start(epoch, 2)
        for _ in range(2):
            update.zero_grad()
            loss_of(model).backward()
            here = [p.data.clone() for p in trainable(model)]
            for p in trainable(model):
                p.data.add_(p.grad, alpha=0.05)
            update.zero_grad()
            loss_of(model).backward()
            for p, value in zip(trainable(model), here, strict=True):
                p.data = value
            update.step()
            model.on_step_end()
    for layer in layers(model):
        kept = (layer.get_delta_weight("default").view(layer.slices, -1) != 0).sum(1)
        assert kept.tolist() == layer.snella_budget["default"].tolist()


def test_one_epoch_is_too_few(tmp_path: Any) -> None:
    """The first budget is also the last; per step it falls."""
    model = adapted(target_sparsity=0.7)
    with pytest.warns(UserWarning, match=r"With 1 update.*interval=\"step\""):
        model.on_epoch_start(0, 1)
    with pytest.warns(UserWarning, match=r"not the [\d,]+ of target_sparsity=0.7"):
        model.save_pretrained(str(tmp_path))
    model = adapted(target_sparsity=0.7, interval="step")
    update = torch.optim.SGD(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.on_epoch_start(0, 1, steps_per_epoch=3)
        for _ in range(3):
            update.zero_grad()
            loss_of(model).backward()
            update.step()
            model.on_step_end()
        model.save_pretrained(str(tmp_path))


def freeze(model: nn.Module, block: int, frozen: bool = True) -> None:
    for name, parameter in model.named_parameters():
        if f"blocks.{block}." in name and "snella_" in name:
            parameter.requires_grad_(not frozen)


def kept(model: nn.Module, block: int) -> tuple[int, int]:
    """Entries that the layers of a block keep, and those they have."""
    found = [layer for layer in layers(model) if f"blocks.{block}." in layer.key]
    entries = sum(layer.slice_size * layer.slices for layer in found)
    return sum(int(layer.snella_budget["default"].sum()) for layer in found), entries


def epochs(model: nn.Module, first: int, last: int, of: int) -> None:
    update = torch.optim.SGD(trainable(model), lr=1e-2)
    for epoch in range(first, last):
        on_epoch_start(model, epoch, of)
        for _ in range(2):
            update.zero_grad()
            loss_of(model).backward()
            update.step()
            on_step_end(model)


def test_frozen_layers_keep_their_budget(tmp_path: Any) -> None:
    model = adapted(target_sparsity=0.7)
    freeze(model, 0)
    before, _ = kept(model, 0)
    epochs(model, 0, 3, 3)
    others, entries = kept(model, 1)
    assert kept(model, 0)[0] == before and others == int(0.3 * entries)
    assert len({int(b) for b in budgets(model)}) > 2, "the others compete"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path))


@pytest.mark.parametrize("resumed", [False, True])
def test_layers_that_train_later_are_not_lost(resumed: bool) -> None:
    """They have no gradients yet when they join: in that epoch they share evenly."""
    model = adapted(target_sparsity=0.7)
    freeze(model, 0)
    epochs(model, 0, 2, 4)
    if resumed:
        state = copy.deepcopy(training_state(model))
        load_training_state(model, state)
    freeze(model, 0, False)
    on_epoch_start(model, 2, 4)
    joined = [layer for layer in layers(model) if "blocks.0." in layer.key]
    shares = [int(b) / layer.slice_size for layer in joined for b in layer.snella_budget["default"]]
    asked = layers(model)[0].allocators["default"].schedule(layers(model)).budget(2, 4)
    everything = kept(model, 0)[1] + kept(model, 1)[1]
    assert max(shares) - min(shares) < 0.01
    assert abs(shares[0] - asked / everything) < 0.01
    assert 0 <= asked - sum(budgets(model)) <= 1
    loss_of(model).backward()
    torch.optim.SGD(trainable(model), lr=1e-2).step()
    on_step_end(model)
    epochs(model, 3, 4, 4)
    assert sum(budgets(model)) == int(0.3 * everything)


def test_a_denser_adapter_than_asked_for_is_reported(tmp_path: Any) -> None:
    model = adapted(target_sparsity=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path))  # a fresh one
    for epoch in range(2):  # of four: stopped early
        model.on_epoch_start(epoch, 4)
        model(IMAGES).sum().backward()
        model.on_step_end()
    with pytest.warns(
        UserWarning, match=r"not the [\d,]+ of target_sparsity=0.7.*epoch 1 of 0 … 3"
    ):
        model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop("FSHZ").save_pretrained(str(tmp_path))


def test_adapters_that_cannot_train_are_named() -> None:
    model = adapted()
    model.add_adapter("frozen", SnellaConfig(rank=4, inference_mode=True))
    model.base_model.set_adapter(["default", "frozen"])
    for layer in layers(model):
        layer.set_requires_grad("frozen", False)
    loop("FSHZ", model)  # the frozen one is left alone
    model.base_model.set_adapter("default")
    model.on_epoch_start(0, 2)
    model(IMAGES).sum().backward()
    model.merge_adapter()
    with pytest.raises(UserError, match="'default' is merged"):
        model.on_step_end()
    model.unmerge_adapter()
    model.requires_grad_(False)
    with pytest.raises(UserError, match="No active SNELLA adapter of the model trains"):
        model.on_epoch_start(1, 2)


def test_training_on_does_not_raise_the_budget(tmp_path: Any) -> None:
    model = loop("FSHZ")
    kept = sum(budgets(model))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(backbone(), str(tmp_path), is_trainable=True)
    for epoch in range(3):
        again.on_epoch_start(epoch, 3)
        assert sum(budgets(again)) == kept
        again(IMAGES).sum().backward()
        again.on_step_end()


def test_resuming_in_mid_epoch_keeps_the_shares() -> None:
    def step(model: PeftModel, update: torch.optim.Optimizer) -> None:
        update.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        update.step()
        on_step_end(model)

    through = adapted()
    update = torch.optim.AdamW(trainable(through), lr=1e-2)
    saved: list[Any] = []
    for epoch in range(3):
        on_epoch_start(through, epoch, 3)
        for i in range(3):
            step(through, update)
            if (epoch, i) == (1, 0):
                saved = [through.state_dict(), update.state_dict(), training_state(through)]
                saved = copy.deepcopy(saved)
    resumed = adapted()
    resumed.load_state_dict(saved[0])
    update = torch.optim.AdamW(trainable(resumed), lr=1e-2)
    update.load_state_dict(saved[1])
    load_training_state(resumed, saved[2])
    for epoch in (1, 2):
        on_epoch_start(resumed, epoch, 3)
        for i in range(3):
            if (epoch, i) != (1, 0):
                step(resumed, update)
    assert budgets(resumed) == budgets(through)
    assert logits(resumed).equal(logits(through))


def test_resuming_without_the_state_is_an_error(tmp_path: Any) -> None:
    """It would replace the saved shares by even ones."""
    loop("FSHZ").save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(backbone(), str(tmp_path), is_trainable=True)
    with pytest.raises(UserError, match="no importance scores for epoch 1 of 0 … 2"):
        on_epoch_start(again, 1, 3)
    on_epoch_start(adapted(score="magnitude"), 1, 3)  # which needs none


def test_a_state_of_another_adapter_is_refused() -> None:
    state = {f"other/{key.partition('/')[2]}": v for key, v in training_state(loop("FSHZ")).items()}
    with pytest.raises(UserError, match=r"adapter 'other'.*it trains 'default'"):
        load_training_state(adapted(), state)
    state = training_state(loop("FSHZ"))
    with pytest.raises(UserError, match="other layers or ranks"):
        load_training_state(adapted(rank=2), state)


def test_the_averages_follow_the_model() -> None:
    model = loop("FSHZ", epochs=2)
    model = model.double()
    images = IMAGES.double()
    model.on_epoch_start(2, 3)
    model(images).sum().backward()
    torch.optim.SGD(trainable(model), lr=1e-3).step()
    model.on_step_end()
    allocator = layers(model)[0].allocators["default"]
    assert {t.dtype for t in allocator.importance.sensitivity} == {torch.float64}
