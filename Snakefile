# snella-bench: the tables of parameter-efficient fine-tuning, from raw data to LaTeX.
#
#   <data>/prepared/{dataset}/manifest.json                                     prepare.smk
#   <results>/runs/{suite}/{backbone}/{dataset}/{method}/seed{seed}/record.json  train.smk
#   <results>/{suite}/search.yaml lr_sweep.pdf                                   search.smk
#   <results>/{table}.tex .csv .md, <results>/{table}.pdf .png                   tables.smk
#   <results>/report.html                                                        tables.smk
#   <results>/{figure}.pdf .png .csv                                             figures.smk
#   <results>/pretrain/vit_quick.safetensors                                     pretrain.smk
import sys

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"


pathvars:
    results=CONFIG.results,
    data=CONFIG.data,


report: "workflow/report/workflow.rst"


include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/pretrain.smk"


localrules:
    all,
    pretrain,


rule all:
    default_target: True
    input:
        f"<results>/{PLAN.main_table}.tex",


rule pretrain:
    input:
        "<results>/pretrain/vit_quick.safetensors",


PLAN.check_targets(workflow, sys.argv)


onstart:
    PLAN.begin(workflow)


onerror:
    shell(
        "echo 'Some jobs failed; what is finished is kept and the same command retries the rest."
        " To see what failed and why: snella status."
        " To build the table with gaps: the same command with allow_missing=true after --config'"
        " >&2"
    )
