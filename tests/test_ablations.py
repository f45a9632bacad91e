"""Rows of ablation tables: every one trains, and they stay out of everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from method_contract import backbone, batch, loss_fn

from snella.jobs import tables
from snella.methods.base import build_method, prepare_model
from snella.methods.step import train_step
from snella.suite import config as configuration
from snella.suite import plan

CONFIG = configuration.load(ROOT / "config/config.yaml")
ABLATIONS = {name: row for name, row in CONFIG.methods.items() if row.ablation}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains(name):
    row = ABLATIONS[name]
    method = build_method(Path(plan.method_path(CONFIG, row.file)), row.hyperparameters)
    model = backbone(depth=12).train()
    torch.manual_seed(0)
    prepare_model(method, model)
    method.calibrate(model, [batch()] * 2, loss_fn)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 1e-2, 0.0))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    method.steps_per_epoch = 1
    for epoch in range(2):
        method.on_epoch_start(model, epoch, 2)
        loss = train_step(model, optimizer, [batch()], loss_fn, method=method)
    assert loss.isfinite()
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)


def test_ablations_are_rows_of_their_tables_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    for suite in ("quick", "vtab1k", "fgvc"):  # these name no methods: they have all
        config = configuration.load(ROOT / "config/config.yaml", {"suite": suite})
        assert not set(plan.suite_methods(config)) & set(ABLATIONS)
        assert not {r.method.name for r in tables.table_runs(config, "table1")} & set(ABLATIONS)
    config = configuration.load(ROOT / "config/config.yaml", {"suite": "vtab1k"})
    named = {
        name: {m for group in CONFIG.tables[name]["rows"] for m in group["methods"]}
        for name in ("table7", "table10", "table15", "s2ft_table9", "sparse_tuning_table6")
    }
    for name, methods in named.items():
        runs = tables.table_runs(config, name)
        assert {run.method.name for run in runs} == methods, name
        assert methods & set(ABLATIONS)
    assert {run.suite for run in tables.table_runs(config, "sparse_tuning_table6")} == {
        "full-image"
    }
    runs = tables.table_runs(config, "table12")
    assert {run.suite for run in runs} == {"vtab1k-four"} and len(runs) == 4 * 4 * 3
