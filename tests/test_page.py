"""The page: one file, everything escaped, the tables' numbers, and what a click shows."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser_support
import numpy as np
import pytest
import report_support as support
from hypothesis import given, settings
from hypothesis import strategies as st

from snella.report.page import (
    Content,
    PageRun,
    PageSuite,
    PageTable,
    pictures,
    render,
    scatter,
)
from snella.report.page.view import view
from snella.report.published.audit import audit
from snella.report.runs.details import describe, repeat
from snella.report.table import Table
from snella.report.text import table_grid
from snella.tasks import Gallery, GalleryLine

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 5_000_000
EVIL = "<img src=x onerror=\"document.title='broken'\">'&"
EVIL_END = "</script><script>document.title='broken'</script>"
METHODS = {
    "full": "Full",
    "linear": "Linear",
    "lora-8": EVIL,
    "bias": "Bias",
    "snella-8": "SNELLA-8",
}
SETTINGS = {
    "suite": "quick",
    "seed": 0,
    "method": {"name": "lora-8", "scale": 1.0, "note": EVIL_END},
}
ACCURACY = {"full": 0.61, "linear": 0.4, "lora-8": 0.59, "bias": 0.3, "snella-8": 0.655}


def run_folder(results: Path, made: dict) -> Path:
    """A run's folder with settings, curve and a hostile log."""
    folder = support.write_run(results, made)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    (folder / "history.csv").write_text("epoch,loss,val\n0,2.0,0.3\n1,1.0,0.5\n2,0.5,nan\n")
    (folder / "log.txt").write_text(f"first line\n{EVIL_END}\n\x1b[31mred\n")
    return folder


def table_of(suite: Any, frame_runs: list, **changes: Any) -> Table:
    rows = [
        {"methods": ["full"], "reference": True},
        {"group": "Low rank", "methods": ["linear", "lora-8", "bias"]},
        {"methods": ["snella-8"], "own": True},
    ]
    return support.make(frame_runs, suite, methods=METHODS, rows=rows, **changes)


def content_of(tmp: Path, suite: Any = support.QUICK) -> Content:
    """A page of one table with a failed cell, and with all its runs on disk."""
    runs, records = {}, []
    for method, value in ACCURACY.items():
        for number, dataset in enumerate(support.DATASETS):
            failed = (method, dataset) == ("full", "count")
            outcome = {"status": "failed", "reason": f"boom {EVIL}"} if failed else {}
            made = support.record(
                method,
                dataset,
                None if failed else value + 0.01 * number,
                suite=suite.name,
                **outcome,
            )
            made["cost"] |= {
                "peak_memory_mb": 500 + 100 * len(method),
                "train_seconds": 3.0 + value,
            }
            made["parameters"] = {**made["parameters"], "with_head": 1000 * len(method)}
            folder = run_folder(tmp / "results", made)
            records.append(made | {"folder": folder})
            state, why = ("failed", f"failed: boom {EVIL}") if failed else ("done", "")
            run = PageRun(suite.name, method, dataset, 0, METHODS[method], f"{dataset} {EVIL_END}",
                          state, why, folder.as_posix(), describe(folder))  # fmt: skip
            runs[run.key] = run
    table = table_of(suite, records)
    image = np.full((300, 400, 3), 90, np.uint8)
    gallery = Gallery(
        f"Gallery {EVIL}",
        "By rule.",
        ["Image", EVIL],
        [GalleryLine(EVIL, [image, None], ["", "x"])],
    )
    part = PageTable(f"Table 1 {EVIL}", table, f"snakemake -- {EVIL}")
    suites = [PageSuite(suite.title, suite.banner, [part], [gallery])]
    return Content(suites, runs, [f"table9: {EVIL}"], audit(table.results.frame))


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> Content:
    return content_of(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(content) -> str:
    return render(content)


class Parsed(HTMLParser):
    """All elements with their attributes, and the text of the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_that_fetches_nothing(page):
    parsed = Parsed(page)
    for tag, attributes in parsed.elements:
        assert (attributes.get("src") or "data:").startswith("data:"), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    assert not {tag for tag, _ in parsed.elements} & {"link", "iframe", "object", "embed", "base"}
    assert "url(" not in page and "@import" not in page and "fetch(" not in page


def test_whatever_it_shows_is_escaped(page):
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert all(set(a) <= {"src", "alt", "loading"} for tag, a in parsed.elements if tag == "img")
    assert not [
        name for _, attributes in parsed.elements for name in attributes if name.startswith("on")
    ]
    assert EVIL in " ".join(parsed.words)  # as text it is all there
    assert EVIL_END not in page.replace("</script>\n<script>", "")
    policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv"))
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_tables_show_what_latex_shows(content, page):
    (suite,) = content.suites
    grid = table_grid(suite.tables[0].table)
    rows = re.findall(r'<tr data-row="\d+">.*?</tr>', page, re.S)
    shown = [re.findall(r'class="value">(.*?)</span>', row) for row in rows]
    assert shown == [[entry.text for entry in line.cells] for line in grid.lines]
    assert all(Parsed(text).words[0] in page for text in grid.letters)


def test_a_demo_says_so_and_is_never_compared(page):
    assert "not comparable with published numbers" in page and ">demo</span>" in page
    assert "beside published" not in page and 'class="beside"' not in page


def test_published_numbers_stand_beside_ours_with_verdict_and_cause(tmp_path):
    runs = [
        support.record(m, d, 0.8 + 0.01 * seed, seed, suite="paper", backbone="vit-b16")
        for m in ACCURACY for d in support.VTAB["natural"] for seed in (0, 1)
    ]  # fmt: skip
    columns = [{"block": "Natural", "datasets_of": "natural", "mean": "tasks"}]
    published = {"source": "snella", "table": 13}
    table = table_of(support.PAPER, runs, columns=columns, published=published)
    shown = view(Content([PageSuite("Real", "", [PageTable("Table 13", table, "")])]))
    (own,) = shown["suites"][0]["tables"]
    assert own["versus"] and own["verdicts"]
    cell = next(c for c in shown["data"]["tables"][0]["cells"][-1] if "pub" in c)
    assert cell["pub"]["verdict"] in ("reproduced", "explained", "refuted")
    assert cell["pub"]["why"] and cell["pub"]["difference"]
    page = render(Content([PageSuite("Real", "", [PageTable("Table 13", table, "")])]))
    assert "beside published" in page and f'class="{cell["pub"]["verdict"]}"' in page


def test_the_same_content_gives_the_same_bytes(content, page):
    assert render(content) == page


def test_an_empty_tree_is_a_page_that_says_what_to_do():
    assert "make table1" in render(Content())


def many(content: Content, count: int, **changes: Any) -> dict:
    """Runs like the content's first one, each with identities and times of its own."""
    template = next(iter(content.runs.values()))
    runs = {}
    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        details = {
            **template.details,
            "identity": dict.fromkeys(template.details["identity"], digest),
            "digests": dict.fromkeys(("adapter.safetensors", "scores.npz", "predictions"), digest),
            "curve": {"loss": [number / (1 + e) for e in range(6)], "val": [0.5] * 6},
        }
        own = {"method": f"m{number}", "folder": f"results/runs/{number}", "details": details}
        run = replace(template, **own, **changes)
        runs[run.key] = run
    return runs


@pytest.mark.parametrize(("count", "state", "budget"), [(500, "done", 0.5), (1500, "stale", 0.9)])
def test_a_page_of_many_runs_keeps_its_budget(content, count, state, budget):
    """What the runs repeat is stored once; those that need attention are rows of the script's."""
    page = render(Content(content.suites, many(content, count, state=state), (), content.audit))
    assert len(page) < budget * BUDGET
    assert page.count("<tr") < 100


def test_runs_are_missing_where_their_row_was_begun(content):
    def run(method: str, dataset: str, state: str) -> PageRun:
        template = next(iter(content.runs.values()))
        return replace(template, method=method, dataset=dataset, state=state, details=None)

    runs = [
        run("a", "x", "done"), run("a", "y", "missing"), run("b", "x", "missing"),
        run("b", "y", "missing"), run("c", "x", "missing"),
    ]  # fmt: skip
    shown = view(Content(runs={one.key: one for one in runs}))
    assert dict(shown["states"]) == {"done": 1, "missing": 1} and shown["idle"] == 2


def test_pictures_shrink_until_they_fit(monkeypatch):
    monkeypatch.setattr(pictures, "BUDGET", 50_000)
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    gallery = Gallery("t", "", ["h"] * 4, [GalleryLine("l", [noise] * 4, [""] * 4)])
    (shown,) = pictures.views([gallery])
    size = sum(len(cell["uri"]) for line in shown["lines"] for cell in line["cells"])
    assert 0 < size <= pictures.BUDGET
    monkeypatch.setattr(pictures, "BUDGET", 10_000)  # even the smallest fit once only
    first, second = pictures.views([gallery, gallery])
    assert first["text"] == "" and first["lines"]
    assert second["lines"] == [] and "Left out" in second["text"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20),
    st.booleans(),
)
def test_no_point_beats_one_of_the_pareto_front(values, higher):
    points = [scatter.Point(str(i), x, y) for i, (x, y) in enumerate(values)]
    sign = 1 if higher else -1
    front = scatter.pareto(points, scatter.Axis("", higher))
    assert front == sorted(front, key=lambda p: (p.x, p.y))
    for point in points:
        beaten = any(
            o.x <= point.x and sign * o.y >= sign * point.y and (o.x, o.y) != (point.x, point.y)
            for o in points
        )
        assert (point in front) != beaten


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.001, 1e6], [0.0, 0.0, 5.0], [-2.0, 1.0]])
def test_trade_offs_of_any_numbers_stay_in_the_picture(values):
    points = [scatter.Point("a", v, 10 - v) for v in values]
    drawn = scatter.draw(points, scatter.Axis("x", False), scatter.Axis("y"))
    assert all(
        0 <= m["x"] <= drawn["width"] and 0 <= m["y"] <= drawn["height"] for m in drawn["marks"]
    )
    assert drawn["y_ticks"] or len(set(values)) == 1


def test_the_verb_writes_the_page_from_whatever_there_is(tmp_path, monkeypatch, capsys):
    from snella.cli import main

    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"
    for method in ("full", "linear"):
        made = support.record(method, "digits", 0.5, suite="smoke")
        run_folder(results, made)
    assert main(["report", "--config", "suite=smoke", f"results={results}"]) == 0
    text = (results / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(results / "report.html")
    assert "Smoke suite" in text and "2 stale" in text.replace("<b>", "").replace("</b>", "")
    assert main(["report", "--stale", "--config", "suite=smoke", f"results={results}"]) == 0
    assert 'class="value">50.0<' in (results / "report.html").read_text()


def test_a_damaged_record_costs_no_page(tmp_path, monkeypatch):
    from snella.cli import main

    monkeypatch.chdir(ROOT)
    folder = run_folder(tmp_path, support.record("full", "digits", 0.5, suite="smoke"))
    path = folder / "record.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert main(["report", "--config", "suite=smoke", f"results={tmp_path}"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "changed by hand" in text and "<b>1</b> damaged" in text


def test_the_workflow_has_the_page(tmp_path):
    options = ["--config", "suite=smoke", f"results={tmp_path}", "--", f"{tmp_path}/report.html"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"\bpage +1\b", done.stdout + done.stderr), (
        done.stderr
    )


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if browser_support.CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    # Not a folder that is removed here: the browser's children write on for a moment.
    with browser_support.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def shown(browser, page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    browser.errors.clear()
    browser.size(1280, 900)
    browser.open(file)
    yield browser
    assert browser.errors == []
    assert browser("document.title") == "snella-bench: results"  # nothing hostile has run


ROWS = "[...document.querySelectorAll('.numbers tr[data-row]')].filter(r => !r.hidden)"
NAMES = f"{ROWS}.map(r => r.cells[0].textContent)"


def click(page: browser_support.Page, selector: str) -> None:
    page(f"document.querySelector({json.dumps(selector)}).click()")


def test_a_click_on_a_heading_sorts(shown):
    column = ".numbers [data-column='2']"
    before = shown(NAMES)
    click(shown, column)
    assert shown(NAMES) == ["SNELLA-8", "Full", EVIL, "Linear", "Bias"]
    assert (
        shown("document.querySelector(\"[aria-sort='descending'] button\").dataset.column") == "2"
    )
    click(shown, column)
    assert shown(NAMES) == ["Bias", "Linear", EVIL, "Full", "SNELLA-8"]
    click(shown, column)
    assert shown(NAMES) == before
    last = len(shown("[...document.querySelectorAll('.numbers [data-column]')].map(b => 1)")) - 2
    click(shown, f".numbers [data-column='{last}']")  # a mean that failed comes last both ways
    assert shown(NAMES)[-1] == "Full"


def test_rows_are_filtered_by_name_and_section(shown):
    def type_(text: str) -> list[str]:
        shown(f"{{const i = document.querySelector('.table input'); i.value = {json.dumps(text)};"
              "i.dispatchEvent(new Event('input'))}")  # fmt: skip
        return shown(NAMES)

    assert type_("snella") == ["SNELLA-8"]
    assert shown("document.querySelector('.table output').textContent") == "1 of 5 rows"
    assert type_("low rank") == ["Linear", EVIL, "Bias"]
    assert type_("nothing like it") == [] and len(type_("")) == 5


def test_differences_from_a_row_are_coloured(shown):
    shown("{const s = document.querySelector('.table select'); s.value = '0';"
          "s.dispatchEvent(new Event('change'))}")  # fmt: skip
    cell = "document.querySelector(\"tr[data-row='4'] [data-cell='1']\")"
    assert shown(f"{cell}.textContent") == "+4.5"
    assert shown(f"{cell}.parentElement.className").split() == ["better"]
    worse = "document.querySelector(\"tr[data-row='1'] [data-cell='1']\").parentElement"
    assert "worse" in shown(f"{worse}.className")
    assert shown(f"getComputedStyle({worse}).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_a_cell_opens_its_run_by_mouse_and_by_keyboard(shown, content):
    dialog = "document.querySelector('#dialog')"
    shown("document.querySelector('.numbers [data-cell]').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        shown.press(key)
    shown.press("Enter")
    assert shown(f"{dialog}.open")
    text = shown(f"{dialog}.textContent")
    for words in (
        EVIL,
        EVIL_END,
        "Training loss",
        "first line",
        "0123456789",
        "A CPU",
        "git checkout",
    ):
        assert words in text, words
    assert shown(f"{dialog}.querySelectorAll('svg path.curve').length") == 2
    assert shown(f"{dialog}.querySelectorAll('img, script').length") == 0
    assert repeat(SETTINGS) in shown("document.querySelector('#command').textContent").splitlines()
    shown.press("Escape")
    assert not shown(f"{dialog}.open")
    focus = "document.activeElement"
    assert shown(f"[{focus}.closest('tr').dataset.row, {focus}.dataset.cell]") == ["2", "1"]


def test_a_mean_opens_the_runs_it_is_of_and_says_why_it_is_empty(shown):
    last = "document.querySelectorAll(\"tr[data-row='0'] [data-cell]\")"
    shown(f"[...{last}].at(-1).click()")
    body = "document.querySelector('#dialog-body')"
    assert "Why empty" in shown(f"{body}.textContent")
    shown(
        f"[...{body}.querySelectorAll('.tabs button')]"
        ".find(button => button.className.includes('failed')).click()"
    )
    assert "boom <img" in shown(f"{body}.textContent")
    click(shown, "#close")
    assert not shown("document.querySelector('#dialog').open")


def test_plots_pictures_and_lists_open_the_dialog(shown):
    title = "document.querySelector('#dialog-title').textContent"
    shown(
        "document.querySelector('circle.point')"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert any(label in shown(title) for label in METHODS.values())
    click(shown, "#close")
    click(shown, "[data-picture]")
    assert shown("document.querySelector('#dialog img').naturalWidth") == 192
    click(shown, "#close")
    click(shown, "#attention [data-run]")
    assert shown(title).startswith("Full on count")


def test_the_audit_is_filtered(shown):
    rows = "document.querySelectorAll('#audit-rows tbody tr').length"
    assert shown(rows) == 100
    text = "document.querySelector('#audit-text')"
    shown(f"{text}.value = 'snella 13 SNELLA-32 cifar100'")
    shown(f"{text}.dispatchEvent(new Event('input'))")
    assert 0 < shown(rows) < 10
    assert "cifar100" in shown("document.querySelector('#audit-rows tbody').textContent")


def test_a_long_list_is_made_as_it_is_asked_for(browser, content, tmp_path):
    file = tmp_path / "report.html"
    runs = many(content, 1500, state="stale", why="made with other code")
    file.write_text(render(Content(content.suites, runs, (), content.audit)))
    browser.open(file)
    rows = "document.querySelectorAll('#attention-rows tbody tr').length"
    assert browser(rows) == 100
    click(browser, "#attention .more")
    assert browser(rows) == 200 and not browser.errors
    click(browser, "#attention-rows tr:last-child [data-run]")
    shown = browser("document.querySelector('#dialog-body').textContent")
    assert "results/runs/199" in shown and "no log is kept on this page" in shown


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_every_width_and_both_schemes(shown, width, dark):
    shown.size(width, 844, dark=dark)
    assert shown("document.documentElement.scrollWidth") <= width
    ink, paper = shown(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = sum(map(int, re.findall(r"\d+", paper)[:3])) > 384
    assert light != dark and ink != paper
    click(shown, "#theme")
    assert shown("getComputedStyle(document.body).backgroundColor") != paper
    shown("localStorage.clear()")
