# Figures of examples and trade-offs, drawn from the predictions that the runs left. A figure may be
# called what a table is not: see common.smk.
rule figure:
    input:
        PLAN.figure_records,
    output:
        pdf="<results>/{figure}.pdf",
        png=report(
            "<results>/{figure}.png",
            category="Figures",
            caption="../report/figure.rst",
        ),
        csv="<results>/{figure}.csv",
    log:
        "<logs>/figures/{figure}.log",
    benchmark:
        "<logs>/benchmarks/figures/{figure}.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.figure_content,
    shell:
        "snella figure {wildcards.figure:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"
