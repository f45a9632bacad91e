# One job is one run. The settings are the run's own resolved configuration, so that an edit of
# the configuration makes stale only the runs it concerns; the method's file and the backbone
# are inputs, compared by content.
rule train:
    input:
        manifest="<data>/prepared/{dataset}/manifest.json",
        method=PLAN.method_file,
        backbone=PLAN.backbone_file,
    output:
        "<results>/runs/{suite}/{backbone}/{dataset}/{method}/seed{seed}/record.json",
    log:
        "<logs>/train/{suite}/{backbone}/{dataset}/{method}/seed{seed}.log",
    benchmark:
        "<logs>/benchmarks/train/{suite}/{backbone}/{dataset}/{method}/seed{seed}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=3000,
    params:
        settings=PLAN.settings,
        folder=PLAN.folder,
        warm=PLAN.warm,
    shell:
        "snella execute {params.warm} --settings {params.settings:q} --folder {params.folder:q}"
        " > {log:q} 2>&1 || {{ tail -n 1 {log:q} >&2; exit 1; }}"
