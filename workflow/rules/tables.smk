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
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.table_content,
    shell:
        "snella table {wildcards.table:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# The paired comparison of all rows with a reference, and their average ranks.
rule statistics:
    input:
        PLAN.table_records,
    output:
        tex="<results>/{table}_statistics.tex",
        csv="<results>/{table}_statistics.csv",
        markdown="<results>/{table}_statistics.md",
        pdf="<results>/{table}_ranks.pdf",
        png=report(
            "<results>/{table}_ranks.png",
            category="Statistics",
            caption="../report/table.rst",
        ),
    log:
        "<logs>/statistics/{table}.log",
    benchmark:
        "<logs>/benchmarks/statistics/{table}.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.table_content,
    shell:
        "snella statistics {wildcards.table:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# Each number beside the published one, with the reason for the difference.
rule versus:
    input:
        PLAN.table_records,
    output:
        tex="<results>/{table}_vs_published.tex",
        csv="<results>/{table}_vs_published.csv",
        markdown="<results>/{table}_vs_published.md",
    log:
        "<logs>/versus/{table}.log",
    benchmark:
        "<logs>/benchmarks/versus/{table}.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.table_content,
    shell:
        "snella versus {wildcards.table:q} --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# Every published number and what became of it here, from whatever records there are.
rule audit:
    output:
        multiext("<results>/audit", ".html", ".md", ".csv"),
    log:
        "<logs>/audit.log",
    benchmark:
        "<logs>/benchmarks/audit.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.page_content,
    shell:
        "snella audit --overlay {params.overlay:q} > {log:q} 2>&1"
        " || {{ tail -n 1 {log:q} >&2; exit 1; }}"


# All results as one page for the browser, from whatever records there are.
rule page:
    output:
        report("<results>/report.html", category="Page", caption="../report/page.rst"),
    log:
        "<logs>/report.log",
    benchmark:
        "<logs>/benchmarks/report.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        overlay=PLAN.overlay,
        content=PLAN.page_content,
    shell:
        "snella report --overlay {params.overlay:q} > {log:q} 2>&1"
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
        "../../envs/latex.yaml"
    shell:
        "snella pdf {input:q} > {log:q} 2>&1 || {{ tail -n 1 {log:q} >&2; exit 1; }}"
