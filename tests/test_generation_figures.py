"""Sample grids and trade-offs show what their rules choose, from files alone."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_support import settings, subject

from snella.errors import UserError
from snella.suite import plan
from snella.suite.config import load
from snella.tasks import find_task, panels
from snella.tasks.base import Shown
from snella.tasks.generation.figure import Point, pareto, scatter
from snella.tasks.generation.sample import image_name, write_png

pytest.importorskip("matplotlib")
TASK = find_task("generation", "tasks")


def shown(folder: Path, method: str, dataset: str, **metrics: float) -> Shown:
    """A run whose images are all of one grey."""
    data = subject(folder / "prepared" / dataset)
    images = folder / method / dataset
    for prompt in range(2):
        image = np.full((8, 8, 3), 100 + prompt, np.uint8)
        for place in ("images", "base/images"):
            write_png(images / place / image_name(prompt, 0), image)
    return Shown(method, dataset, data, settings(), images, metrics)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_line_i_shows_prompt_i_of_subject_i(tmp_path: Path) -> None:
    runs = [shown(tmp_path, m, d) for m in ("LoRA", "SNELLA") for d in ("one", "two", "three")]
    del runs[-1]  # a run that is missing leaves an empty frame
    file = tmp_path / "samples.pdf"
    TASK.draw_figure(None, runs, "Suite test.", file)
    first = file.read_bytes()
    found = rows(file.with_suffix(".csv"))
    assert [row["number"] for row in found] == ["0", "1", "0"]
    assert found[1]["prompt"] == "a red <V> circle"
    assert found[1]["SNELLA"].endswith("SNELLA/two/images/p001_s0.png")
    assert found[1]["Unadapted"].endswith("LoRA/two/base/images/p001_s0.png")
    assert found[2]["SNELLA"] == ""
    TASK.draw_figure("samples", runs, "Suite test.", file)
    assert first == file.read_bytes() and first.startswith(b"%PDF")
    assert file.with_suffix(".png").stat().st_size > 1000


def test_prompts_of_any_characters_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A dollar sign begins no formula."""
    run = shown(tmp_path, "S²FT $x_{", "one")
    run.data.manifest["prompts"] = ["a {0} {1} for $5 or $\\frac 100 % {{ü}}", "a {0} {1}"]
    TASK.draw_figure("samples", [run], "Suite $\\$ test.", tmp_path / "samples.pdf")
    assert rows(tmp_path / "samples.csv")[0]["prompt"] == "a <V> circle for $5 or $\\frac 100 % {ü}"
    scored = replace(run, metrics={"clip_i": 0.2, "drift": 0.1})
    TASK.draw_figure("tradeoff_drift", [scored], "$", tmp_path / "drift.pdf")


def test_a_lost_image_leaves_its_place_in_the_gallery_empty(tmp_path: Path) -> None:
    runs = [shown(tmp_path, m, d) for m in ("LoRA", "SNELLA") for d in ("one", "two")]
    (runs[3].predictions / "images" / image_name(1, 0)).unlink()
    (gallery,) = TASK.examples(runs)
    assert gallery.heads == ["Photograph", "Unadapted", "LoRA", "SNELLA"]
    assert [[image is None for image in line.images] for line in gallery.lines] == [
        [False] * 4, [False, False, False, True],
    ]  # fmt: skip
    assert list(gallery.lines[1].captions) == ["", "", "", "no image"]
    with pytest.raises(UserError, match="missing or damaged"):  # a figure is made whole
        TASK.draw_figure(None, runs, "", tmp_path / "samples.pdf")


def test_a_trade_off_averages_seeds_before_subjects(tmp_path: Path) -> None:
    runs = [
        shown(tmp_path, "LoRA", "one", clip_i=0.2, drift=0.1, clip_t=0.5),
        shown(tmp_path, "LoRA", "one", clip_i=0.4, drift=0.1, clip_t=0.5),
        shown(tmp_path, "LoRA", "two", clip_i=0.5, drift=0.3, clip_t=0.5),
        shown(tmp_path, "SNELLA", "one", clip_i=0.3, drift=0.3, clip_t=0.7),
    ]
    TASK.draw_figure("tradeoff_drift", runs, "", tmp_path / "drift.pdf")
    lora, snella = rows(tmp_path / "drift.csv")
    assert float(lora["clip_i"]) == pytest.approx(0.4) and float(lora["drift"]) == pytest.approx(
        0.2
    )
    assert float(lora["clip_i_error"]) == pytest.approx(0.1)  # 0.3 and 0.5, two subjects
    assert (lora["pareto"], snella["pareto"]) == ("1", "0")
    TASK.draw_figure("tradeoff_text", runs, "", tmp_path / "text.pdf")
    assert [row["pareto"] for row in rows(tmp_path / "text.csv")] == ["1", "1"]


def test_pareto_front() -> None:
    a, b, c = Point("a", 0.1, 0.8), Point("b", 0.2, 0.9), Point("c", 0.3, 0.85)
    assert pareto([a, b, c], less_x=True) == [a, b]
    assert pareto([a, b, c], less_x=False) == [b, c]


def test_the_legend_of_many_methods_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(panels, "save", lambda figure, file: drawn.append(figure))
    scatter([Point(f"row {i}", i, i) for i in range(30)], "", "", "", Path("x"), less_x=True)
    drawn[0].draw_without_rendering()
    (legend,) = drawn[0].legends
    assert legend.get_window_extent().y0 >= 0


def test_configured_figures_choose_their_runs() -> None:
    def chosen(figure: str, **changes: object) -> tuple[list[str], list[str], list[int]]:
        runs = plan.figure_runs(load(overrides=changes), figure)
        names = [run.method.name for run in runs], [run.dataset.name for run in runs]
        return *(list(dict.fromkeys(n)) for n in names), sorted({run.seed for run in runs})

    quick = ["ladybird", "robot", "starfish"]
    assert chosen("figure9") == (["lora-8", "snella-8"], quick, [0])
    three = {"suites": {"quick_generation": {"seeds": [0, 1, 2]}}}
    assert chosen("figure14", **three) == (["snella-8-linear", "snella-8"], quick, [0])
    methods, _, seeds = chosen("tradeoff_drift", **three)
    assert len(methods) == 8 and seeds == [0, 1, 2]
    _, subjects, _ = chosen("figure9", suite="dreambooth")
    assert len(subjects) == 8 and any("dog" in name for name in subjects)


def test_faulty_figures_are_told_when_planning() -> None:
    def figure(**entry: object) -> None:
        mine = {"mine": {"task": "generation", **entry}}
        plan.figure_runs(load(overrides={"figures": mine}), "mine")

    with pytest.raises(UserError, match=r"Unknown kind of figure of generation 'sample'. Did you"):
        figure(kind="sample")
    with pytest.raises(
        UserError, match=r"None of the methods of figure 'mine' is in suite 'quick_"
    ):
        figure(methods=["vera"])
