# Figures of sample images and trade-offs (Figures 9 and 14 of the SNELLA paper).
ruleorder: generation_figure > figure
ruleorder: generation_figure > pdf


rule generation_figure:
    input:
        PLAN.generation_figure_records,
    output:
        report(
            "<results>/{figure}.pdf",
            category="Figures",
            caption="../report/figure.rst",
        ),
    log:
        "<logs>/figures/{figure}.log",
    benchmark:
        "<logs>/benchmarks/figures/{figure}.tsv"
    wildcard_constraints:
        figure="figure9|figure14|samples|tradeoff_text|tradeoff_drift",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        overlay=PLAN.overlay,
    shell:
        "python -m snella.jobs.generation_figures {wildcards.figure} --out {output:q}"
        " --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# Remakes what ships as workflow/resources/sd3_quick and clip_quick.
rule pretrain_generation:
    output:
        directory("<results>/pretrain/{model}_quick"),
    log:
        "<logs>/pretrain_{model}.log",
    benchmark:
        "<logs>/benchmarks/pretrain_{model}.tsv"
    wildcard_constraints:
        model="sd3|clip",
    conda:
        "../../envs/environment.yaml"
    threads: 2
    resources:
        mem_mb=6000,
        runtime=600,
    shell:
        "python -m snella.quick.pretrain_{wildcards.model} --out {output:q} > {log:q} 2>&1"
