"use strict";
// Everything of a run reaches the page as text nodes and attribute values, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function add(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const h = (tag, attributes = {}, ...children) => add(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  add(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// ---------------------------------------------------------------------------------------------------- words

const groups = data.groups.map((group, index) => ({
  ...group,
  index,
  letter: letters(index),
  colour: `var(--c${index % 8})`,
  dash: [null, "7 3", "2 3"][Math.floor(index / 8) % 3],
  runs: data.runs.filter((run) => run.group === index),
  visible: true,
}));

function letters(index) {
  const last = String.fromCharCode(65 + (index % 26));
  return index < 26 ? last : letters(Math.floor(index / 26) - 1) + last;
}
const count = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
const chip = (group) => h("span", { class: "chip", style: `--c: ${group.colour}` }, group.letter);
const words = (group) => group.label.map((pair) => pair.join(" ").trim()).join(", ");
const described = (group) => group.label.map(([name, value], i) =>
  [i ? ", " : "", name ? h("span", { class: "quiet" }, breakable(name), " ") : "", breakable(value)]);
const label = (group) => h("span", { class: "label" }, chip(group), " ", h("span", {}, described(group)));
const describe = (run) => `${words(groups[run.group])}${run.seed === "" ? "" : `, seed ${run.seed}`}`;

/** Four figures, without an exponent where that is short. */
function figures(value) {
  if (value === null) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(3);
  return size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : value.toPrecision(4);
}
/** Of axes: 19,200 as 19.2k. */
function brief(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${+(value / unit).toPrecision(4)}${letter}`;
  return size !== 0 && size < 1e-3 ? value.toExponential(0) : `${+value.toPrecision(4)}`;
}
/** Long names may break after their slashes, underscores and dots, numbers not. */
const breakable = (text) => text.split(/(?<=[_/]|\.(?=[a-z]))/).flatMap((part) => [part, h("wbr")]);

// ---------------------------------------------------------------------------------------------------- head, runs

function head() {
  const seeds = [...new Set(data.runs.map((run) => run.seed).filter((seed) => seed !== ""))];
  document.title = `Comparison: ${data.what}`;
  const row = (term, ...text) => h("div", {}, h("dt", {}, term), h("dd", {}, ...text));
  $("head").append(
    h("h1", {}, `Comparison of ${data.what}`),
    h("dl", {},
      row("distinct settings", `${groups.length}`),
      row(seeds.length === 1 ? "seed" : "seeds", seeds.join(", ") || "–"),
      row("made", data.made),
      row("from", h("code", {}, data.store))),
  );
}

/** Rows as given, or turned over: cells are elements made by functions, so that both ways read the same. */
function table(head, rows, turned) {
  const lines = [head, ...rows];
  const grid = turned ? head.map((_, i) => lines.map((line) => line[i])) : lines;
  const cell = (make, column, row) => make(row === 0 || (column === 0 ? "row" : null), column, row);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table, scrolls sideways" },
    h("table", {},
      h("thead", {}, h("tr", {}, grid[0].map((make, i) => cell(make, i, 0)))),
      h("tbody", {}, grid.slice(1).map((line, r) => h("tr", {}, line.map((make, i) => cell(make, i, r + 1)))))));
}
const makes = (attributes, ...children) => (header) =>
  header === true ? h("th", { scope: "col", ...attributes }, ...children)
    : header === "row" ? h("th", { scope: "row", ...attributes }, ...children) : h("td", attributes, ...children);

function runs() {
  const settings = data.settings;
  const columns = [
    makes({}, groups[0].label[0][0] ? "" : "setting"),
    ...settings.map(({ key, short }) => makes({ title: key }, h("b", {}, breakable(short)))),
    makes({}, "seeds"),
    makes({}, "runs"),
    makes({}, "state"),
  ];
  const rows = groups.map((group) => {
    const values = group.runs[0].settings;
    const states = Map.groupBy(group.runs, (run) => run.status.toLowerCase());
    return [
      makes({}, group.label[0][0] ? chip(group) : label(group)),
      ...settings.map(({ key }) => makes({ class: "value" }, key in values ? breakable(values[key]) : "–")),
      makes({ class: "fixed" }, [...new Set(group.runs.map((run) => run.seed))].join(", ") || "–"),
      makes({ class: "small names" }, group.runs.map((run, i) =>
        h("span", { title: run.id }, breakable(run.name), i < group.runs.length - 1 ? ", " : ""))),
      makes({ class: states.size === 1 && states.has("finished") ? "quiet" : "warn" },
        states.size === 1 ? [...states.keys()][0] : [...states].map(([state, of]) => `${of.length} ${state}`).join(", ")),
    ];
  });
  const list = data.runs.map((run) => [
    makes({}, h("span", { class: "label" }, chip(groups[run.group]), h("span", {}, breakable(run.name)))),
    makes({}, run.seed || "–"), makes({}, run.status.toLowerCase()), makes({}, run.started), makes({}, h("code", {}, run.id)),
  ]);
  $("runs").append(
    h("div", { class: "bar" }, h("h2", { id: "runs-title" }, "What was changed")),
    table(columns, rows, settings.length > 4 && settings.length > groups.length),
    settings.length ? "" : h("p", { class: "note" }, "No setting differs but the seed."),
    h("details", {},
      h("summary", {}, `${count(data.same.length, "setting")} the same in all`),
      h("dl", { class: "pairs" }, data.same.map(([key, value]) =>
        h("div", {}, h("dt", {}, breakable(key)), h("dd", {}, breakable(value)))))),
    h("details", {},
      h("summary", {}, `${count(data.runs.length, "run")}, with ids`),
      table(["run", "seed", "state", "started", "id"].map((name) => makes({}, name)), list, false)),
  );
}

// ---------------------------------------------------------------------------------------------------- scores

function scores() {
  const { columns, rows } = data.scores;
  const section = $("scores");
  section.append(h("div", { class: "bar" }, h("h2", { id: "scores-title" }, "Scores")));
  if (!rows.length) return section.append(h("p", { class: "note" }, "No run has been scored."));
  const scales = columns.map((_, c) => {
    const values = rows.flatMap((row) => (row.cells[c] ? row.cells[c].values.map((v) => v.value) : [])).filter((value) => value !== null);
    const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const decimals = Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high)) || 1))));
    return { low, high: high > low ? high : low + 1, decimals };
  });
  const strip = (cell, scale, colour) => {
    const x = (value) => 3 + 134 * ((value - scale.low) / (scale.high - scale.low));
    return s("svg", { class: "strip", viewBox: "0 0 140 12", preserveAspectRatio: "none", "aria-hidden": "true" },
      s("line", { x1: 0, x2: 140, y1: 6, y2: 6, class: "axis" }),
      cell.values.map((v) => s("line", { x1: x(v.value), x2: x(v.value), y1: 1.5, y2: 10.5, stroke: colour, "stroke-width": 1.5 })),
      cell.std === null ? null : s("circle", { cx: x(cell.mean), cy: 6, r: 3, fill: colour }));
  };
  const shown = (cell, c, colour) => {
    if (!cell) return h("td", { class: "score quiet" }, h("div", { class: "n" }, "–", h("span", { class: "mark" })));
    if (cell.mean === null) return h("td", { class: "score warn" }, h("div", { class: "n" }, "not finite", h("span", { class: "mark" })));
    const fixed = (value) => value.toFixed(scales[c].decimals);
    const each = cell.values.map((v) => `${describe(data.runs[v.run])}: ${v.value}`).join("\n");
    const mark = { best: "●", close: "○" }[cell.mark] || "";
    return h("td", { class: "score", title: each },
      h("div", { class: "n" },
        h("data", { value: cell.mean, class: cell.mark === "best" ? "best" : null }, fixed(cell.mean)),
        cell.std === null ? null : h("span", { class: "std" }, " ± ", h("data", { value: cell.std }, fixed(cell.std))),
        h("span", { class: "mark", role: mark ? "img" : null, "aria-label": cell.mark || null }, mark)),
      strip(cell, scales[c], colour));
  };
  const arrow = { lower: "↓", higher: "↑" };
  const range = (images) => (images.length ? [...new Set([images[0], images.at(-1)])].map((n) => n.toLocaleString("en")).join("–") : "–");
  const title = (column) => h("th", { scope: "col", class: "score" }, h("div", {},
    h("b", {}, `${column.name} `, h("span", { title: column.better && `${column.better} is better` }, arrow[column.better] || "")),
    h("br"), `n = ${column.images.toLocaleString("en")}`, h("br"),
    column.reference
      ? h("span", { title: `reference ${column.reference}` }, `vs ${column.reference_images.toLocaleString("en")} real (${column.reference.slice(0, 8)})`)
      : "no reference",
    column.seen_by_loss ? [h("br"), h("span", { class: "warn", title: "a loss of the run used the network of this metric" }, "seen by a loss")] : null));
  const line = (row, before) => {
    const group = row.teacher ? null : groups[row.group];
    const about = [row.teacher ? row.sampler : "", row.checkpoint === "last" ? "" : `${row.checkpoint} checkpoint`];
    const lead = group && before && before.teacher;
    return h("tr", { class: row.teacher ? "teacher" : lead ? "lead" : null },
      h("th", { scope: "row" }, group ? label(group) : "teacher", h("small", {}, about.filter(Boolean).join(", "))),
      row.cells.map((cell, c) => shown(cell, c, group ? group.colour : "var(--quiet)")),
      h("td", { class: "num" }, `${Math.max(...row.cells.map((cell) => (cell ? cell.seeds : 0)))}`),
      h("td", { class: "num" }, `${row.calls ?? "–"}`),
      h("td", { class: "num" }, row.teacher ? "–" : range(row.images)));
  };
  const last = ["seeds", ["calls", h("br"), "an image"], ["after", h("br"), "images"]];
  section.append(
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "scores, scrolls sideways" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"), columns.map(title), last.map((text) => h("th", { scope: "col", class: "num" }, text)))),
      h("tbody", {}, rows.map((row, r) => line(row, rows[r - 1]))))),
    h("p", { class: "note" },
      "Mean ± standard deviation over seeds (n − 1), of the last checkpoint unless a row says otherwise; a tick is one seed. ",
      "● best of the column; ○ off it by no more than the larger of the two deviations, so these runs do not tell the two apart. ",
      "Scores of another sample count or reference stand in a column of their own",
      columns.some((column) => column.seen_by_loss) ? ", and those whose network a loss of their run used: such a loss can better them by itself." : "."),
  );
}

// ---------------------------------------------------------------------------------------------------- controls

/** A row of buttons of which one is chosen. */
function choice(name, options, value, chosen) {
  return h("fieldset", { class: "choice" }, h("legend", {}, name), h("span", {}, options.map(([key, text]) =>
    h("label", {}, h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => chosen(key) }), text))));
}

// ---------------------------------------------------------------------------------------------------- curves

const view = { unit: "images", scale: "linear", cursor: null };
const charts = new Map();

/** One run's curve as [[x, y], ...]; y is null where it was not finite. */
function points(run, metric) {
  const curve = run.curves[metric];
  if (!curve) return [];
  const xs = run.axes[curve[0]][view.unit];
  return curve[1].map((y, i) => [xs[i], y]).filter(([x]) => x !== null);
}

function at(line, x) {
  const right = line.findIndex((point) => point[0] >= x);
  if (right <= 0) return right === 0 && line[0][0] === x ? line[0][1] : null;
  const [[x0, y0], [x1, y1]] = [line[right - 1], line[right]];
  if (x === x1) return y1;
  return y0 === null || y1 === null ? null : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

/** A group's seeds, and where they overlap their mean, least and greatest as [[x, mean, low, high], ...]. */
function series(group, metric) {
  const lines = group.runs.map((run) => points(run, metric)).filter((line) => line.length);
  if (lines.length < 2) return { group, lines, band: (lines[0] || []).map(([x, y]) => [x, y, y, y]) };
  const low = Math.max(...lines.map((line) => line[0][0]));
  const high = Math.min(...lines.map((line) => line.at(-1)[0]));
  const xs = [...new Set(lines.flat().map(([x]) => x))].filter((x) => x >= low && x <= high).sort((a, b) => a - b);
  const band = xs.map((x) => {
    const ys = lines.map((line) => at(line, x));
    return ys.includes(null) ? [x, null, null, null]
      : [x, ys.reduce((a, b) => a + b) / ys.length, Math.min(...ys), Math.max(...ys)];
  });
  return { group, lines, band };
}

/** About `most` round values from low to high. */
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}
function logTicks(low, high) {
  const found = [];
  const wide = Math.log10(high / low) > 2.5;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of wide ? [1] : [1, 2, 5]) {
      const value = +(m * 10 ** power).toPrecision(3);
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found.length > 2 ? found : ticks(low, high, 5);
}

/** What the best-scored teacher has of a score, for a line across its chart. */
function teacherOf(metric) {
  const { columns, rows } = data.scores;
  const c = columns.findIndex((column) => `score/${column.name}` === metric);
  const cells = c < 0 ? [] : rows.filter((row) => row.teacher && row.cells[c] && row.cells[c].mean !== null).map((row) => ({ row, mean: row.cells[c].mean }));
  if (!cells.length) return null;
  const sign = columns[c].better === "higher" ? -1 : 1;
  return cells.sort((a, b) => sign * (a.mean - b.mean))[0];
}

const BOX = { left: 50, right: 12, top: 10, bottom: 24, height: 216 };

function chart(metric) {
  const svg = s("svg", { tabindex: 0, role: "img" });
  const readout = h("div", { class: "readout", hidden: true, "aria-live": "polite" });
  const figure = h("figure", { "data-metric": metric }, h("figcaption", {}, breakable(metric)), svg, readout);
  let drawn = null;

  function draw() {
    const width = Math.max(200, svg.clientWidth);
    const log = view.scale === "log";
    const all = groups.filter((group) => group.visible).map((group) => series(group, metric)).filter((one) => one.lines.length);
    const usable = ([, y]) => y !== null && (!log || y > 0);
    const reference = teacherOf(metric);
    const seen = all.flatMap((one) => one.lines.flat()).filter(usable);
    svg.setAttribute("viewBox", `0 0 ${width} ${BOX.height}`);
    svg.replaceChildren();
    drawn = null;
    const summary = all.map((one) => `${one.group.letter} ends at ${figures(one.band.length ? one.band.at(-1)[1] : one.lines[0].at(-1)[1])}`);
    svg.setAttribute("aria-label", `${metric} against ${view.unit}. ${summary.join(", ")}. Arrow keys move the cursor.`);
    if (!seen.length) {
      const why = !all.length ? "no visible run reports this" : log ? "no positive value for a log scale" : "no finite value";
      svg.append(s("text", { x: width / 2, y: BOX.height / 2, "text-anchor": "middle" }, why));
      return;
    }
    const ys = seen.map(([, y]) => y).concat(reference && usable([0, reference.mean]) ? [reference.mean] : []);
    const range = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [left, right] = [0, Math.max(range(seen.map(([x]) => x))[1], 1e-9)];
    let [low, high] = range(ys);
    const f = log ? Math.log10 : (v) => v;
    let [bottom, top] = [f(low), f(high)];
    const pad = top > bottom ? (top - bottom) * 0.06 : log ? 0.2 : Math.abs(top) * 0.1 || 1;
    [bottom, top] = [bottom - pad, top + pad];
    const X = (x) => BOX.left + ((width - BOX.left - BOX.right) * (x - left)) / (right - left);
    const Y = (y) => BOX.height - BOX.bottom - ((BOX.height - BOX.top - BOX.bottom) * (f(y) - bottom)) / (top - bottom);
    const path = (line) => {
      let out = "", pen = false;
      for (const point of line) {
        if (!usable(point)) pen = false;
        else {
          out += `${pen ? "L" : "M"}${X(point[0]).toFixed(1)} ${Y(point[1]).toFixed(1)}`;
          pen = true;
        }
      }
      return out;
    };
    for (const y of log ? logTicks(10 ** bottom, 10 ** top) : ticks(bottom, top, 5))
      svg.append(s("line", { class: "tick", x1: BOX.left, x2: width - BOX.right, y1: Y(y), y2: Y(y) }),
        s("text", { x: BOX.left - 8, y: Y(y) + 4, "text-anchor": "end" }, brief(y)));
    const across = ticks(left, right, Math.max(3, Math.floor(width / 70)));
    across.forEach((x, i) => svg.append(s("text", { x: X(x), y: BOX.height - 7, "text-anchor": i ? "middle" : "start" },
      i === across.length - 1 ? `${brief(x)} ${view.unit === "hours" ? "h" : "images"}` : brief(x))));
    svg.append(s("line", { class: "axis", x1: BOX.left, x2: width - BOX.right, y1: BOX.height - BOX.bottom, y2: BOX.height - BOX.bottom }));
    if (reference && usable([0, reference.mean]))
      svg.append(s("line", { class: "reference", x1: BOX.left, x2: width - BOX.right, y1: Y(reference.mean), y2: Y(reference.mean) }),
        s("text", { x: BOX.left + 6, y: Y(reference.mean) - 5 }, `teacher, ${reference.row.calls} calls`));
    for (const { group, lines, band } of all) {
      const several = lines.length > 1 && band.length > 0;
      const ink = { stroke: group.colour, fill: "none", "stroke-dasharray": group.dash, "stroke-linejoin": "round" };
      const marks = s("g", { "data-group": group.index });
      const hull = band.filter((p) => usable(p) && usable([0, p[2]]));
      if (hull.length > 1 && several)
        marks.append(s("path", { fill: group.colour, opacity: 0.17,
          d: `${path(hull.map((p) => [p[0], p[3]]))}L${path(hull.map((p) => [p[0], p[2]]).reverse()).slice(1)}Z` }));
      // a seed alone, before and after the others: no mean to draw there
      const alone = several ? lines.flatMap((line) => [line.filter(([x]) => x <= band[0][0]), line.filter(([x]) => x >= band.at(-1)[0])]) : lines;
      for (const line of alone) marks.append(s("path", { ...ink, d: path(line), "stroke-width": several ? 1 : 1.8 }));
      if (several) marks.append(s("path", { ...ink, d: path(band), "stroke-width": 2 }));
      for (const line of lines.filter((line) => line.length < 16))
        for (const point of line.filter(usable))
          marks.append(s("circle", { cx: X(point[0]), cy: Y(point[1]), r: several ? 1.8 : 2.4, fill: group.colour }));
      svg.append(marks);
    }
    const stops = [...new Set(all.flatMap((one) => (one.band.length ? one.band : one.lines.flat()).map(([x]) => x)))].sort((a, b) => a - b);
    const cursor = s("g");
    svg.append(cursor);
    drawn = { all, X, Y, stops, cursor, usable, left, right, width };
    point();
  }

  /** The cursor line of every chart at `view.cursor`; the numbers in the one that has the focus or the pointer. */
  function point(active = false) {
    if (!drawn) return;
    const { all, X, Y, cursor, usable, right } = drawn;
    cursor.replaceChildren();
    readout.hidden = true;
    if (view.cursor === null || view.cursor > right) return;
    const x = X(view.cursor);
    cursor.append(s("line", { class: "cursor", x1: x, x2: x, y1: BOX.top, y2: BOX.height - BOX.bottom }));
    if (!active) return;
    const rows = all.map(({ group, band }) => {
      const near = band.reduce((best, p) => (best === null || Math.abs(p[0] - view.cursor) < Math.abs(best[0] - view.cursor) ? p : best), null);
      return near && { group, near };
    }).filter(Boolean).sort((a, b) => (b.near[1] ?? -Infinity) - (a.near[1] ?? -Infinity));
    for (const { group, near } of rows)
      if (usable(near)) cursor.append(s("circle", { cx: X(near[0]), cy: Y(near[1]), r: 3.5, fill: group.colour, stroke: "var(--paper)" }));
    const spread = (p, group) => (group.runs.length > 1 && p[1] !== null ? `${figures(p[2])} – ${figures(p[3])}` : "");
    readout.replaceChildren(
      h("div", { class: "quiet" }, view.unit === "hours" ? `${figures(view.cursor)} h` : count(Math.round(view.cursor), "image")),
      h("table", {}, rows.slice(0, 12).map(({ group, near }) => h("tr", {}, h("td", {}, chip(group)),
        h("td", { class: "num" }, h("data", { value: near[1] ?? "" }, figures(near[1]))), h("td", { class: "quiet" }, spread(near, group))))),
      rows.length > 12 ? h("div", { class: "quiet" }, `and ${rows.length - 12} more`) : "");
    readout.hidden = false;
    const wide = readout.offsetWidth;
    readout.style.top = `${svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + 8}px`;
    const from = figure.getBoundingClientRect().left - 8; // it may reach over a neighbour, not out of the window
    const fits = from + x + 12 + wide <= document.documentElement.clientWidth - 16;
    readout.style.left = `${fits ? x + 12 : Math.max(-from, x - 12 - wide)}px`;
  }

  const move = (x) => {
    view.cursor = x;
    for (const other of charts.values()) if (other.point !== point) other.point();
    point(x !== null);
  };
  svg.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const { left, right, width, stops } = drawn;
    const x = left + ((event.clientX - svg.getBoundingClientRect().left - BOX.left) / (width - BOX.left - BOX.right)) * (right - left);
    move(stops.reduce((best, stop) => (Math.abs(stop - x) < Math.abs(best - x) ? stop : best), stops[0]));
  });
  svg.addEventListener("pointerleave", () => move(null));
  svg.addEventListener("blur", () => move(null));
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !drawn) return;
    event.preventDefault();
    const { stops } = drawn;
    const here = view.cursor === null ? (way > 0 ? -1 : stops.length) : stops.indexOf(view.cursor);
    move(stops[Math.max(0, Math.min(stops.length - 1, here + way))]);
  });
  const resized = new ResizeObserver(draw);
  resized.observe(svg);
  return { figure, draw, point, close: () => resized.disconnect() };
}

function curves() {
  if (!data.metrics.length) {
    $("curves").append(h("h2", { id: "curves-title" }, "Curves"), h("p", { class: "note" }, "No run has reported a metric."));
    return;
  }
  const box = h("div", { class: "charts" });
  const chosen = new Set(data.shown);
  const redraw = () => { view.cursor = null; for (const one of charts.values()) one.draw(); };
  const show = () => {
    for (const [metric, one] of charts) if (!chosen.has(metric)) { one.close(); one.figure.remove(); charts.delete(metric); }
    for (const metric of data.metrics.filter((name) => chosen.has(name))) {
      if (!charts.has(metric)) charts.set(metric, chart(metric));
      box.append(charts.get(metric).figure);
    }
  };
  const alone = (index) => {
    for (const marks of box.querySelectorAll("g[data-group]"))
      marks.style.opacity = index === null || marks.dataset.group === `${index}` ? "" : 0.12;
  };
  const legend = h("div", { class: "legend", role: "group", "aria-label": "shown settings" }, groups.map((group) =>
    h("button", { type: "button", "aria-pressed": "true", onpointerenter: () => alone(group.index), onpointerleave: () => alone(null), onclick: (event) => {
      group.visible = !group.visible;
      event.currentTarget.setAttribute("aria-pressed", group.visible);
      redraw();
    } }, chip(group), h("span", {}, described(group)))));
  const sets = Map.groupBy(data.metrics, (name) => (name.includes("/") ? name.split("/")[0] : "run"));
  const timeless = data.runs.filter((run) => run.axes.length && run.axes.every((axis) => axis.images.every((x) => x === null || x === 0)));
  $("curves").append(
    h("div", { class: "bar" }, h("h2", { id: "curves-title" }, "Curves"),
      choice("against", [["images", "images"], ["hours", "hours"]], view.unit, (unit) => { view.unit = unit; redraw(); }),
      choice("scale", [["linear", "linear"], ["log", "log"]], view.scale, (scale) => { view.scale = scale; redraw(); })),
    legend,
    h("details", {}, h("summary", {}, `Choose metrics (${data.metrics.length})`),
      h("div", { class: "picker" }, [...sets].map(([name, metrics]) => h("fieldset", {}, h("legend", {}, name), metrics.map((metric) =>
        h("label", {}, h("input", { type: "checkbox", value: metric, checked: chosen.has(metric), onchange: (event) => {
          chosen[event.currentTarget.checked ? "add" : "delete"](metric);
          show();
        } }), h("span", {}, breakable(metric.includes("/") ? metric.slice(name.length + 1) : metric)))))))),
    box,
    h("p", { class: "note" },
      "Several seeds: a band from the least to the greatest, and their mean. Hours are hours of training, without scoring and interruptions. ",
      `A curve has at most ${data.curve_points.toLocaleString("en")} of its run's reports.`,
      timeless.length ? ` Not drawn, because they report no images_per_s: ${timeless.map((run) => run.name).join(", ")}.` : ""),
  );
  show();
}

// ---------------------------------------------------------------------------------------------------- samples

function samples() {
  const section = $("samples");
  const title = h("h2", { id: "samples-title" }, "Samples");
  const drawn = data.runs.filter((run) => run.grids.length);
  if (!drawn.length) return section.append(h("div", { class: "bar" }, title), h("p", { class: "note" }, "No run has drawn sample grids."));
  const steps = [...new Set(drawn.flatMap((run) => run.grids.map(([step]) => step)))].sort((a, b) => a - b);
  const seeds = [...new Set(drawn.map((run) => run.seed))];
  const held = (seed) => drawn.filter((run) => run.seed === seed).length;
  let seed = seeds.reduce((best, one) => (held(one) > held(best) ? one : best));
  const box = h("div", { class: "grids" });
  const output = h("output", { for: "step" });
  const slider = h("input", { type: "range", id: "step", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, list: "steps", oninput: () => move() });
  const source = (index) => `data:image/png;base64,${data.pictures[index]}`;
  let figures = [];

  function lay() {
    const shown = groups.flatMap((group) => group.runs).filter((run) => run.seed === seed);
    const teachers = new Map(); // the same picture once, with all it belongs to
    for (const run of shown) if (run.teacher !== null) teachers.set(run.teacher, [...(teachers.get(run.teacher) || []), run]);
    const figure = (caption, alt) => {
      const image = h("img", { alt, decoding: "sync" });
      const none = h("div", { class: "none", hidden: true });
      const step = h("span", { class: "small quiet" });
      return { image, none, step, node: h("figure", {}, h("figcaption", {}, caption, step), image, none) };
    };
    const teacher = [...teachers].map(([index, runs]) => {
      const of = teachers.size > 1 ? [...new Set(runs.map((run) => groups[run.group].letter))].join(", ") : "";
      const one = figure(h("b", {}, of ? `Teacher of ${of}` : "Teacher"), `samples of the teacher, seed ${seed}`);
      one.image.src = source(index);
      one.step.append("the same noise and labels");
      return one;
    });
    figures = shown.map((run) => {
      const twin = shown.filter((other) => other.group === run.group).length > 1;
      return { run, ...figure([label(groups[run.group]), twin ? h("span", { class: "small" }, run.name) : ""], "") };
    });
    for (const one of figures) one.node.dataset.run = one.run.id;
    box.replaceChildren(...teacher.map((one) => one.node), ...figures.map((one) => one.node));
    move();
  }

  function move() {
    const wanted = steps[slider.value];
    output.textContent = wanted.toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${wanted}`);
    for (const { run, image, none, step } of figures) {
      const found = run.grids.findLast(([own]) => own <= wanted);
      image.hidden = !found;
      none.hidden = !!found;
      step.className = "small quiet";
      if (!found) {
        none.textContent = run.grids.length ? `nothing drawn before step ${run.grids[0][0].toLocaleString("en")}` : "this run drew no grid";
        step.textContent = "–";
        continue;
      }
      const [own, index] = found;
      if (image.dataset.index !== `${index}`) { image.src = source(index); image.dataset.index = index; }
      image.alt = `samples of ${describe(run)}, step ${own}`;
      if (own === wanted) step.textContent = `step ${own.toLocaleString("en")}${images(run, own)}`;
      else {
        step.className = "small warn";
        step.textContent = `step ${own.toLocaleString("en")}${images(run, own)}; none drawn at ${wanted.toLocaleString("en")}`;
      }
    }
  }
  const images = (run, step) => {
    for (const axis of run.axes) {
      const i = axis.steps.indexOf(step);
      if (i >= 0 && axis.images[i] !== null) return `, ${axis.images[i].toLocaleString("en")} images`;
    }
    return "";
  };

  section.append(
    h("div", { class: "bar sticky" }, title,
      seeds.length > 1 ? choice("seed", seeds.map((one) => [one, one === "" ? "none" : one]), seed, (one) => { seed = one; lay(); }) : "",
      h("span", { class: "slider" }, h("label", { for: "step", class: "quiet" }, "step"), slider, output),
      h("datalist", { id: "steps" }, steps.map((_, i) => h("option", { value: i })))),
    box,
  );
  lay();
}

head();
runs();
scores();
curves();
samples();
