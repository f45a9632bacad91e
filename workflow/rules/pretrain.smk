# Remakes the quick suite's small backbone, which ships as workflow/resources/vit_quick.safetensors.
rule pretrain_backbone:
    output:
        "<results>/pretrain/vit_quick.safetensors",
    log:
        "<logs>/pretrain.log",
    benchmark:
        "<logs>/benchmarks/pretrain.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 2
    resources:
        mem_mb=3000,
        runtime=120,
    shell:
        "python -m snella.quick.pretrain --out {output:q} > {log:q} 2>&1"


# Remakes the quick segmentation suite's SAM: workflow/resources/sam_quick.safetensors.
rule pretrain_sam:
    output:
        "<results>/pretrain/sam_quick.safetensors",
    log:
        "<logs>/pretrain_sam.log",
    benchmark:
        "<logs>/benchmarks/pretrain_sam.tsv"
    conda:
        "../../envs/segmentation.yaml"
    threads: 2
    resources:
        mem_mb=3000,
        runtime=120,
    shell:
        "python -m snella.quick.pretrain_sam --out {output:q} > {log:q} 2>&1"


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
        "../../envs/generation.yaml"
    threads: 2
    resources:
        mem_mb=6000,
        runtime=600,
    shell:
        "python -m snella.quick.pretrain_{wildcards.model} --out {output:q} > {log:q} 2>&1"
