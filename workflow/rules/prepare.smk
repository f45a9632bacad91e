# The origin is the data set's entry, the names, sizes and times of its files, and the code that
# reads them: a list edited or an image replaced is noticed.
rule prepare:
    output:
        "<data>/prepared/{dataset}/manifest.json",
    log:
        "<logs>/prepare/{dataset}.log",
    benchmark:
        "<logs>/benchmarks/prepare/{dataset}.tsv"
    conda:
        PLAN.environment
    retries: 0
    resources:
        mem_mb=4000,
        runtime=120,
        slurm_partition=PLAN.cpu_partition,
        slurm_account=PLAN.account,
    params:
        overlay=PLAN.dataset_overlay,
        origin=PLAN.dataset_origin,
    shell:
        "snella prepare {wildcards.dataset:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"
