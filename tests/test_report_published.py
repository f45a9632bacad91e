"""Our numbers beside the published ones."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from report_support import FGVC, METHODS, PAPER, QUICK, REAL, VTAB, record, records, spec

from snella.errors import UserError
from snella.report import build_table, parse_spec, tidy, write_table
from snella.report.published.audit import audit
from snella.report.published.papers import (
    match_rows,
    names,
    our_method,
    read_paper,
    read_table,
    sources,
    tables,
)
from snella.report.published.versus import compare_published, judge, mismatches
from snella.suite.config import load

CONFIG = Path(__file__).parent.parent / "config"
FOUR = ("sun397", "patch_camelyon", "clevr_count", "smallnorb_azi")  # SNELLA's Tables 11 and 12
TASKS = [task for group in VTAB.values() for task in group]
SAME = {
    "selection": "best-test",
    "normalisation": "imagenet",
    "schedule": "released",
    "epochs": 100,
    "drop_path": 0.1,
    "hyperparameters": "released",
}
ROWS = {
    label.lower(): label
    for label in ("Full", "Bias", "LoRA-8", "LoRA-16", "SNELL-8", "SNELLA-8", "SNELLA-32")
}
# the paper's own tables disagree here: Table 13 repeats another paper's cells
DISAGREE = {("lora-8", "structured"), ("lora-8", "VTAB-1k mean over groups")}


def descriptions():
    found = {}
    for path in (CONFIG / "tables").glob("*.yaml"):
        found |= yaml.safe_load(path.read_text())
    return found


def shipped(name, **changes):
    return parse_spec(name, descriptions()[name] | changes)


def build(described, suite, methods, runs, **others):
    return build_table("t", described, suite, methods, tidy(runs), **others)


def printed(number):
    return {
        (line["label"], line["dataset"]): float(line["value"]) / 100
        for line in read_table("snella", number)
        if line["dataset"]
    }


def as_if_published(rows=ROWS):
    """Records that hold exactly the paper's cells: FGVC of Table 1, VTAB-1k of Table 13."""
    cells = printed(1) | printed(13)
    names = {"suite": "paper", "backbone": "vit-b16", "protocol": SAME}
    runs = records(lambda m, d, s: cells[rows[m], d], rows, [*FGVC, *TASKS], **names)
    for run in runs:
        run["metrics"]["best-test"] = run["metrics"].pop("last")
    return runs


def test_all_numbers_of_the_package_are_there():
    tables = [f for f in (files("snella.report") / "published").iterdir() if f.name.endswith("csv")]
    lines = [line for f in tables for line in csv.DictReader(f.read_text().splitlines())]
    assert (len(tables), len(lines)) == (35, 2466)
    assert all(float(line["value"]) >= 0 for line in lines)


def test_the_papers_cells_give_the_papers_table():
    versus = compare_published(build(shipped("table1"), PAPER, ROWS, as_if_published()))
    assert len(versus.pairs) == len(ROWS) * 10
    for (method, column), pair in versus.pairs.items():
        if (method, column) not in DISAGREE and "over tasks" not in column:
            assert abs(pair.difference) < 0.06, (method, column)
            assert pair.verdict[0] in ("reproduced", "explained") or abs(pair.difference) > 0.05


def test_the_mean_of_table_13_is_over_tasks():
    versus = compare_published(build(shipped("table13"), PAPER, ROWS, as_if_published()))
    pair = versus.pairs["snella-32", "mean over tasks"]
    assert abs(pair.difference) < 0.06 and pair.value == 74.9
    assert ("snella-32", "mean over groups") not in versus.pairs  # beside the other, no news
    mean = {"label": "Mean", "mean_of": list(VTAB), "mean": "groups"}
    versus = compare_published(
        build(
            shipped("table13", columns=[mean, {"datasets_of": "natural"}]),
            PAPER,
            ROWS,
            as_if_published(),
        )
    )
    alone = versus.pairs["snella-32", "mean"]
    assert alone.printed is None
    assert alone.note == "the published mean is over tasks, ours over groups"


def test_a_mean_over_other_tasks_has_no_published_counterpart():
    suite = replace(PAPER, groups={**PAPER.groups, "natural": VTAB["natural"][:6]})
    table = build(shipped("table1"), suite, ROWS, as_if_published())
    columns = [c.key for c in compare_published(table).columns]
    assert "natural" not in columns and "cub" in columns
    assert not any("mean over" in key for key in columns)


def as_tfds_has_them(runs):
    """The same runs on TFDS's records instead of the community's copies."""
    names = {task: f"{task}-tfds" for task in TASKS}
    return [
        r | {"run": r["run"] | {"dataset": names.get(r["run"]["dataset"], r["run"]["dataset"])}}
        for r in runs
    ]


def test_columns_of_tfds_are_compared_and_the_pixels_named():
    """Copies went through JPEG; VPT, from which Full and Bias are copied, read TFDS."""
    groups = {g: [f"{d}-tfds" for d in ds] for g, ds in VTAB.items()}
    suite = replace(PAPER, groups={**PAPER.groups, **groups})
    table = build(shipped("table13"), suite, ROWS, as_tfds_has_them(as_if_published()))
    versus = compare_published(table)
    for method in ROWS:
        pair = versus.pairs[method, "cifar100-tfds"]
        assert abs(pair.difference) < 0.06 and versus.pairs[method, "mean over tasks"].printed
        named = [c for c in pair.causes if "JPEG" in c and "ours: as TFDS has them" in c]
        assert len(named) == (method not in ("full", "bias"))
    cells = compare_published(build(shipped("table1"), suite, ROWS, as_if_published())).pairs
    assert not any("JPEG" in c for pair in cells.values() for c in pair.causes
                   if pair.column.key in FGVC)  # fmt: skip


def test_the_audit_compares_tfds_where_there_are_no_copies():
    runs = as_if_published({"snella-32": "SNELLA-32"})
    for run in runs:
        run["metrics"]["best-test"]["top1"] += 0.2
    for mixed in (as_tfds_has_them(runs), [*as_tfds_has_them(runs), *runs]):
        found = audit(tidy(mixed))
        line = found[
            (found["source"] == "snella")
            & (found["table"] == 13)
            & (found["label"] == "SNELLA-32")
            & (found["dataset"] == "dtd")
        ].iloc[0]
        assert line["ours"] == pytest.approx(line["printed"] + 20)
        assert ("as TFDS has them" in line["why"]) == (len(mixed) == len(runs))


def test_facts_are_of_rows_and_not_of_papers():
    rows = ROWS | {"snell-32": "SNELL-32"}
    versus = compare_published(build(shipped("table13"), PAPER, rows, as_if_published(rows)))
    said = {
        label: [t for t, ls in versus.mismatches.items() if label in ls] for label in rows.values()
    }
    for own in ("SNELL-8", "SNELL-32", "SNELLA-8", "SNELLA-32"):
        assert said[own] == []
    assert any("val200" in text for text in said["Full"])
    assert any("5 seeds; ours: 1" in text for text in said["Bias"])
    longer = [r | {"protocol": r["protocol"] | {"epochs": 200}} for r in as_if_published(rows)]
    versus = compare_published(build(shipped("table13"), PAPER, rows, longer))
    assert versus.mismatches["published: 100 epochs; ours: 200"] == [
        "SNELL-8",
        "SNELLA-8",
        "SNELLA-32",
    ]


def test_every_difference_of_protocol_is_noted(tmp_path):
    names = {"suite": "paper", "backbone": "vit-b16"}
    runs = records(0.5, ["snella-32", "mine"], [*FGVC, *TASKS], seeds=[0, 1], **names)
    methods = {"snella-32": "SNELLA-32", "mine": "Mine"}
    paths = write_table(build_table("t", shipped("table1"), PAPER, methods, tidy(runs)), tmp_path)
    assert {f"t_vs_published.{kind}" for kind in ("csv", "md", "tex")} <= {p.name for p in paths}
    text = (tmp_path / "t_vs_published.md").read_text()
    for word in ("best-test", "ours: last", "ImageNet mean", "of 1 seed; ours: 2", "JPEG", "EMA"):
        assert word in text
    assert "| SNELLA-32 |" in text and "50.0 ± 0.0" in text
    assert "Not in the published table: Mine." in text
    rows = list(csv.DictReader((tmp_path / "t_vs_published.csv").open()))
    cub = next(r for r in rows if (r["method"], r["column"]) == ("snella-32", "cub"))
    assert float(cub["published"]) == 90.1 and float(cub["difference"]) == pytest.approx(-40.1)
    assert (cub["published_label"], cub["verdict"]) == ("SNELLA-32", "explained")
    assert "best-test" in cub["cause"]


def test_segmentation_says_how_table_5_was_made():
    """Foreground recall beside what is printed, and every known difference of protocol."""
    suite = replace(PAPER, groups={"polyp_seg": ["kvasir-seg"]}, backbone="sam-vit-b")
    methods = {"full": "Full", "snella-8": "SNELLA-8"}
    recall = {"name": "released-dice", "title": "mDice", "unit": "%", "higher_is_better": True}
    names = {"suite": "paper", "backbone": "sam-vit-b", "metric_info": [recall]}
    ours = {"epochs": 20, "batch_size": 1, "lr": 1e-3, "image_size": 512, "train_split": "train"}
    runs = records(0.95, methods, ["kvasir-seg"], protocol=ours, metric="released-dice", **names)
    for run in runs:
        run["metrics"]["last"] = {"epoch": 19, "released-dice": 0.95}
    columns = [{"datasets_of": "polyp_seg", "metric": "released-dice"}]
    versus = compare_published(build(shipped("table5", columns=columns), suite, methods, runs))
    pair = versus.pairs["snella-8", versus.columns[0].key]
    assert pair.value == pytest.approx(96.88) and pair.verdict[0] == "explained"
    said = " ".join(versus.mismatches)
    for word in ("best-test", "those of the test subset", "1024 pixels; ours: 512"):
        assert word in said
    for word in ("20 epochs", "batches of one", "learning rate", "ImageNet mean"):
        assert word not in said


def test_a_demo_or_foreign_suite_is_never_compared():
    source = {"source": "snella", "table": 1}
    for suite in (QUICK, REAL):
        assert compare_published(build(spec(published=source), suite, METHODS, [])) is None
    demo = build(shipped("table1"), replace(PAPER, demo=True), ROWS, [])
    assert compare_published(demo) is None


def test_a_published_table_must_exist():
    def compared(source, table):
        published = {"source": source, "table": table}
        runs = records(0.5, ["mine"], FGVC, suite="paper", backbone="vit-b16")
        made = build(shipped("table1", published=published), PAPER, {"mine": "Mine"}, runs)
        return compare_published(made)

    assert compared("snella", 1) is None
    with pytest.raises(UserError, match=r"snella_table14\.csv"):
        compared("snella", 14)
    with pytest.raises(UserError, match="published source 'snela'"):
        compared("snela", 1)


def test_a_table_of_several_backbones_needs_ours_to_be_known():
    runs = records(0.5, ["snella-8"], TASKS, suite="paper")

    def compared(suite, **chosen):
        published = {"source": "snella", "table": 2, **chosen}
        made = build(shipped("table1", published=published), suite, {"snella-8": "S"}, runs)
        return compare_published(made)

    assert compared(PAPER) is None  # Table 2 has no supervised backbone
    foreign = replace(PAPER, backbone="mine")
    with pytest.raises(UserError, match=r"more than once; name `backbone` and `pretraining`"):
        compared(foreign)
    assert compared(foreign, pretraining="mae_in1k").pairs["snella-8", "natural"].value == 69.2


def test_two_backbones_stand_side_by_side():
    suites = {
        name: replace(PAPER, name=name, title=name, backbone=backbone)
        for name, backbone in {
            "vtab1k-mae": "vit-b16-mae",
            "vtab1k-mocov3": "vit-b16-mocov3",
        }.items()
    }
    rows = {"snella-8": "SNELLA-8", "full": "Full"}
    runs = [
        run
        for name, suite in suites.items()
        for run in records(0.7, rows, TASKS, suite=name, backbone=suite.backbone)
    ]
    table = build(shipped("table2"), PAPER, rows, runs, others=suites)
    versus = compare_published(table)
    natural = [c.key for c in versus.columns if c.key.startswith("natural")]
    assert [versus.pairs["snella-8", key].value for key in natural] == [69.2, 77.0]
    contradictory = versus.pairs["full", "MoCo v3 mean (vtab1k-mocov3) over groups"]
    assert any("which give 66.23" in cause for cause in contradictory.causes)


def test_companion_papers_rows_are_found_without_being_named():
    for source, number, wanted in (
        ("s2ft", 1, {"s2ft-3000": 12, "s2ft-6000": 13, "fourierft": 11, "spt-lora": 10, "gps": 9}),
        ("sparse_tuning", 1, {f"sparse-tuning-{k}": n for k, n in (("0.5", 18), ("0.9", 20))}),
        ("sparse_tuning", 1, {"dyt-0.5": 15, "adapter-8": 3, "bias": 4, "vpt-deep": 6}),
        ("snella", 1, {"gps": 16, "spt-lora": 14, "lora-16": 13, "adapter-8": 5}),
    ):
        assert match_rows(read_table(source, number), list(wanted)) == wanted
    # which LoRA is meant is not printed, but known
    assert match_rows(read_table("s2ft", 2), ["lora-8", "lora-16"]) == {"lora-8": 5}
    assert match_rows(read_table("s2ft", 2), ["lora-16"]) == {}
    # an ablation of a method is not the method
    assert match_rows(read_table("snella", 11), ["snella-32"]) == {}
    assert our_method(read_table("snella", 11)[0]) == "snella-32-budget-0.01"
    assert our_method(read_table("s2ft", 6)[1]) is None


def test_the_audit_knows_every_row_that_a_table_of_ours_prints():
    for name, data in descriptions().items():
        if "published" not in data:
            continue
        described = parse_spec(name, data)
        methods = [m for group in described.rows for m in group.methods]
        lines = read_table(described.published.source, described.published.table)
        found = match_rows(lines, methods)
        by_row = {number: method for method, number in found.items()}
        for line in lines:
            if int(line["row"]) in by_row:
                assert our_method(line) == by_row[int(line["row"])], (name, line["label"])


def test_commands_of_the_audit_lead_somewhere():
    config = load(CONFIG / "config.yaml")
    for row in audit(tidy([])).to_dict("records"):
        words = row["command"].split()
        if not words:
            continue
        suite = config.suites[row["command"].partition("suite=")[2].split()[0]]
        if words[0] == "snella":
            method, dataset = (words[words.index(f"--{k}") + 1] for k in ("method", "dataset"))
            assert method in config.methods and dataset in suite.datasets, row["command"]
        else:
            target = Path(words[-1]).stem.removesuffix("_vs_published")
            assert target in config.tables, row["command"]


def test_the_checkpoint_is_a_cause():
    """SSF and GPS start from AugReg's ViT-B/16, the rows around them from the original one."""

    def found(method, **line):
        printed = {"source": "snella", "table": "1", "suite": "vtab1k", "method": method,
                   "variant": "", "backbone": "vit_b16", "pretraining": "in21k_sup"}  # fmt: skip
        facts = read_paper("snella").facts(printed | line)
        own = {"normalisation": {"inception"}, "selection": {"best-test"}}
        said = {
            b: mismatches(facts, own | {"backbone": {b}}) for b in ("vit-b16", "vit-b16-augreg")
        }
        return [b for b, texts in said.items() if any("AugReg" in text for text in texts)]

    assert found("ssf") == ["vit-b16"]
    assert found("snella", variant="rank=8") == found("full") == ["vit-b16-augreg"]
    assert found("ssf", backbone="swin_b", pretraining="in22k_sup") == []
    backbones = names().backbones
    assert backbones["vit-b16-augreg"] == backbones["vit-b16"] == "vit_b16 in21k_sup"


def test_fine_grained_numbers_say_what_they_were_trained_on():
    for method, variant, wanted in (
        ("snella", "rank=32", ("train", "timm")), ("snell", "rank=8", ("train", "timm")),
        ("vpt_deep", "", ("train", "flip")),
    ):  # fmt: skip
        line = {"method": method, "variant": variant, "suite": "fgvc", "source": "snella",
                "table": "1", "backbone": "vit_b16", "pretraining": "in21k_sup"}  # fmt: skip
        protocol = read_paper("snella").facts(line).protocol
        assert (protocol["train_split"].values, protocol["augmentation"].values) == tuple(
            [value] for value in wanted
        )


def test_counts_are_judged_by_their_conventions():
    """Shares of full fine-tuning, numbers that are cut, and parts that are left out."""
    counts = {
        "full": 85_798_656, "s2ft-3000": 72_000, "s2ft-6000": 144_000, "lora-plus": 294_912,
        "ssf": 205_824, "dyt-0.5": 165_996, "sparse-tuning-0.7": 279_808, "lora-8": 500_000,
    }  # fmt: skip
    names = {"suite": "vtab1k", "backbone": "vit-b16"}
    runs = [
        record(m, "dtd", 0.5, parameters={"trainable": n, "with_head": n + 38_046}, **names)
        for m, n in counts.items()
    ]

    def verdicts(runs):
        found = audit(tidy(runs))
        found = found[(found["metric"] == "params") & (found["table"] == 1)]
        return {row.method: (row.verdict, row.why) for row in found.itertuples()}

    found = verdicts(runs)
    for method in ("full", "s2ft-3000", "sparse-tuning-0.7"):
        assert found[method][0] == "reproduced"
    for method, cause in (("s2ft-6000", "cut"), ("ssf", "cut"), ("dyt-0.5", "dispatchers")):
        assert found[method][0] == "explained" and cause in found[method][1]
    for method in ("lora-plus", "lora-8"):
        assert found[method] == ("refuted", "the counts differ by more than 1%")
    verdict, why = verdicts(runs[1:])["s2ft-3000"]
    assert verdict == "open" and "full fine-tuning" in why


def test_every_count_that_is_explained_is_printed():
    for source in sources():
        for count in doubts(source, "counted otherwise: "):
            row = count.where["row"]
            rows = set(row) if isinstance(row, list) else {row}
            assert {int(x["row"]) for x in concerned(source, count)} == rows, (source, count)


def test_numbers_are_not_said_to_come_from_papers_that_lack_them():
    """VPT has no complete sets, NOAH no fine-grained ones and no other backbone."""
    lines = read_table("sparse_tuning", 2)
    paper = read_paper("sparse_tuning")
    for line in (line for line in lines if line["suite"] == "full_image" and line["dataset"]):
        facts = paper.facts(line)
        own = line["method"] in ("sparse_tuning", "lora", "adaptformer", "vpt_deep")
        assert ("batch_size" in facts.protocol) == own
        assert facts.seeds is None and "selection" not in facts.protocol
    for line in [*read_table("snella", 1), *read_table("snella", 2), *read_table("snella", 3)]:
        if line["method"] in ("adapter", "lora") and line["metric"] == "top1":
            origin = read_paper("snella").facts(line).origin
            first = (line["suite"], line["pretraining"]) == ("vtab1k", "in21k_sup")
            assert ("NOAH" in origin) == (first and line["variant"] in ("dim=8", "rank=8"))


@pytest.mark.parametrize("name", sorted(descriptions()))
def test_every_shipped_table_finds_its_printed_rows(name):
    data = descriptions()[name]
    if "published" not in data:
        return
    described = parse_spec(name, data)
    methods = [m for group in described.rows for m in group.methods]
    lines = read_table(described.published.source, described.published.table)
    lines = [x for x in lines if described.published.backbone in (None, x["backbone"])]
    found = match_rows(lines, methods)
    own = [m for group in described.rows if group.own for m in group.methods]
    assert set(own) <= set(found)
    assert len(set(found.values())) == len(found)
    printed_rows = {int(line["row"]) for line in lines}
    missing = printed_rows - set(found.values())
    # S²FT's real images are no method: a constant row prints them.
    # S²FT's priors by full fine-tuning and sampling towards low frequencies, and DyT's four
    # experts, are not here
    allowed = {
        "sparse_tuning_table2": 1, "sparse_tuning_table8": 1, "s2ft_table3": 1, "s2ft_table6": 4,
        "s2ft_table7": 1,
    }  # fmt: skip
    assert len(missing) <= allowed.get(name, 0), missing


def doubts(source, start):
    return [doubt for doubt in read_paper(source).doubts if doubt.text.startswith(start)]


def concerned(source, doubt):
    return [line for line in read_table(source, int(doubt.where["table"])) if doubt.cover(line)]


def contradictions():
    start = "the printed mean contradicts its own cells, which give "
    return [
        (s, c, float(c.text[len(start) :].split()[0])) for s in sources() for c in doubts(s, start)
    ]


def test_every_printed_number_of_classification_on_images_has_a_command():
    """All but rows that nothing here implements, which the audit names as such."""
    none, absent = [], set()
    for source in sources():
        for number in tables(source):
            for line in read_table(source, number):
                if line["suite"] in ("vtab1k", "fgvc", "full_image", "cost"):
                    method = our_method(line)
                    if method is None:
                        absent.add((source, number, int(line["row"])))
                    elif not names().suite(line):
                        none.append(line)
    assert none == []
    priors = {("s2ft", 6, row) for row in (2, 3, 4, 5)}
    assert absent == priors | {("s2ft", 7, 2)}


def test_a_mean_over_some_tasks_is_compared_with_the_printed_one():
    """Tables 11 and 12 average four of the nineteen tasks."""
    suite = replace(PAPER, groups={"four": list(FOUR)})
    lines = read_table("snella", 12)
    cells = {(int(x["row"]), x["dataset"]): float(x["value"]) / 100 for x in lines}
    schedules = ("-constant", "-linear", "-quadratic", "")
    rows = {f"snella-32{schedule}": row for row, schedule in enumerate(schedules, 1)}
    names = {"suite": "paper", "backbone": "vit-b16", "protocol": SAME}
    runs = records(lambda m, d, s: cells[rows[m], d], rows, FOUR, **names)
    for run in runs:
        run["metrics"]["best-test"] = run["metrics"].pop("last")
    described = shipped("table12", columns=[{"datasets_of": "four", "mean": "tasks"}])
    versus = compare_published(build(described, suite, {m: m for m in rows}, runs))
    for method in rows:
        pair = versus.pairs[method, "four mean"]
        assert abs(pair.difference) < 0.006
        assert any("another setting" in cause for cause in pair.causes)


def test_eleven_printed_means_contradict_their_cells():
    assert len(contradictions()) == 11
    for source, c, recomputed in contradictions():
        lines = read_table(source, int(c.where["table"]))
        (line,) = concerned(source, c)
        place = ("row", "suite", "backbone", "pretraining", "metric")
        row = [x for x in lines if all(x[k] == line[k] for k in place)]
        groups = defaultdict(list)
        for cell in row:
            if cell["group"] != "mean":
                groups[cell["group"] or group_of(cell)].append(float(cell["value"]))
        means = [math.fsum(g) / len(g) for g in groups.values()]
        cells = [v for g in groups.values() for v in g]
        mean = (
            sum(means) / len(means)
            if line["aggregation"] == "mean_of_groups"
            else sum(cells) / len(cells)
        )
        assert mean == pytest.approx(recomputed, abs=0.006), (source, c)
        assert abs(mean - float(line["value"])) > 0.15
        assert read_paper(source).against(line)[0].startswith("the printed mean contradicts")


def group_of(line):
    found = [g for g, ds in VTAB.items() if line["dataset"] in ds]
    return found[0] if found and line["suite"] == "vtab1k" else line["suite"]


def test_every_other_print_names_one_number():
    for source in sources():
        for other in doubts(source, "printed differently: "):
            assert len(concerned(source, other)) == 1, (source, other)


def test_tables_of_all_papers_are_known():
    assert {s: len(tables(s)) for s in sources()} == {"s2ft": 9, "snella": 17, "sparse_tuning": 9}


def test_costs_are_compared_in_our_unit():
    runs = [record("sparse-tuning-0.7", d, 0.5, suite="paper", backbone="vit-b16") for d in TASKS]
    for run in runs:
        run["parameters"]["with_head"], run["cost"]["gflops"] = 317_000, 11.66
    methods = {"sparse-tuning-0.7": "Sparse-Tuning (0.7)"}
    versus = compare_published(build(shipped("sparse_tuning_table1"), PAPER, methods, runs))
    count = versus.pairs["sparse-tuning-0.7", "trainable"]
    assert (count.value, count.ours.mean) == (pytest.approx(320), pytest.approx(317))
    assert versus.pairs["sparse-tuning-0.7", "gflops"].difference == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("difference", "values", "causes", "verdict"),
    [
        (None, [], [], "open"),
        (0.04, [70.0], [], "reproduced"),
        (0.5, [70.0, 71.0, 70.5], [], "reproduced"),
        (9.0, [70.0, 70.1, 70.2], ["other epochs"], "explained"),
        (9.0, [70.0, 70.1, 70.2], [], "refuted"),
        (9.0, [70.0], [], "open"),
        (9.0, [70.0], ["other epochs"], "explained"),
    ],
)
def test_a_difference_is_noise_has_a_cause_or_refutes(difference, values, causes, verdict):
    assert judge(difference, 0.05, values, causes)[0] == verdict


def test_nothing_to_compare_is_said(tmp_path, capsys):
    from snella.cli import main

    assert main(["versus", "table1", "--config", "suite=smoke", f"results={tmp_path}"]) == 0
    assert "No published number can be compared with table1" in capsys.readouterr().err
