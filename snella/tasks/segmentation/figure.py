"""The figure of example masks (SNELLA, Figure 8): input, ground truth, and each method's mask.

Cases are chosen by rule from the Dice of all methods shown, not by hand: the median image, the
worst one, and those on which the last method gains most over the best other. True positives are
green, false positives yellow, false negatives blue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.tasks import panels
from snella.tasks.base import Gallery, GalleryLine, Shown
from snella.tasks.segmentation.metrics import Counts
from snella.tasks.segmentation.score import Outcome, SegmentationScorer

Pixels = NDArray[np.uint8]

SIDE = 384
"""Pixels of a panel's longer side at most."""
INCH, GAP = 1.3, 0.14
GREEN, YELLOW, BLUE = (0, 158, 115), (240, 228, 66), (0, 114, 178)
"""Of Okabe and Ito, for all eyes; red could not be told from tissue."""
GAINS = 2
COLOURS = "Green: found; yellow: found wrongly; blue: missed."
RULE = "Cases by rule: the median image, the worst, and those on which the last method gains most."


@dataclass(frozen=True)
class Case:
    """One row of the figure: why it was chosen, and which test image it is."""

    rule: str
    index: int


def choose(dice: Mapping[str, Sequence[float]], gains: int = GAINS) -> list[Case]:
    """Cases from the Dice per image of each method; the last method is the one that gains.

    Where it beats the best other on no image, no gain is shown. No image is shown twice; ties go
    to the first image.
    """
    table = np.array(list(dice.values()))
    mean = table.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    cases = [Case("median", int(order[(len(order) - 1) // 2])), Case("worst", int(order[0]))]
    if len(table) > 1:
        gain = table[-1] - table[:-1].max(axis=0)
        taken = {case.index for case in cases}
        best = [int(i) for i in np.argsort(-gain, kind="stable") if i not in taken and gain[i] > 0]
        cases += [Case("largest gain", i) for i in best[:gains]]
    unique = {case.index: case for case in reversed(cases)}
    return [case for case in cases if unique[case.index] is case]


def coloured(image: Pixels, outcome: Outcome) -> Pixels:
    """An image (H, W, 3) with true positives, false positives and false negatives tinted."""
    predicted, true = outcome
    result = image.astype(np.float64)
    for region, colour in (
        (predicted & true, GREEN),
        (predicted & ~true, YELLOW),
        (~predicted & true, BLUE),
    ):
        result[region] = 0.4 * result[region] + 0.6 * np.array(colour)
    return result.round().astype(np.uint8)


def masks(shown: Sequence[Shown], note: str, file: Path) -> None:
    """The figure of the configuration: masks of the runs of one data set."""
    first, predictions = shown[0], {run.method: run.predictions for run in shown}
    draw(first.data, first.settings, predictions, file, note)


def draw(
    data: Prepared, settings: Any, predictions: Mapping[str, Path], out: Path, note: str = ""
) -> list[Case]:
    """Write the figure to ``out`` (.pdf) and beside it .png, and a .csv of cases and their Dice.

    ``predictions`` are the folders of test predictions by method's label, in printed order; the
    note stands below, after the colours and the rule of choice.
    Raises :class:`~snella.errors.UserError` where there are none.
    """
    if not predictions:
        raise UserError(f"{out.stem} has no finished run to show; train its methods first.")
    scorer = SegmentationScorer(data, settings)
    dice = {label: _dice(scorer, folder) for label, folder in predictions.items()}
    cases = choose(dice)
    shown = {label: _outcomes(scorer, folder, cases) for label, folder in predictions.items()}
    images = data.images("test")
    names = [bytes(name).decode() for name in data.encoded("test", "name")]
    figure, axes = panels.canvas(
        len(cases), 2 + len(predictions), f"{COLOURS} {RULE} {note}", INCH, GAP
    )
    panels.heads(axes[0], ["Input", "Ground truth", *predictions])
    rows = []
    for line, case in zip(axes, cases, strict=True):
        outcomes = [found[case.index] for found in shown.values()]
        for axis, panel in zip(line, _line(images[case.index], outcomes), strict=True):
            panels.show(axis, panel)
        panels.label(line[0], case.rule)
        values = [of_method[case.index] for of_method in dice.values()]
        for axis, value in zip(line[2:], values, strict=True):
            axis.set_xlabel(f"Dice {value:.3f}", fontsize=6, labelpad=1)
        rows.append([case.rule, names[case.index], *(f"{value:.4f}" for value in values)])
    panels.save(figure, out)
    panels.save_csv(out, ["case", "image", *predictions], rows)
    return cases


def gallery(shown: Sequence[Shown]) -> list[Gallery]:
    """The page's examples: the figure's cases, one gallery per data set.

    A run whose predictions are missing or damaged is left out, and named.
    """
    found = []
    for name in dict.fromkeys(run.dataset for run in shown):
        own = [run for run in shown if run.dataset == name]
        scorer, images = (
            SegmentationScorer(own[0].data, own[0].settings),
            own[0].data.images("test"),
        )
        dice, lost = {}, []
        for run in own:
            try:
                dice[run.method] = _dice(scorer, run.predictions)
            except (UserError, OSError, ValueError):
                lost.append(run.method)
        text = f"{COLOURS} {RULE}"
        text += f" Predictions are missing or damaged: {', '.join(lost)}." if lost else ""
        cases = choose(dice) if dice else []
        kept = {
            run.method: _outcomes(scorer, run.predictions, cases)
            for run in own
            if run.method in dice
        }
        lines = []
        for case in cases:
            outcomes = [outcomes[case.index] for outcomes in kept.values()]
            masks = [coloured(images[case.index], outcome) for outcome in outcomes]
            captions = [f"Dice {values[case.index]:.3f}" for values in dice.values()]
            panels = [images[case.index], _white(outcomes[0][1]), *masks]
            lines.append(GalleryLine(case.rule, panels, ["", "", *captions]))
        found.append(Gallery(name, text, ["Image", "Truth", *dice], lines))
    return found


def _dice(scorer: SegmentationScorer, predictions: Path) -> list[float]:
    return [Counts.of(*outcome).dice for outcome in scorer.outcomes(predictions)]


def _outcomes(
    scorer: SegmentationScorer, predictions: Path, cases: Sequence[Case]
) -> dict[int, Outcome]:
    """Predicted and true masks of the cases, by image."""
    wanted = {case.index for case in cases}
    return {i: o for i, o in enumerate(scorer.outcomes(predictions)) if i in wanted}


def _white(mask: NDArray[np.bool_]) -> Pixels:
    return np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)


def _line(image: Pixels, outcomes: Sequence[Outcome]) -> list[Pixels]:
    """Input, truth in white, and each method's mask in colours, in the shape of the image."""
    masks = [coloured(image, outcome) for outcome in outcomes]
    return [_small(picture) for picture in (image, _white(outcomes[0][1]), *masks)]


def _small(picture: Pixels) -> Pixels:
    thumbnail = Image.fromarray(picture)
    thumbnail.thumbnail((SIDE, SIDE))
    return np.asarray(thumbnail)
