"""Examples of a suite's predictions for the page: which ones is a rule, never a choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.records import read_record
from snella.report.page import Gallery, GalleryLine
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config

MOST = 12
"""The most methods that a gallery shows: the suite's first ones, and its last."""
LINES = 6


@dataclass(frozen=True)
class _Cell:
    """A finished run with the folder of its test predictions."""

    run: Run
    label: str
    predictions: Path


def examples(config: Config) -> list[Gallery]:
    """Examples of the configured suite's first seed; none for a task without pictures."""
    draw = FAMILIES.get(plan.suite_task(config))
    if draw is None:
        return []
    suite = plan.current_suite(config)
    found = [_cell(config, run) for run in plan.plan(config, seeds=suite.seeds[:1])]
    cells = [cell for cell in found if cell is not None]
    if not cells:
        return []
    names = list(dict.fromkeys(cell.run.method.name for cell in cells))
    chosen = names if len(names) <= MOST else [*names[: MOST - 1], names[-1]]
    try:
        return draw(config, [cell for cell in cells if cell.run.method.name in chosen])
    except (UserError, OSError, KeyError, ValueError):
        return []  # prepared data or predictions are gone: the page is about the records


def _cell(config: Config, run: Run) -> _Cell | None:
    try:
        record = read_record(run.folder)
    except UserError:
        return None
    if record is None or record["status"] != "ok":
        return None
    numbers = record["metrics"]
    epoch = numbers.get(run.protocol.selection, numbers["last"])["epoch"]
    folder = run.folder / "predictions" / f"epoch{epoch:04d}" / "test"
    label = config.methods[run.method.name].label or run.method.name
    return _Cell(run, label, folder) if folder.is_dir() else None


def _by_dataset(cells: Sequence[_Cell]) -> dict[str, list[_Cell]]:
    found: dict[str, list[_Cell]] = {}
    for cell in cells:
        found.setdefault(cell.run.dataset.name, []).append(cell)
    return found


def segmentation(config: Config, cells: Sequence[_Cell]) -> list[Gallery]:
    """The cases that the figure of examples chooses, with each method's mask over the image."""
    import numpy as np

    from snella.tasks.segmentation.figure import choose, coloured
    from snella.tasks.segmentation.metrics import Counts
    from snella.tasks.segmentation.score import SegmentationScorer

    galleries = []
    for name, own in _by_dataset(cells).items():
        data = Prepared.open(Path(own[0].run.dataset.prepared))
        scorer = SegmentationScorer(data, own[0].run.task_settings)
        dice = {c.label: [Counts.of(*o).dice for o in scorer.outcomes(c.predictions)] for c in own}
        cases, images = choose(dice), data.images("test")
        wanted = {case.index for case in cases}
        kept = {
            c.label: {i: o for i, o in enumerate(scorer.outcomes(c.predictions)) if i in wanted}
            for c in own
        }
        lines = []
        for case in cases:
            image = images[case.index]
            outcomes = [kept[c.label][case.index] for c in own]
            truth = np.repeat(outcomes[0][1][..., None] * np.uint8(255), 3, axis=2)
            captions = [f"Dice {dice[c.label][case.index]:.3f}" for c in own]
            masks = [coloured(image, outcome) for outcome in outcomes]
            lines.append(GalleryLine(case.rule, [image, truth, *masks], ["", "", *captions]))
        text = "Green: found; red: found wrongly; blue: missed. " + RULES["segmentation"]
        heads = ["Image", "Truth", *(c.label for c in own)]
        galleries.append(Gallery(f"{_title(config)}: {_label(config, name)}", text, heads, lines))
    return galleries


def generation(config: Config, cells: Sequence[_Cell]) -> list[Gallery]:
    """One line per subject: its photograph, and each method's image for a prompt."""
    from snella.tasks.generation.prompts import fill_prompt
    from snella.tasks.generation.sample import image_name, read_png
    from snella.tasks.generation.settings import IMAGES

    labels = list(dict.fromkeys(cell.label for cell in cells))
    lines = []
    for number, own in enumerate(list(_by_dataset(cells).values())[:LINES]):
        run = own[0].run
        data = Prepared.open(Path(run.dataset.prepared))
        templates = data.manifest["prompts"][: run.settings.get("prompts")]
        prompt = number % len(templates)  # as in the figure of samples
        files = {c.label: c.predictions / IMAGES / image_name(prompt, 0) for c in own}
        images = [
            read_png(files[label]) if label in files and files[label].exists() else None
            for label in labels
        ]
        text = fill_prompt(templates[prompt], "<V>", str(data.manifest["class_word"]))
        captions = [""] * (1 + len(labels))
        lines.append(GalleryLine(text, [data.images("train")[0], *images], captions))
    return [Gallery(_title(config), RULES["generation"], ["Photograph", *labels], lines)]


def _title(config: Config) -> str:
    suite = plan.current_suite(config)
    return f"{suite.title}{' (demo)' if suite.demo and 'demo' not in suite.title else ''}"


def _label(config: Config, dataset: str) -> str:
    return config.datasets[dataset].label or dataset


RULES = {
    "segmentation": "Cases by rule: the median image, the worst, and those on which the last "
    "method gains most.",
    "generation": "By rule: line i shows prompt i of its subject, and the first sample.",
}
FAMILIES: dict[str, Callable[[Config, Sequence[_Cell]], list[Gallery]]] = {
    "segmentation": segmentation,
    "generation": generation,
}
