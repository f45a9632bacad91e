"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const pooled = (number) => DATA.pool[number];
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// An element from tag, properties and children; text is always text, never markup.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Light and dark: the system's choice until the button is used.
const root = document.documentElement;
const remembered = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
if (remembered) root.dataset.theme = remembered;
find("#theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page of a file may have none */ }
});

// Tables: sort, filter, differences, arrow keys.
for (const section of all("section.table")) new NumberTable(section);

function NumberTable(section) {
  const index = Number(section.dataset.table), info = DATA.tables[index];
  const table = find("table", section), bodies = all("tbody", table);
  const rows = all("tr[data-row]", table), shown = find("output", section);
  const texts = rows.map((row) => {
    const title = find(".title", row.parentElement);
    return `${row.cells[0].textContent} ${title ? title.textContent : ""}`.toLowerCase();
  });
  const homes = rows.map((row) => row.parentElement);
  const printed = new Map(all("td .value", table).map((span) => [span, span.textContent]));
  const value = (row, column) => info.cells[row.dataset.row][column].v;
  let order = null; // {column, sign}

  function sort(column) {
    const better = column < 0 ? 1 : -info.columns[column].better;
    if (!order || order.column !== column) order = { column, sign: better };
    else if (order.sign === better) order = { column, sign: -better };
    else order = null;
    for (const head of all("[aria-sort]", table)) {
      const own = order && Number(find("button", head).dataset.column) === column;
      head.setAttribute("aria-sort", !own ? "none" : order.sign > 0 ? "ascending" : "descending");
    }
    arrange();
  }
  function arrange() {
    if (!order) {
      rows.forEach((row, i) => homes[i].append(row));
    } else {
      const { column, sign } = order;
      const key = (row) => (column < 0 ? row.cells[0].textContent : value(row, column));
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      bodies[0].append(...sorted);
    }
    titles();
  }
  // A section's title stands only over its own rows.
  function titles() {
    for (const body of bodies) {
      const title = find(".title", body);
      if (title) title.hidden = Boolean(order) || !all("tr[data-row]", body).some((row) => !row.hidden);
    }
  }
  function filter(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      count += !row.hidden;
    });
    shown.textContent = words.length ? `${count} of ${rows.length} rows` : "";
    titles();
  }
  function show(choice) {
    const base = choice === "numbers" || choice === "published" ? null : Number(choice);
    table.classList.toggle("published", choice === "published");
    table.classList.toggle("differences", base !== null);
    for (const [span, text] of printed) span.textContent = text;
    for (const row of rows) row.classList.toggle("base", Number(row.dataset.row) === base);
    info.columns.forEach((column, c) => difference(column, c, base));
  }
  function difference(column, c, base) {
    const from = base === null ? null : info.cells[base][c].v;
    const apart = rows.map((row) => {
      const own = value(row, c);
      return from === null || own === null || !column.ranked ? null : own - from;
    });
    const most = Math.max(...apart.map((d) => Math.abs(d ?? 0)), 1e-12);
    rows.forEach((row, i) => {
      const cell = row.cells[c + 1], d = apart[i];
      cell.classList.toggle("better", d !== null && d * column.better > 0);
      cell.classList.toggle("worse", d !== null && d * column.better < 0);
      cell.style.setProperty("--t", d === null ? "0%" : `${Math.round((45 * Math.abs(d)) / most)}%`);
      if (d !== null && Number(row.dataset.row) !== base) find(".value", cell).textContent = signed(d, column.digits);
    });
  }

  table.addEventListener("click", (event) => {
    const head = event.target.closest("[data-column]"), cell = event.target.closest("[data-cell]");
    if (head) sort(Number(head.dataset.column));
    if (cell) openCell(index, Number(cell.closest("tr").dataset.row), Number(cell.dataset.cell));
  });
  find("input", section).addEventListener("input", (event) => filter(event.target.value));
  find("select", section).addEventListener("change", (event) => show(event.target.value));
  const cells = () => rows.filter((row) => !row.hidden).sort((a, b) => a.compareDocumentPosition(b) & 4 ? -1 : 1)
    .map((row) => all("[data-cell]", row));
  const first = find("[data-cell]", table);
  if (first) first.tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const from = event.target.closest("[data-cell]");
    if (!step || !from) return;
    event.preventDefault();
    const grid = cells(), y = grid.findIndex((line) => line.includes(from)), x = grid[y].indexOf(from);
    const to = grid[y + step[0]]?.[x + step[1]];
    if (!to) return;
    for (const button of all('[data-cell][tabindex="0"]', table)) button.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}
function signed(number, digits) {
  const text = Math.abs(number).toFixed(digits);
  return Number(text) === 0 ? text : (number < 0 ? "−" : "+") + text;
}

// The dialog: a cell and the runs behind it.
const dialog = find("#dialog"), body = find("#dialog-body");
function open(title, ...content) {
  find("#dialog-title").textContent = title;
  body.replaceChildren(...content.filter(Boolean));
  if (!dialog.open) dialog.showModal();
  find(".sheet").scrollTop = 0;
}
find("#close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

function openCell(t, r, c) {
  const table = DATA.tables[t], cell = table.cells[r][c], column = table.columns[c];
  const name = [column.block, column.label].filter(Boolean).join(" ");
  const unit = column.ranked && column.unit ? ` ${column.unit}` : "";
  const place = make("div");
  const figure = make("p", { className: "figure" }, cell.v === null ? "–" : cell.v.toFixed(column.digits) + unit);
  if (cell.error) figure.append(make("small", {}, ` ± ${cell.error.toPrecision(2)} over test images`));
  const about = {};
  figure.append(make("small", { className: "line" }, column.title));
  if (cell.seeds) about.Seeds = Object.entries(cell.seeds).map(([seed, v]) => `${seed}: ${v.toFixed(column.digits)}`).join(", ");
  if (cell.note) about[cell.v === null ? "Why empty" : "Note"] = cell.note;
  if (cell.pub) {
    about.Published = `${cell.pub.value}${unit} (${cell.pub.label})`;
    if (cell.pub.difference) about.Difference = `${cell.pub.difference}: ${cell.pub.title}`;
    about.Because = [cell.pub.why, cell.pub.note].filter(Boolean).join("; ");
  }
  open(`${table.rows[r]}, ${name}`, figure, facts(about), tabs(cell.runs, place), place);
}

// One button per run; the first run that tells something is open.
function tabs(runs, place) {
  if (!runs.length) return make("p", { className: "quiet" }, "No run is planned for this cell.");
  const several = new Set(runs.map((n) => DATA.runs[n].dataset)).size > 1;
  const seeds = new Set(runs.map((n) => DATA.runs[n].seed)).size > 1;
  const buttons = runs.map((n) => {
    const run = DATA.runs[n];
    const label = [several || !seeds ? run.data : null, seeds ? `seed ${run.seed}` : null].filter(Boolean).join(", ");
    const button = make("button", { type: "button", className: `state ${run.state}` }, label);
    button.addEventListener("click", () => choose(button, n));
    return button;
  });
  function choose(button, n) {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    place.replaceChildren(...describeRun(DATA.runs[n]));
  }
  choose(buttons[0], runs[0]);
  if (buttons.length < 2) return null;
  return make("div", { className: "tabs", role: "group", "aria-label": "Runs" }, ...buttons);
}
function openRun(n) {
  const run = DATA.runs[n];
  open(`${run.label} on ${run.data}, seed ${run.seed}`, ...describeRun(run));
}

function describeRun(run) {
  const times = run.times ?? [], own = {
    State: [run.state, run.why].filter(Boolean).join(": "), Reason: run.reason, "Later failure": run.failure,
    Suite: run.suite, "Data set": run.data, Seed: run.seed, Folder: run.folder,
    Started: date(times[0]), Ended: date(times[1]), Warnings: (run.warnings ?? []).join("; "),
  };
  if (!run.commands) return [heading("Run"), facts(own), make("p", { className: "quiet" }, "This run has left no files yet.")];
  const environment = parts(run.environment), settings = run.settings ? parts(run.settings) : parts(run.method_settings);
  return [
    heading("Run"), facts(own),
    heading("Numbers"), numbers(run),
    curves(run),
    make("div", { className: "columns" },
      make("div", {}, heading("Cost"), facts(Object.fromEntries(run.cost.map(([title, text]) => [pooled(title), text])))),
      make("div", {}, heading("Environment"), facts(flat(environment)))),
    heading("Configuration"), make("pre", {}, JSON.stringify(settings, null, 2)),
    heading("End of the log"), make("pre", {}, run.log.length ? run.log.join("\n") : "no log is kept on this page"),
    ...commandBlock(run),
    make("details", {}, make("summary", {}, "Identity and digests"),
      facts({ ...flat(run.identity), ...flat(run.digests, "file ") })),
  ].filter(Boolean);
}
const heading = (text) => make("h3", {}, text);
const parts = (pairs) => Object.fromEntries(pairs.map(([key, number]) => [key, JSON.parse(pooled(number))]));
const date = (text) => text?.replace("T", " ").replace("+00:00", " UTC");
function flat(content, before = "") {
  return Object.assign({}, ...Object.entries(content).map(([k, v]) =>
    v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${before}${k} `) : { [before + k.replaceAll("_", " ")]: v }));
}
function facts(content) {
  const list = make("dl", { className: "facts" });
  for (const [name, value] of Object.entries(content)) {
    if (value === null || value === undefined || value === "") continue;
    list.append(make("dt", {}, name), make("dd", {}, String(value)));
  }
  return list;
}
function numbers(run) {
  if (!run.numbers.length) return make("p", { className: "quiet" }, "none");
  const rules = [...new Set(run.numbers.map(([rule]) => rule))];
  const epochs = rules.map((rule) => run.numbers.find((n) => n[0] === rule)[2]);
  const titles = [...new Set(run.numbers.map(([, title]) => title))];
  const at = (title, rule) => run.numbers.find((n) => n[0] === rule && n[1] === title)?.[3] ?? "";
  const head = make("tr", {}, make("th", { scope: "col" }, "Selection"), ...rules.map((rule, i) =>
    make("th", { scope: "col" }, pooled(rule) + (epochs[i] ? `, epoch ${epochs[i]}` : ""))));
  const lines = titles.map((title) => make("tr", {}, make("th", { scope: "row" }, pooled(title)), ...rules.map((rule) => make("td", {}, at(title, rule)))));
  return make("div", { className: "scroll" }, make("table", { className: "list" }, make("thead", {}, head), make("tbody", {}, ...lines)));
}
function curves(run) {
  const found = Object.entries(run.curve).filter(([, values]) => values.filter((v) => v !== null).length > 1);
  if (!found.length) return null;
  const titles = { loss: "Training loss", val: `Validation: ${run.metric[0]}${run.metric[1] ? ` (${run.metric[1]})` : ""}` };
  return make("div", { className: "curves" }, ...found.map(([name, values]) => make("div", {}, heading(titles[name]), curve(values, titles[name]))));
}
function curve(values, title) {
  const width = 320, height = 130, left = 44, right = 8, top = 8, bottom = 22;
  const known = values.map((v, i) => [i, v]).filter(([, v]) => v !== null);
  const low = Math.min(...known.map(([, v]) => v)), high = Math.max(...known.map(([, v]) => v));
  const x = (i) => left + (i / Math.max(values.length - 1, 1)) * (width - left - right);
  const y = (v) => top + (1 - (high > low ? (v - low) / (high - low) : 0.5)) * (height - top - bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over ${values.length} epochs, from ${known[0][1]} to ${known.at(-1)[1]}` });
  for (const v of new Set([low, high])) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
      drawn("text", { class: "tick", x: left - 6, y: y(v) + 3.5, "text-anchor": "end" }, Number(v.toPrecision(3))));
  }
  svg.append(drawn("text", { class: "tick", x: left, y: height - 6 }, "epoch 1"),
    drawn("text", { class: "tick", x: width - right, y: height - 6, "text-anchor": "end" }, values.length),
    drawn("path", { class: "curve", d: known.map(([i, v], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("") }));
  return svg;
}

// The command repeats the very text of the settings that the run had.
function settingsText(run) {
  return `{${run.settings.map(([key, number]) => `${JSON.stringify(key)}: ${pooled(number)}`).join(", ")}}`;
}
const quoted = (text) => `'${text.replaceAll("'", `'"'"'`)}'`;
function commandsOf(run) {
  return run.commands.map((line) => line ?? `snella execute --settings ${quoted(settingsText(run))}`).join("\n");
}
function commandBlock(run) {
  const text = commandsOf(run), copy = make("button", { type: "button", className: "copy" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(text).then(() => { copy.textContent = "Copied"; }));
  return [make("h3", {}, "To repeat this run", copy), make("pre", { className: "wrap", id: "command" }, text)];
}

// Links into the dialog from plots, examples and lists.
document.addEventListener("click", (event) => {
  const point = event.target.closest("[data-open]"), run = event.target.closest("[data-run]");
  const picture = event.target.closest("[data-picture]");
  if (point) openCell(...point.dataset.open.split(",").map(Number));
  if (run) openRun(Number(run.dataset.run));
  if (picture) {
    const image = find("img", picture);
    open(image.alt, make("img", { src: image.src, alt: image.alt, className: "big" }));
  }
});

// Long lists: their rows are made as they are asked for, a hundred at a time.
const PAGE = 100;
function list(section, row) {
  const place = find("#" + section.id + "-rows tbody"), more = find(".more", section);
  let items = [], count = 0;
  function add() {
    place.append(...items.slice(count, count + PAGE).map(row));
    count = Math.min(count + PAGE, items.length);
    more.hidden = count >= items.length;
  }
  more.addEventListener("click", add);
  return (chosen) => { items = chosen; count = 0; place.replaceChildren(); add(); };
}
const td = (...children) => make("td", {}, ...children);

if (DATA.attention.length) {
  list(find("#attention"), (n) => {
    const run = DATA.runs[n];
    return make("tr", {}, td(make("span", { className: `state ${run.state}` }, run.state)),
      td(make("button", { type: "button", className: "link", "data-run": n }, run.label)),
      ...[run.data, run.suite, run.seed, run.why].map((text) => td(String(text))));
  })(DATA.attention);
}

if (DATA.audit) {
  const text = find("#audit-text"), verdict = find("#audit-verdict");
  const NAMES = ["reproduced", "explained", "refuted", "open"];
  const strings = DATA.audit.map((row) => row.slice(1).map(pooled));
  const lower = strings.map((cells) => cells.join(" ").toLowerCase());
  const show = list(find("#audit"), (i) => {
    const cells = strings[i], name = NAMES[DATA.audit[i][0]];
    return make("tr", {}, ...cells.slice(0, -1).map((cell, c) => make("td", { className: c === 6 ? name : c === 7 ? "text" : "" }, cell)),
      td(make("code", {}, cells.at(-1))));
  });
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fitting = strings.map((_, i) => i).filter((i) =>
      (!verdict.value || DATA.audit[i][0] === Number(verdict.value)) && words.every((word) => lower[i].includes(word)));
    find("#audit-count").textContent = `${fitting.length} of ${strings.length} numbers`;
    show(fitting);
  };
  text.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  filter();
}
