# One job is one run. Its settings and the digest of the code that trains and scores it are
# parameters, so that an edit makes stale only the runs whose number it can move; data and
# weights are inputs, compared by content. A job does what is missing: a finished training is only
# scored. `place` is empty, or `search/` for a trial of a search. Where scoring needs resources of
# its own, training is the job of the second rule.
rule run:
    input:
        manifest="<data>/prepared/{dataset}/manifest.json",
        backbone=PLAN.backbone_file,
        training=PLAN.training,
    output:
        "<results>/{place}runs/{suite}/{backbone}/{dataset}/{method}/seed{seed}/record.json",
    log:
        "<logs>/{place}run/{suite}/{backbone}/{dataset}/{method}/seed{seed}.log",
    benchmark:
        "<logs>/benchmarks/{place}run/{suite}/{backbone}/{dataset}/{method}/seed{seed}.tsv"
    conda:
        REQUESTS.environment
    threads: PLAN.threads
    resources:
        gpu=REQUESTS.gpu,
        mem_mb=REQUESTS.memory,
        runtime=REQUESTS.minutes,
        slurm_partition=REQUESTS.partition,
        slurm_account=REQUESTS.account,
    params:
        settings=PLAN.settings,
        code=PLAN.code,
    shell:
        "snella execute --settings {params.settings:q} > {log:q} 2>&1"
        " && {{ [ -t 2 ] || tail -n 1 {log:q} >&2; }} || {{ tail -n 1 {log:q} >&2; exit 1; }}"


rule train:
    input:
        manifest="<data>/prepared/{dataset}/manifest.json",
        backbone=PLAN.backbone_file,
    output:
        "<results>/{place}runs/{suite}/{backbone}/{dataset}/{method}/seed{seed}/training.json",
    log:
        "<logs>/{place}train/{suite}/{backbone}/{dataset}/{method}/seed{seed}.log",
    benchmark:
        "<logs>/benchmarks/{place}train/{suite}/{backbone}/{dataset}/{method}/seed{seed}.tsv"
    conda:
        REQUESTS.environment
    threads: PLAN.threads
    resources:
        gpu=REQUESTS.gpu,
        mem_mb=REQUESTS.memory,
        runtime=REQUESTS.minutes,
        slurm_partition=REQUESTS.partition,
        slurm_account=REQUESTS.account,
    params:
        settings=PLAN.settings,
        code=PLAN.training_code,
    shell:
        "snella execute --stage train --settings {params.settings:q}"
        " > {log:q} 2>&1 || {{ tail -n 1 {log:q} >&2; exit 1; }}"
