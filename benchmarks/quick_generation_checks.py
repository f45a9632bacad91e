"""Honest checks of quick generation: the language is understood, and adapting a subject helps.

1. CLIP names shape, colour and ground of scenes that it has not seen, above chance.
2. The pre-trained SD3 paints ground, colour and side that a prompt asks for; one with random
   weights does not. The ground is told twice: by CLIP, and by a probe that knows no network (a
   linear discriminant on colours along the border, fitted on rendered scenes).
3. Every method's images are closer to the subject's photographs than the unadapted model's
   (CLIP-I), with every seed in the mean over subjects; still have the ground that the prompt asks
   for; and are matched to their prompts.

"Above chance" (and "closer") means that the lower end of the 95 % interval is: exact binomial over
scenes for 1; bootstrap over prompts, then their samples, for 2; bootstrap over subjects, then
seeds, for 3. Exit status 1 when a claim fails.

    python benchmarks/quick_generation_checks.py --seeds 0 1 2 \\
        --out benchmarks/results/quick_generation_checks.json

A second call trains only what is not finished yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from snella.jobs.prepare import prepare_dataset
from snella.quick import generation
from snella.quick import generation_models as small
from snella.quick import generation_scenes as scenes
from snella.records import provenance
from snella.report.statistics import bootstrap
from snella.runs.execute import execute
from snella.suite import config as configuration
from snella.suite import plan
from snella.tasks.generation.encode import encode_prompts
from snella.tasks.generation.features import Clip
from snella.tasks.generation.pipeline import PipelineFolder
from snella.tasks.generation.sample import Sampling, generate, image_name, jobs, read_png

GROUNDS = scenes.BACKGROUNDS
ASKED = ("in the snow", "in the jungle", "on the beach", "on a brick wall", "at night",
         "on pink fabric", "on a blue wall", "on a yellow wall")  # fmt: skip
"""The ground that each of the subjects' prompts asks for."""
SHOWN = ("clip_i", "base_clip_i", "clip_t", "base_clip_t", "text_match", "vendi", "dino",
         "base_dino", "drift")  # fmt: skip
"""The recorded metrics that are repeated here."""
COMPARED = {"gain": 0.0, "ground_by_clip": 1 / len(GROUNDS), "ground_by_probe": 1 / len(GROUNDS),
            "text_match": 1 / len(ASKED)}  # fmt: skip
"""What has to lie above which level; ``gain`` is in CLIP-I over the unadapted model."""


def estimate(clusters: Sequence[Sequence[float]], chance: float) -> dict[str, float]:
    """Mean of the clusters' means with its 95 % bootstrap interval, beside the chance level."""
    low, high = bootstrap(clusters)
    mean = float(np.mean([np.mean(values) for values in clusters]))
    found = {"mean": mean, "low": low, "high": high, "chance": chance}
    return {name: round(value, 6) for name, value in found.items()}


def above(found: dict[str, float]) -> bool:
    """Whether an estimate's whole interval lies above chance."""
    return found["low"] > found["chance"]


class BorderProbe:
    """Which ground a picture has: Fisher's linear discriminant on statistics of its border."""

    def __init__(self, n: int = 6000) -> None:
        drawn = scenes.draw_scenes(np.random.default_rng(11), n)
        x, y = self._statistics(scenes.paint(drawn, seed=11).numpy()), drawn.background
        self.means = np.stack([x[y == k].mean(0) for k in range(len(GROUNDS))])
        within = x - self.means[y]
        self.inverse = np.linalg.inv(within.T @ within / n + 1e-5 * np.eye(x.shape[1]))

    @staticmethod
    def _statistics(pixels: np.ndarray) -> np.ndarray:
        """Mean and spread of the colours of four sides, (N, 3, 32, 32) -> (N, 24)."""
        x = pixels.astype(np.float64) / 255
        sides = (x[:, :, :4], x[:, :, -4:], x[:, :, 4:-4, :4], x[:, :, 4:-4, -4:])
        return np.concatenate([f(s, axis=(2, 3)) for s in sides for f in (np.mean, np.std)], 1)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The number of the ground of each picture uint8 (N, 3, 32, 32)."""
        gap = self._statistics(pixels)[:, None] - self.means[None]
        return np.asarray(np.einsum("nkd,de,nke->nk", gap, self.inverse, gap).argmin(1))


def clip_names(clip: Clip, images: list[np.ndarray], texts: list[str]) -> np.ndarray:
    """The number of the text that CLIP finds closest to each image."""
    return np.asarray((clip.images(images) @ clip.texts(texts).T).argmax(1))


def check_clip(clip: Clip, n: int = 1000) -> dict[str, Any]:
    """Zero-shot accuracies on unseen scenes."""
    drawn = scenes.draw_scenes(np.random.default_rng(12), n)
    images = list(scenes.paint(drawn, seed=12).permute(0, 2, 3, 1).numpy())
    asked = {
        "shape": ([f"a {s}" for s in scenes.SHAPES], drawn.shape),
        "colour": ([f"a {c} {scenes.SHAPES[0]}" for c in scenes.COLOURS], drawn.colour),
        "ground": ([f"a {scenes.SHAPES[0]} {g}" for g in GROUNDS], drawn.background),
    }
    found: dict[str, Any] = {}
    for name, (texts, truth) in asked.items():
        right = int((clip_names(clip, images, texts) == truth).sum())
        interval = binomtest(right, n).proportion_ci(0.95)
        found[name] = {"mean": right / n, "low": float(interval.low), "high": float(interval.high)}
        found[name]["chance"] = 1 / len(texts)
    return found


def check_language(
    file: str, transformer: Any, clip: Clip, probe: BorderProbe, settings: Any, samples: int = 4
) -> dict[str, dict[str, float]]:
    """How often a picture has the ground, the shape's colour and the place that its prompt says."""
    folder = PipelineFolder(file)
    prompts = [f"a {colour} {shape} {ground}" for ground in GROUNDS
               for colour, shape in (("red", "circle"), ("white", "star"))]  # fmt: skip
    sides = [f"a red square on a white wall {side}" for side in ("on the left", "on the right")]
    walls = [f"a {colour} circle on a white wall" for colour in scenes.COLOURS if colour != "white"]
    with tempfile.TemporaryDirectory() as place:
        texts = [*prompts, *sides, *walls, ""]
        encoded = encode_prompts(folder, transformer, texts, 1, "fp32", Path(place))
        wanted = jobs(Path(place), "probe", texts[:-1], samples)
        sampling = Sampling(32, settings["inference_steps"], settings["guidance"], "", 16)
        generate(folder, transformer, folder.vae(), encoded, wanted, sampling)
        images = [read_png(job.file) for job in wanted]
    ground = np.repeat(np.arange(len(GROUNDS)), 2 * samples)
    first = len(ground)
    named = clip_names(clip, images[:first], [f"a circle {g}" for g in GROUNDS])
    seen = probe(np.stack(images[:first]).transpose(0, 3, 1, 2))
    pixels = np.stack(images[first:]).astype(np.float64) / 255
    red = pixels[: 2 * samples, :, :, 0] - pixels[: 2 * samples, :, :, 1]
    centre = (red.clip(0).sum(1) * np.arange(32)).sum(1) / (red.clip(0).sum((1, 2)) + 1e-9) - 15.5
    side = np.repeat([-1, 1], samples)
    middle = pixels[2 * samples :, 13:19, 13:19].mean((1, 2))
    table = {c: rgb for c, rgb in scenes.COLOURS.items() if c != "white"}
    distance = np.abs(middle[:, None] - np.array(list(table.values()))[None]).sum(-1)
    colour = np.repeat(np.arange(len(table)), samples)

    def share(right: np.ndarray, choices: int) -> dict[str, float]:
        return estimate(right.astype(float).reshape(-1, samples).tolist(), 1 / choices)

    return {
        "ground_by_clip": share(named == ground, len(GROUNDS)),
        "ground_by_probe": share(seen == ground, len(GROUNDS)),
        "side_by_pixels": share(np.sign(centre) == side, 2),
        "colour_by_pixels": share(distance.argmin(1) == colour, len(table)),
    }


def check_run(run: plan.Run, record: Any, clip: Clip, probe: BorderProbe) -> dict[str, float]:
    """What one run's images show."""
    last = record["metrics"]["last"]
    samples = run.settings["samples_per_prompt"]
    (images,) = run.folder.glob("predictions/*/test/images")
    found: dict[str, float] = {name: last[name] for name in SHOWN}
    found["gain"] = last["clip_i"] - last["base_clip_i"]
    for name, folder in (("", images), ("base_", images.parent / "base" / "images")):
        pictures = [
            read_png(folder / image_name(p, s)) for p in range(len(ASKED)) for s in range(samples)
        ]
        truth = np.repeat([GROUNDS.index(g) for g in ASKED], samples)
        word = generation.SUBJECTS[run.dataset.name].class_word
        named = clip_names(clip, pictures, [f"a {word} {g}" for g in GROUNDS])
        seen = probe(np.stack(pictures).transpose(0, 3, 1, 2))
        found[f"{name}ground_by_clip"] = float((named == truth).mean())
        found[f"{name}ground_by_probe"] = float((seen == truth).mean())
    return found


def adapted(options: argparse.Namespace, clip: Clip, probe: BorderProbe) -> list[dict[str, Any]]:
    """All runs of the suite, made where they are missing."""
    overrides = {"suite": "quick_generation", "results": options.results, "data": options.data}
    config = configuration.load(overrides=overrides)
    for name in generation.SUBJECTS:
        prepare_dataset(config, name, missing_only=True)
    rows = []
    for run in plan.plan(config, methods=options.methods, seeds=options.seeds):
        record = execute(run)
        if record["status"] != "ok":
            raise SystemExit(f"{run.key}: {record['status']}: {record['reason']}")
        names = {"method": run.method.name, "subject": run.dataset.name, "seed": run.seed}
        rows.append(names | check_run(run, record, clip, probe))
        print(rows[-1], flush=True)  # noqa: T201
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method: means over subjects and seeds, intervals, and the gain of each seed."""
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        subjects = [[row for row in mine if row["subject"] == s] for s in generation.SUBJECTS]
        numbers = [k for k in mine[0] if k not in ("method", "subject", "seed", *COMPARED)]
        means: dict[str, Any] = {k: float(np.mean([row[k] for row in mine])) for k in numbers}
        means |= {
            name: estimate([[row[name] for row in own] for own in subjects if own], level)
            for name, level in COMPARED.items()
        }
        means["gain"]["by_seed"] = {
            str(seed): float(np.mean([row["gain"] for row in mine if row["seed"] == seed]))
            for seed in sorted({row["seed"] for row in mine})
        }
        found[method] = means
    return found


def claims(result: dict[str, Any]) -> dict[str, bool]:
    """What has to hold."""
    language, random = result["language"], result["language_random_weights"]
    methods = result["methods"].values()
    return {
        "CLIP names shape, colour and ground": all(map(above, result["clip"].values())),
        "prompts choose ground, colour and side": all(map(above, language.values())),
        "random weights do not": not any(map(above, random.values())),
        "every method beats the unadapted model with every seed": all(
            above(m["gain"]) and min(m["gain"]["by_seed"].values()) > 0 for m in methods
        ),
        "adapted models still paint the ground": all(
            above(m["ground_by_clip"]) and above(m["ground_by_probe"]) for m in methods
        ),
        "their images match their prompts": all(above(m["text_match"]) for m in methods),
    }


def main() -> None:
    """Run all checks, write what was found, and say which claims hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", default="results/checks")
    parser.add_argument("--data", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+")
    options = parser.parse_args()
    begin = time.perf_counter()
    config = configuration.load(overrides={"suite": "quick_generation"})
    settings = config.protocols["quick-generation"]
    file = configuration.locate(config.backbones["sd3-quick"].file or "")
    clip, probe = Clip(settings["clip_model"], None), BorderProbe()
    pretrained = PipelineFolder(file).transformer()
    torch.manual_seed(0)
    random = small.transformer().eval()
    result: dict[str, Any] = {
        "clip": check_clip(clip),
        "language": check_language(file, pretrained, clip, probe, settings),
        "language_random_weights": check_language(file, random, clip, probe, settings),
    }
    rows = adapted(options, clip, probe)
    result |= {"methods": summary(rows), "runs": rows}
    held = claims(result)
    result |= {
        "claims": held,
        "seeds": options.seeds,
        "seconds": round(time.perf_counter() - begin),
        "provenance": provenance() | {"threads": torch.get_num_threads()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for claim, holds in held.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")  # noqa: T201
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
