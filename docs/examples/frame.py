"""Load all results as a pandas frame and plot accuracy against trainable parameters.

    python docs/examples/frame.py results frame.png

The cells can be pasted into a notebook one by one.
"""

# %% Load: one row per run, selection and metric
import sys

from matplotlib.figure import Figure

import snella.results

results, target = (sys.argv[1:3] + ["results", "frame.png"][len(sys.argv) - 1 :])[:2]
frame = snella.results.frame(results)
sys.stdout.write(f"{frame['run'].nunique()} runs, {frame['method'].nunique()} methods\n")

# %% The numbers that tables show: finished runs, the protocol's selection, the primary metric
shown = frame[(frame.status == "ok") & frame.selected & frame.primary]
sys.stdout.write(shown.pivot_table("value", "method", "dataset").round(3).to_string() + "\n")

# %% Mean over data sets, beside the parameters
means = shown.groupby("method").agg(value=("value", "mean"), parameters=("with_head", "mean"))

figure = Figure(figsize=(6.5, 4), layout="constrained")
axes = figure.add_subplot()
axes.scatter(means.parameters, 100 * means.value, s=18)
for method, row in means.iterrows():
    axes.annotate(method, (row.parameters, 100 * row.value), fontsize=7, xytext=(3, 3),
                  textcoords="offset points")  # fmt: skip
axes.set(xscale="log", xlabel="trainable parameters, head included",
         ylabel=f"{shown.title.iloc[0]} (%), mean over data sets")  # fmt: skip
figure.savefig(target, dpi=150)
