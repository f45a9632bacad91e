"""The quick task's data and the pre-training of its small SAM, and the figure."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from snella.data.prepared import Prepared
from snella.models.sam import build_sam, load_sam, mask_logits
from snella.quick.pretrain_sam import (
    ARCHITECTURE,
    PretrainConfig,
    boundaries,
    boxes_around,
    choose_shapes,
    decode,
    learning_rate,
    losses,
    parts,
    points_in,
    pretrain,
    train_epoch,
)
from snella.quick.segmentation import SIZE, SPLITS, TISSUES, Grounds, draw, make
from snella.quick.segmentation_shapes import Renderer
from snella.tasks.base import Backbone, DatasetSpec, Shown
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.figure import choose, coloured
from snella.tasks.segmentation.figure import draw as draw_figure
from snella.tasks.segmentation.task import Segmentation
from snella.tasks.segmentation.toy import SIZES

pytest.importorskip("segment_anything")


@pytest.fixture(scope="module")
def polyps() -> dict[str, dict[str, np.ndarray]]:
    return make("polyps")


def test_polyps_are_drawn_alike_every_time_with_masks_that_vary(polyps) -> None:
    assert {split: len(drawn["image"]) for split, drawn in polyps.items()} == SPLITS
    for drawn in polyps.values():
        assert drawn["image"].shape[1:] == (SIZE, SIZE, 3) and drawn["image"].dtype == np.uint8
        shares = drawn["mask"].mean((1, 2))
        assert shares.min() > 0.01 and shares.max() < 0.6 and shares.std() > 0.03
        assert set(drawn["tissue"]) == {0, 1}
    again = make("polyps")
    assert all(
        np.array_equal(polyps[split][name], again[split][name])
        for split in SPLITS
        for name in ("image", "mask")
    )


def test_splits_come_from_disjoint_regions() -> None:
    for tissue in TISSUES:
        corners = {split: set(Grounds(tissue, split).corners) for split in SPLITS}
        assert all(corners.values())
        assert sum(map(len, corners.values())) == len(set.union(*corners.values()))
        for y, x in set.union(*corners.values()):
            assert y % tissue.block == 0 and x % tissue.block == 0  # blocks do not overlap
        assert tissue.window[1] <= tissue.block


def test_colour_alone_does_not_find_the_polyps(polyps) -> None:
    """The best threshold of any one channel, chosen on the test images, stays below one half."""
    images = polyps["test"]["image"].astype(np.float64)
    masks = polyps["test"]["mask"]
    best = 0.0
    for channel in np.moveaxis(images, 3, 0):
        for sign in (1, -1):
            for level in np.quantile(channel, np.linspace(0.05, 0.95, 10)):
                found = sign * channel > sign * level
                both = (found & masks).sum((1, 2))
                best = max(best, (2 * both / (found.sum((1, 2)) + masks.sum((1, 2)))).mean())
    assert best < 0.4


def test_a_mask_is_where_the_dome_is() -> None:
    """Without its polyps an image is the same outside of their masks and shadows."""
    rng = np.random.default_rng(3)
    image, mask = draw(rng, Grounds(TISSUES[0], "train"))
    assert image.shape == (SIZE, SIZE, 3) and mask.any() and not mask.all()


# ------------------------------------------------------------------------------ pre-training


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rendered_shapes_have_exact_disjoint_masks() -> None:
    pictures = Renderer(48, 3, rng())(6)
    again = Renderer(48, 3, rng())(6)
    assert torch.equal(pictures.image, again.image)
    assert pictures.image.shape == (6, 3, 48, 48) and pictures.visible.shape == (6, 3, 48, 48)
    assert pictures.image.min() >= 0 and pictures.image.max() <= 1
    assert pictures.visible.sum(1).max() <= 1, "a pixel shows one shape"
    covered = pictures.visible.any(1)
    assert (pictures.relief[~covered] == 0).all(), "the ground is flat"
    assert 0 < (pictures.relief[covered] > 0).float().mean() < 1, "some shapes are raised"


def test_a_turned_picture_is_turned_with_its_masks() -> None:
    pictures, rows = Renderer(48, 3, rng()).many(5, 2), torch.tensor([4, 1])
    assert len(pictures) == 5
    for seed in range(8):
        turned = pictures.turned(rows, torch.Generator().manual_seed(seed))
        for back in (lambda t: t, lambda t: t.flip(-1)):
            for quarter in range(4):
                image = back(turned.image).rot90(-quarter, (-2, -1))
                if torch.equal(image.amax(1), pictures.image[rows].amax(1)):
                    for name in ("visible", "relief"):
                        plane = back(getattr(turned, name)).rot90(-quarter, (-2, -1))
                        assert torch.equal(plane, getattr(pictures, name)[rows])
                    break
            else:
                continue
            break
        else:
            raise AssertionError("no turn gives the picture back")


def test_boundaries_lie_between_shapes() -> None:
    visible = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    visible[0, 0, :3, :3] = visible[0, 1, :3, 3:] = True
    found = boundaries(visible)[0]
    assert found[0].tolist() == [False, False, True, False, False, False]
    assert found[2].all() and not found[3:].any()


def test_the_learning_rate_falls_only_at_the_end() -> None:
    config = PretrainConfig(epochs=20, cooldown_epochs=5, warmup_epochs=2.0, lr=1.0)
    rates = [learning_rate(config, epoch) for epoch in (0, 1, 2, 15, 17.5, 20)]
    assert rates == [0, 0.5, 1, 1, 0.5, 0]


def test_prompts_lie_on_their_shapes() -> None:
    visible = Renderer(48, 3, rng())(16).visible
    masks = choose_shapes(visible, 2, 20, rng())
    assert masks.shape == (32, 48, 48)
    shown = masks.flatten(1).any(1)
    points = points_in(masks, rng())[:, 0].long()
    assert all(masks[i, y, x] for i, (x, y) in enumerate(points) if shown[i])
    boxes = boxes_around(masks, rng())
    for i in torch.nonzero(shown).flatten():
        rows, columns = torch.nonzero(masks[i].any(1)), torch.nonzero(masks[i].any(0))
        tight = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])
        span = (tight[2:] - tight[:2]).repeat(2)
        assert ((boxes[i] - tight).abs() <= 0.1 * span + 1e-4).all()


def test_the_batched_decoder_is_the_packages_own() -> None:
    torch.manual_seed(0)
    model = build_sam("sam_vit", SIZES).eval()
    embeddings = torch.randn(3, 32, 4, 4)
    points = torch.rand(3, 1, 2) * 32, torch.ones(3, 1)
    sparse, dense = model.prompt_encoder(points, None, None)
    with torch.no_grad():
        masks, quality = decode(model, embeddings, sparse)
        for i in range(3):
            own, own_quality = model.mask_decoder.predict_masks(
                image_embeddings=embeddings[i : i + 1],
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[i : i + 1],
                dense_prompt_embeddings=dense[i : i + 1],
            )
            torch.testing.assert_close(masks[i : i + 1], own, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(quality[i : i + 1], own_quality, rtol=1e-4, atol=1e-6)


SMALL = PretrainConfig(
    architecture=dict(SIZES),
    epochs=3,
    steps=2,
    batch_size=4,
    repeats=2,
    least_pixels=5,
    warmup_epochs=0.5,
    cooldown_epochs=1,
)


def test_pretraining_resumes_to_the_same_weights_and_says_what_it_did(tmp_path: Path) -> None:
    record = pretrain(SMALL, tmp_path / "whole.safetensors")
    assert pretrain(SMALL, tmp_path / "cut.safetensors", stop_after=1) == {}
    again = pretrain(SMALL, tmp_path / "cut.safetensors")
    assert again["sha256"] == record["sha256"]
    assert record["pictures"] == 24 and len(record["history"]) == 3
    assert not list(tmp_path.glob("*.checkpoint"))
    assert set(record["final"]) == {"loss", "iou", "iou_unprompted"}
    assert set(record["checks"]) == {"iou_point", "iou_box", "iou_unprompted"}
    model = load_sam("sam_vit", SIZES, 32, (tmp_path / "whole.safetensors").as_posix())
    assert mask_logits(model, torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)


def test_pretraining_steps_as_a_plain_loop_does() -> None:
    """The weights after an epoch are, bit for bit, those of gradient, clipping and step by hand."""
    config = replace(SMALL, steps=3)
    model, map_, optimizer = parts(config)
    train_epoch(model, map_, optimizer, config, 1)
    plain, plain_map, plain_optimizer = parts(config)
    rng = torch.Generator().manual_seed(100_003 * config.seed + 1)
    drawn = Renderer(SIZES["image_size"], config.layers, rng).many(6, config.batch_size)
    rows = torch.cat([torch.randperm(len(drawn), generator=rng) for _ in range(config.repeats)])
    for step, chosen in enumerate(rows.split(config.batch_size)[: config.steps]):
        for group in plain_optimizer.param_groups:
            group["lr"] = learning_rate(config, 1 + (step + 1) / config.steps)
        loss, *_ = losses(plain, plain_map, drawn.turned(chosen, rng), config, rng)
        plain_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
    for one, other in ((model, plain), (map_, plain_map)):
        found, wanted = one.state_dict(), other.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    untrained = parts(config)[0].state_dict()
    assert any(not torch.equal(untrained[n], v) for n, v in model.state_dict().items())


def test_the_recipe_is_the_configured_backbone() -> None:
    import yaml

    entry = yaml.safe_load(Path("config/backbones.yaml").read_text())["sam-quick"]
    assert entry["kwargs"] == ARCHITECTURE and entry["arch"] == "sam_vit"
    model = load_sam("sam_vit", ARCHITECTURE, 96, entry["file"])
    assert sum(p.numel() for p in model.parameters()) < 1_500_000


def test_the_documented_checks_are_the_measured_ones() -> None:
    """Every row of the documentation's table is the mean over the seeds of the measurement."""
    measured = json.loads(Path("benchmarks/results/quick_segmentation_checks.json").read_text())
    recipe = json.loads(Path("workflow/resources/sam_quick.json").read_text())
    assert measured["backbone"] == recipe["sha256"], "measured with other weights"
    text = Path("docs/segmentation.md").read_text()
    for way, title in WAYS.items():
        cells = (np.mean(measured[way]), min(measured[way]), max(measured[way]))
        assert f"| {title} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.1f} |" in text
    assert all(measured["holds"].values()) and len(measured["seeds"]) == 3


WAYS = {
    "untrained": "no training",
    "decoder": "decoder alone",
    "snella": "SNELLA-8",
    "full": "Full",
    "scratch": "Full from random weights",
}


# ------------------------------------------------------------------------------------ figure


def test_cases_are_chosen_by_rule() -> None:
    dice = {
        "a": [0.9, 0.5, 0.1, 0.6, 0.7, 0.8],
        "b": [0.8, 0.5, 0.2, 0.7, 0.7, 0.2],
        "ours": [0.9, 0.5, 0.3, 0.95, 0.7, 0.9],
    }
    cases = choose(dice, gains=2)
    assert [(c.rule, c.index) for c in cases] == [
        ("median", 5), ("worst", 2), ("largest gain", 3),
    ]  # fmt: skip
    assert [c.rule for c in choose({"one": [0.5]})] == ["median"]
    lost = {"a": [0.9, 0.5, 0.4], "ours": [0.9, 0.4, 0.2]}
    assert [c.rule for c in choose(lost)] == ["median", "worst"]  # it gains nowhere


def test_colours_tell_true_from_false_positives() -> None:
    black = np.zeros((1, 4, 3), dtype=np.uint8)
    predicted, true = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool)
    hit, false, missed, rest = coloured(black, (predicted, true))[0]
    assert hit.argmax() == 1 and false.argmax() == 0 and missed.argmax() == 2 and not rest.any()


def test_the_figure_is_drawn_from_files(tmp_path: Path) -> None:
    TASK.prepare("polyps", DatasetSpec(kind="quick", task="segmentation"), tmp_path / "polyps")
    data, settings = Prepared.open(tmp_path / "polyps"), TASK.settings(image_size=32)
    task = Segmentation(data, settings, 16)
    folders = {}
    for seed, label in enumerate(("LoRA-8", "SNELLA-8")):
        torch.manual_seed(seed)
        model = task.build_model(Backbone(name="tiny", arch="sam_vit", kwargs=SIZES)).eval()
        folders[label] = tmp_path / label
        task.predict(model, "test", folders[label])
    cases = draw_figure(data, settings, folders, tmp_path / "figure8.pdf", "A demo: 100 % & $5.")
    assert {case.rule for case in cases} == {"median", "worst", "largest gain"}
    with open(tmp_path / "figure8.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cases) and set(rows[0]) == {"case", "image", *folders}
    assert (tmp_path / "figure8.pdf").read_bytes()[:4] == b"%PDF"
    assert (tmp_path / "figure8.png").stat().st_size > 10_000
    runs = [Shown(label, "polyps", data, settings, where, {}) for label, where in folders.items()]
    first, *rest = runs
    (whole,) = TASK.examples(runs)
    assert len(whole.lines) == len(cases) and whole.heads == ["Image", "Truth", *folders]
    shutil.rmtree(first.predictions)  # one lost run costs no gallery
    (left,) = TASK.examples(runs)
    assert left.heads == ["Image", "Truth", *(run.method for run in rest)] and left.lines
    assert f"missing or damaged: {first.method}." in left.text


def test_the_suites_search_tries_the_same_rates_for_every_row() -> None:
    from snella.suite import plan
    from snella.suite.config import load

    runs = plan.search_runs(load(overrides={"suite": "quick_segmentation"}))
    rates: dict[str, set[float]] = {}
    for run in runs:
        assert run.dataset.scored == "val" and run.protocol.train_split == "train"
        rates.setdefault(run.method.name, set()).add(run.protocol.lr)
    assert len(runs) == 7 * 30 and all(found == rates["full"] for found in rates.values())


@pytest.mark.parametrize(
    ("suite", "family", "left_out"),
    [
        ("quick_segmentation", "sam",
         {"adapter-8-noah", "snella-8-linear", "fourierft-10000", "s2ft-8000"}),
        ("kvasir", "sam", {"adapter-8-noah", "snella-8-linear", "fourierft-10000", "s2ft-8000"}),
        ("dreambooth", "sd3", {"fourierft", "s2ft-3000", "s2ft-6000"}),
    ],
)  # fmt: skip
def test_suites_train_every_row_that_supports_their_model(
    suite: str, family: str, left_out: set[str]
) -> None:
    """But for the settings of another task's tables."""
    from snella.errors import Unsupported
    from snella.methods.base import build_method
    from snella.models.tiny import tiny_backbone
    from snella.suite import plan
    from snella.suite.config import load

    config, model, supported = load(overrides={"suite": suite}), tiny_backbone(family), set()
    dataset = plan.current_suite(config).datasets[0]
    for name in (name for name, row in config.methods.items() if not row.ablation):
        row = plan.resolve(config, name, dataset, 0).method
        try:
            build_method(Path(row.file), row.hyperparameters).check_supported(model)
        except Unsupported:
            continue
        supported.add(name)
    assert set(plan.suite_methods(config)) == supported - left_out


def test_table_and_figure_come_from_the_quick_segmentation_suite(tmp_path: Path) -> None:
    from report_support import record

    from snella.errors import UserError
    from snella.jobs import figures, tables
    from snella.records import write_record
    from snella.suite import plan
    from snella.suite.config import load

    config = load(overrides={"results": tmp_path.as_posix(), "data": tmp_path.as_posix()})
    runs = tables.table_runs(config, "table5")
    assert {run.suite for run in runs} == {"quick_segmentation"} and len(runs) == 30
    assert all(run.dataset.task == "segmentation" for run in runs)
    shown = plan.figure_runs(config, "figure8")
    assert [run.method.name for run in shown] == ["lora-8", "ssf", "snella-8"]
    data = shown[0].dataset.name
    write_record(shown[0].folder, record("lora-8", data, 0.5, suite="quick_segmentation"))
    with pytest.raises(UserError, match="no finished run to show"):  # that one is stale
        figures.draw(config, "figure8")
    with pytest.raises(UserError, match="Did you mean 'figure8'"):
        plan.figure_runs(config, "figure88")
