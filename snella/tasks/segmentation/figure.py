"""The figure of example masks (SNELLA, Figure 8): input, ground truth, and each method's mask.

Cases are chosen by rule from the Dice of all methods shown, not by hand: the median image, the
worst one, and those on which the last method gains most over the best other. True positives are
green, false positives red, false negatives blue.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.tasks.base import Shown
from snella.tasks.segmentation.masks import resize_image, resize_mask
from snella.tasks.segmentation.metrics import Counts
from snella.tasks.segmentation.score import Outcome, SegmentationScorer

Pixels = NDArray[np.uint8]

SIDE, GAP, TITLE, MARGIN = 192, 6, 26, 96
GREEN, RED, BLUE = (60, 200, 90), (230, 60, 60), (70, 120, 240)
GAINS = 2


@dataclass(frozen=True)
class Case:
    """One row of the figure: why it was chosen, and which test image it is."""

    rule: str
    index: int


def choose(dice: Mapping[str, Sequence[float]], gains: int = GAINS) -> list[Case]:
    """Cases from the Dice per image of each method; the last method is the one that gains.

    No image is shown twice; ties go to the first image.
    """
    table = np.array(list(dice.values()))
    mean = table.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    cases = [Case("median", int(order[(len(order) - 1) // 2])), Case("worst", int(order[0]))]
    if len(table) > 1:
        gain = table[-1] - table[:-1].max(axis=0)
        taken = {case.index for case in cases}
        best = [int(i) for i in np.argsort(-gain, kind="stable") if int(i) not in taken]
        cases += [Case("largest gain", i) for i in best[:gains]]
    unique = {case.index: case for case in reversed(cases)}
    return [case for case in cases if unique[case.index] is case]


def coloured(image: Pixels, outcome: Outcome) -> Pixels:
    """An image (H, W, 3) with true positives, false positives and false negatives tinted."""
    predicted, true = outcome
    result = image.astype(np.float64)
    for region, colour in (
        (predicted & true, GREEN),
        (predicted & ~true, RED),
        (~predicted & true, BLUE),
    ):
        result[region] = 0.4 * result[region] + 0.6 * np.array(colour)
    return result.round().astype(np.uint8)


def masks(shown: Sequence[Shown], note: str, file: Path) -> None:
    """The figure of the configuration: masks of the runs of one data set."""
    first = shown[0]
    draw(first.data, first.settings, {run.method: run.predictions for run in shown}, file)


def draw(data: Prepared, settings: Any, predictions: Mapping[str, Path], out: Path) -> list[Case]:
    """Write the figure to ``out`` (.pdf) and beside it .png, and a .csv of cases and their Dice.

    ``predictions`` are the folders of test predictions by method's label, in printed order.
    Raises :class:`~snella.errors.UserError` where there are none.
    """
    if not predictions:
        raise UserError(f"{out.stem} has no finished run to show; train its methods first.")
    scorer = SegmentationScorer(data, settings)
    dice = {
        label: [Counts.of(*outcome).dice for outcome in scorer.outcomes(folder)]
        for label, folder in predictions.items()
    }
    cases = choose(dice)
    wanted = {case.index for case in cases}
    shown = {
        label: {i: o for i, o in enumerate(scorer.outcomes(folder)) if i in wanted}
        for label, folder in predictions.items()
    }
    images = data.images("test")
    rows = [
        [_panel(images[case.index]), *_masks(images[case.index], case, shown)] for case in cases
    ]
    notes = [{label: values[case.index] for label, values in dice.items()} for case in cases]
    names = [bytes(name).decode() for name in data.encoded("test", "name")]
    picture = _page(rows, ["Input", "Ground truth", *predictions], cases, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out.with_suffix(".png"))
    picture.save(out.with_suffix(".pdf"), resolution=150)
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image", *predictions])
        for case, values in zip(cases, notes, strict=True):
            dices = [f"{value:.4f}" for value in values.values()]
            writer.writerow([case.rule, names[case.index], *dices])
    return cases


def _panel(image: Pixels) -> Pixels:
    return resize_image(image, SIDE)


def _masks(image: Pixels, case: Case, shown: Mapping[str, Mapping[int, Outcome]]) -> list[Pixels]:
    """The truth in white, then each method's mask in colours, at the size of a panel."""
    small = _panel(image)
    outcomes = [shown[label][case.index] for label in shown]
    truth = resize_mask(outcomes[0][1], SIDE)
    white = np.repeat(truth[..., None] * np.uint8(255), 3, axis=2)
    panels = [coloured(small, (resize_mask(predicted, SIDE), truth)) for predicted, _ in outcomes]
    return [white, *panels]


def _page(
    rows: list[list[Pixels]],
    titles: Sequence[str],
    cases: Sequence[Case],
    notes: Sequence[Mapping[str, float]],
) -> Image.Image:
    width = MARGIN + len(titles) * (SIDE + GAP)
    height = TITLE + len(rows) * (SIDE + GAP + TITLE)
    page = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        x = MARGIN + column * (SIDE + GAP)
        pen.text((x + SIDE // 2, TITLE // 2), title, "black", font, anchor="mm")
    for row, (panels, case, dice) in enumerate(zip(rows, cases, notes, strict=True)):
        y = TITLE + row * (SIDE + GAP + TITLE)
        pen.text((6, y + SIDE // 2), case.rule.replace(" ", "\n"), "black", font)
        for column, panel in enumerate(panels):
            page.paste(Image.fromarray(panel), (MARGIN + column * (SIDE + GAP), y))
        for column, value in enumerate(dice.values(), start=2):
            x = MARGIN + column * (SIDE + GAP) + SIDE // 2
            pen.text((x, y + SIDE + 12), f"Dice {value:.3f}", "black", small, anchor="mm")
    return page
