"""Every row that claims SD3 learns the toy flow, restores from its state, and merges exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snella.errors import CannotMerge
from snella.methods.base import build_method, load_method, prepare_model, trainable
from snella.models.parameters import frozen_checksums
from snella.tasks.generation.toy import toy

BASELINES = Path(__file__).resolve().parents[1] / "baselines"
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("bias", {}),
    ("ssf", {}),
    ("snella", {"rank": 4}),
    ("snella", {"rank": 4, "options": {"kernel": "linear"}}),
    ("snella", {"method": "snell", "rank": 4}),
    ("s2ft", {"reference_width": None, "points": 40, "alpha": 20.0}),
    ("peft", {"method": "lora", "rank": 4}),
    ("peft", {"method": "dora", "rank": 4}),
    ("peft", {"method": "pissa", "rank": 4}),
    ("peft", {"method": "corda", "rank": 4}),
    ("peft", {"method": "lora_ga", "rank": 4}),
    ("peft", {"method": "fourierft", "alpha": 50, "options": {"n_frequency": 60}}),
    ("peft", {"method": "vera", "rank": 16}),
    ("peft", {"method": "shira", "rank": 4}),
    ("peft", {"method": "oft", "options": {"oft_block_size": 8}}),
]


def name(row: tuple[str, dict[str, Any]]) -> str:
    file, settings = row
    return "-".join([file, *(str(v) for k, v in settings.items() if k in ("method", "options"))])


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_contract_on_sd3(row: tuple[str, dict[str, Any]]) -> None:
    method = build_method(BASELINES / f"{row[0]}.py", row[1])

    def prepared() -> Any:
        found = toy("sd3")
        torch.manual_seed(0)
        prepare_model(method, found.model)
        return found

    task = prepared()
    model = task.model
    method.calibrate(model, [task.batch], task.loss)
    frozen = frozen_checksums(model)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 1e-3, 0.0))
    losses = []
    model.train()
    method.on_epoch_start(model, 0, 1)
    for _ in range(6):
        loss = task.loss(model, task.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_step_end(model)
        losses.append(loss.item())
    assert min(losses[-2:]) < losses[0]
    assert frozen_checksums(model).items() >= frozen.items()
    assert any(p.grad is not None and p.grad.any() for p in trainable(model).values())
    model.eval()
    with torch.no_grad():
        expected = task.forward(model, task.batch)
        again = prepared()
        method.load_state(again.model, method.state(model))
        torch.testing.assert_close(task.forward(again.model.eval(), task.batch), expected)
        try:
            method.merge(model)
        except CannotMerge:
            pytest.fail("every row here folds into plain weights")
        torch.testing.assert_close(task.forward(model, task.batch), expected, rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == toy("sd3").model.state_dict().keys()


def test_rows_are_all_that_claim_sd3() -> None:
    claimed = {p.stem for p in BASELINES.glob("[!_]*.py") if "sd3" in load_method(p).supports}
    assert {file for file, _ in ROWS} == claimed
