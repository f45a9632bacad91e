from snella.jobs.workflow import WorkflowPlan

# All logic is in snella.suite.plan; a mistake in the configuration is one line here.
PLAN = WorkflowPlan.from_snakemake(config, workflow)
CONFIG = PLAN.config


wildcard_constraints:
    suite=r"[A-Za-z0-9_-]+",
    backbone=r"[A-Za-z0-9_.-]+",
    dataset=r"[A-Za-z0-9_.-]+",
    method=r"[A-Za-z0-9_.-]+",
    seed=r"\d+",
    table=r"(?!figure|audit|lr_sweep)(?:(?!_statistics|_ranks|_vs_published)[A-Za-z0-9_])+",
    figure=r"figure[A-Za-z0-9_]+",
