# The best settings of each row of a suite, of trials that are runs scored on validation examples.
rule search:
    input:
        PLAN.search_records,
    output:
        yaml="<results>/{suite}/search.yaml",
        pdf="<results>/{suite}/lr_sweep.pdf",
        png=report(
            "<results>/{suite}/lr_sweep.png",
            category="Search",
            caption="../report/search.rst",
        ),
    log:
        "<logs>/search/{suite}.log",
    benchmark:
        "<logs>/benchmarks/search/{suite}.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.search_content,
    shell:
        "snella search {wildcards.suite:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# The plot of the configured suite's search.
rule lr_sweep:
    input:
        f"<results>/{CONFIG.suite}/lr_sweep.{{kind}}",
    output:
        "<results>/lr_sweep.{kind}",
    log:
        "<logs>/lr_sweep_{kind}.log",
    benchmark:
        "<logs>/benchmarks/lr_sweep_{kind}.tsv"
    wildcard_constraints:
        kind="pdf|png",
    localrule: True
    conda:
        "../../envs/core.yaml"
    shell:
        "cp {input:q} {output:q} 2> {log:q}"
