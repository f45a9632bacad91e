rule table:
    input:
        PLAN.table_records,
    output:
        tex=report(
            "<results>/{table}.tex", category="Tables", caption="../report/table.rst"
        ),
        csv="<results>/{table}.csv",
        markdown="<results>/{table}.md",
    log:
        "<logs>/tables/{table}.log",
    benchmark:
        "<logs>/benchmarks/tables/{table}.tsv"
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.table_content,
    shell:
        "snella table {wildcards.table:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


rule pdf:
    input:
        "<results>/{table}.tex",
    output:
        pdf="<results>/{table}.pdf",
        png=report(
            "<results>/{table}.png", category="Tables", caption="../report/table.rst"
        ),
    log:
        "<logs>/pdf/{table}.log",
    benchmark:
        "<logs>/benchmarks/pdf/{table}.tsv"
    localrule: True
    conda:
        "../../envs/environment.yaml"
    shell:
        "snella pdf {input:q} > {log:q} 2>&1 || {{ tail -n 1 {log:q} >&2; exit 1; }}"
