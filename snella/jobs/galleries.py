"""Examples of a suite's predictions for the page: which ones is a rule, never a choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snella.errors import UserError
from snella.jobs.figures import shown_run
from snella.report.page import Gallery, GalleryLine
from snella.suite import plan
from snella.suite.config import Config
from snella.tasks.base import Shown

MOST = 12
"""The most methods that a gallery shows: the suite's first ones, and its last."""
SUBJECTS = 6
"""The most lines of a gallery of generation."""
CASES = "Cases by rule: the median image, the worst, and those on which the last method gains most."


def examples(config: Config) -> list[Gallery]:
    """Examples of the configured suite's first seed; none for a task without pictures."""
    draw = FAMILIES.get(plan.suite_task(config))
    if draw is None:
        return []
    suite = plan.current_suite(config)
    title = f"{suite.title}{' (demo)' if suite.demo and 'demo' not in suite.title else ''}"
    try:
        runs = plan.plan(config, seeds=suite.seeds[:1])
        found = [shown for run in runs if (shown := shown_run(config, run)) is not None]
        found = [shown for shown in found if shown.predictions.is_dir()]
        names = list(dict.fromkeys(shown.method for shown in found))
        chosen = names if len(names) <= MOST else [*names[: MOST - 1], names[-1]]
        return draw(title, [shown for shown in found if shown.method in chosen]) if found else []
    except (UserError, OSError, KeyError, ValueError):
        return []  # prepared data or predictions are gone: the page is about the records


def segmentation(title: str, shown: Sequence[Shown]) -> list[Gallery]:
    """The cases that the figure of examples chooses, with each method's mask over the image."""
    import numpy as np

    from snella.tasks.segmentation.figure import choose, coloured
    from snella.tasks.segmentation.metrics import Counts
    from snella.tasks.segmentation.score import SegmentationScorer

    galleries = []
    for name in dict.fromkeys(run.dataset for run in shown):
        own = [run for run in shown if run.dataset == name]
        data = own[0].data
        scorer = SegmentationScorer(data, own[0].settings)
        dice = {r.method: [Counts.of(*o).dice for o in scorer.outcomes(r.predictions)] for r in own}
        cases, images = choose(dice), data.images("test")
        wanted = {case.index for case in cases}
        kept = {
            r.method: {i: o for i, o in enumerate(scorer.outcomes(r.predictions)) if i in wanted}
            for r in own
        }
        lines = []
        for case in cases:
            image = images[case.index]
            outcomes = [kept[r.method][case.index] for r in own]
            truth = np.repeat(outcomes[0][1][..., None] * np.uint8(255), 3, axis=2)
            captions = [f"Dice {dice[r.method][case.index]:.3f}" for r in own]
            masks = [coloured(image, outcome) for outcome in outcomes]
            lines.append(GalleryLine(case.rule, [image, truth, *masks], ["", "", *captions]))
        text = f"Green: found; red: found wrongly; blue: missed. {CASES}"
        heads = ["Image", "Truth", *(r.method for r in own)]
        galleries.append(Gallery(f"{title}: {name}", text, heads, lines))
    return galleries


def generation(title: str, shown: Sequence[Shown]) -> list[Gallery]:
    """The grid of samples: one line per subject, its photograph and each method's image."""
    from snella.tasks.generation.figure import RULE, sample_lines

    subjects = list(dict.fromkeys(run.dataset for run in shown))[:SUBJECTS]
    columns, grid, _ = sample_lines([run for run in shown if run.dataset in subjects])
    captions = [""] * (1 + len(columns))
    lines = [GalleryLine(line.prompt, [line.photograph, *line.images], captions) for line in grid]
    return [Gallery(title, RULE, ["Photograph", *columns], lines)]


FAMILIES: dict[str, Callable[[str, Sequence[Shown]], list[Gallery]]] = {
    "segmentation": segmentation,
    "generation": generation,
}
