rule prepare:
    input:
        PLAN.source_lists,
    output:
        "<data>/prepared/{dataset}/manifest.json",
    log:
        "<logs>/prepare/{dataset}.log",
    benchmark:
        "<logs>/benchmarks/prepare/{dataset}.tsv"
    conda:
        "../../envs/environment.yaml"
    params:
        entry=PLAN.dataset_entry,
        data=PLAN.data_folder,
    shell:
        "snella prepare {wildcards.dataset:q} --config data={params.data:q}"
        " datasets.{wildcards.dataset}={params.entry:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"
