from snella.jobs.workflow import WorkflowPlan

# All logic is in snella.suite.plan; a mistake in the configuration is one line here.
PLAN = WorkflowPlan.from_snakemake(config, workflow)
CONFIG = PLAN.config
REQUESTS = PLAN.requests


wildcard_constraints:
    place=r"(search/)?",
    suite=r"[A-Za-z0-9_-]+",
    backbone=r"[A-Za-z0-9_.-]+",
    dataset=r"[A-Za-z0-9_.-]+",
    method=r"[A-Za-z0-9_.-]+",
    seed=r"\d+",
    table=rf"(?!figure|audit|report|lr_sweep|(?:{PLAN.figure_names})\.)"
    r"(?:(?!_statistics|_ranks|_vs_published)[A-Za-z0-9_])+",
    figure=PLAN.figure_names,
