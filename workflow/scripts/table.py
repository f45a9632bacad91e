"""Write one table from the records of its runs."""

import sys
from pathlib import Path

from snella.jobs import tables
from snella.jobs.workflow import WorkflowPlan

with open(snakemake.log[0], "w") as log:  # noqa: F821
    sys.stdout = sys.stderr = log
    plan = WorkflowPlan.from_snakemake(snakemake.config)  # noqa: F821
    written = tables.write(plan.config, snakemake.wildcards.table)  # noqa: F821
    log.write("\n".join(str(Path(path)) for path in written) + "\n")
