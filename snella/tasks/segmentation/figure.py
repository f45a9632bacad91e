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
    lines = _lines(scorer, predictions, dice)
    names = [bytes(name).decode() for name in data.encoded("test", "name")]
    figure, axes = panels.canvas(
        len(lines), 2 + len(predictions), f"{COLOURS} {RULE} {note}", INCH, GAP
    )
    panels.heads(axes[0], ["Input", "Ground truth", *predictions])
    rows = []
    for row, (case, pictures, values) in zip(axes, lines, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            panels.show(axis, _small(picture))
        panels.label(row[0], case.rule)
        for axis, value in zip(row[2:], values, strict=True):
            axis.set_xlabel(f"Dice {value:.3f}", fontsize=6, labelpad=1)
        rows.append([case.rule, names[case.index], *(f"{value:.4f}" for value in values)])
    panels.save(figure, out)
    panels.save_csv(out, ["case", "image", *predictions], rows)
    return [case for case, _, _ in lines]


def gallery(shown: Sequence[Shown]) -> list[Gallery]:
    """The page's examples: the figure's cases, one gallery per data set.

    A run whose predictions are missing or damaged is left out, and named.
    """
    found = []
    for name in dict.fromkeys(run.dataset for run in shown):
        own = [run for run in shown if run.dataset == name]
        scorer = SegmentationScorer(own[0].data, own[0].settings)
        dice, lost = {}, []
        for run in own:
            try:
                dice[run.method] = _dice(scorer, run.predictions)
            except (UserError, OSError, ValueError):
                lost.append(run.method)
        text = f"{COLOURS} {RULE}"
        text += f" Predictions are missing or damaged: {', '.join(lost)}." if lost else ""
        folders = {run.method: run.predictions for run in own if run.method in dice}
        lines = [
            GalleryLine(case.rule, pictures, ["", "", *(f"Dice {value:.3f}" for value in values)])
            for case, pictures, values in _lines(scorer, folders, dice)
        ]
        found.append(Gallery(name, text, ["Image", "Truth", *dice], lines))
    return found


def _lines(
    scorer: SegmentationScorer,
    predictions: Mapping[str, Path],
    dice: Mapping[str, Sequence[float]],
) -> list[tuple[Case, list[Pixels], list[float]]]:
    """Each case with its pictures (input, truth in white, each method's mask in colours) and Dice.

    None where no method is shown.
    """
    cases = choose(dice) if dice else []
    methods = [_outcomes(scorer, folder, cases) for folder in predictions.values()]
    images, lines = scorer.data.images("test"), []
    for case in cases:
        outcomes = [found[case.index] for found in methods]
        image = images[case.index]
        masks = [coloured(image, outcome) for outcome in outcomes]
        values = [found[case.index] for found in dice.values()]
        lines.append((case, [image, _white(outcomes[0][1]), *masks], values))
    return lines


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


def _small(picture: Pixels) -> Pixels:
    thumbnail = Image.fromarray(picture)
    thumbnail.thumbnail((SIDE, SIDE))
    return np.asarray(thumbnail)
