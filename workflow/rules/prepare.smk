# The origin is the data set's entry, the names, sizes and times of its files, and the code that
# reads them: a list edited or an image replaced is noticed.
rule prepare:
    output:
        "<data>/prepared/{dataset}/manifest.json",
    log:
        "<logs>/prepare/{dataset}.log",
    benchmark:
        "<logs>/benchmarks/prepare/{dataset}.tsv"
    retries: 0
    conda:
        REQUESTS.environment
    resources:
        mem_mb=4000,
        runtime=120,
        slurm_partition=REQUESTS.cpu_partition,
        slurm_account=REQUESTS.account,
    params:
        overlay=PLAN.dataset_overlay,
        origin=PLAN.dataset_origin,
    shell:
        "snella prepare {wildcards.dataset:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"
