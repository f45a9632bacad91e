"""All results as one frame, and a plot: accuracy against trainable parameters.

Cells as in a notebook (`# %%`); run as a whole by `python docs/examples/results.py [FOLDER]`.
"""

# %% One row per run, selection rule and metric; `selected` rows are those that tables show
import sys

import matplotlib.pyplot as plt

import snella.results

frame = snella.results.frame(sys.argv[1] if len(sys.argv) > 1 else "results")
shown = frame[frame.selected & frame.primary & (frame.status == "ok")]

# %% Methods by data sets, mean over seeds, in per cent
pivot = 100 * shown.pivot_table("value", "method", "dataset")
sys.stdout.write(f"{pivot.round(1).to_string()}\n")

# %% Mean over data sets against the number of trainable parameters
points = shown.groupby("method").agg(value=("value", "mean"), trainable=("trainable", "mean"))
figure, axes = plt.subplots(figsize=(5, 3.5))
axes.scatter(points.trainable.clip(lower=1), 100 * points.value)
for method, point in points.iterrows():
    axes.annotate(str(method), (max(point.trainable, 1), 100 * point.value), fontsize=7)
axes.set(xscale="log", xlabel="trainable parameters without the head", ylabel="mean (%)")
figure.savefig("results.png", dpi=200, bbox_inches="tight")
