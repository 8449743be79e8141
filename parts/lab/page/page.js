"use strict";
// Polls the server and draws. Every text goes through textContent: what a log or a name holds is shown, never read as markup.

const POLL = 2000; // milliseconds
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#7B61FF"];
const CHARTS = [["train_loss", "training loss"], ["val_bpb", "val_bpb"], ["lr", "learning rate"], ["tokens_per_second", "tokens/s"]];
const COLUMNS = [
  ["", (run) => run.swatch],
  ["run", (run) => run.id],
  ["state", (run) => run.stage || run.state],
  ["progress", (run) => (run.state === "done" ? null : run.progress)],
  ["to go", (run) => run.to_go, duration],
  ["step", (run) => run.step, whole],
  ["loss", (run) => run.train_loss, fixed(3)],
  ["val_bpb", (run) => run.val_bpb, fixed(4)],
  ["tokens/s", (run) => run.tokens_per_second, si],
  ["GiB", (run) => run.memory_gib, fixed(1)],
  ["bytes", (run) => run.bytes, whole],
  ["audit", (run) => run.audit],
  ["preset", (run) => run.preset],
];
const NUMBERS = new Set(["to go", "step", "loss", "val_bpb", "tokens/s", "GiB", "bytes"]);

let runs = [];
let chosen = null; // ids in the order of choosing; null: nobody has chosen yet
let focus = null; // whose details are shown
let order = { column: null, down: false };
const details = new Map();
const $ = (id) => document.getElementById(id);

function fixed(digits) { return (value) => value.toFixed(digits); }
function whole(value) { return Math.round(value).toLocaleString("en"); }
function si(value) { return value >= 1e6 ? (value / 1e6).toFixed(2) + "M" : value >= 1e3 ? (value / 1e3).toFixed(0) + "K" : value.toFixed(0); }
function duration(value) { return value < 90 ? Math.round(value) + " s" : value < 5400 ? Math.round(value / 60) + " min" : (value / 3600).toFixed(1) + " h"; }
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}
function swatch(id) {
  const made = element("span", { class: "swatch", title: id });
  made.style.background = colour(id);
  return made;
}
function colour(id) { return COLOURS[chosen.indexOf(id) % COLOURS.length]; }

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status);
  return answer.json();
}

async function poll() {
  try {
    const overview = await get("api/runs");
    runs = overview.runs;
    $("root").textContent = overview.root;
    document.title = overview.root;
    const known = new Set(runs.map((run) => run.id));
    if (chosen === null && runs.length) {
      const rank = (run) => (run.state === "running" ? 0 : run.step !== null ? 1 : 2); // what has curves first
      chosen = [0, 1, 2].flatMap((wanted) => runs.filter((run) => rank(run) === wanted)).slice(0, 4).map((run) => run.id);
      focus = chosen[0];
    }
    chosen = (chosen || []).filter((id) => known.has(id));
    if (!known.has(focus)) focus = chosen[0] || null;
    const wanted = [...new Set([...chosen, focus].filter(Boolean))];
    const states = new Map(runs.map((run) => [run.id, JSON.stringify(run)]));
    await Promise.all(wanted.map(async (id) => {
      const old = details.get(id);
      if (!old || old.line !== states.get(id) || old.run.state === "running") {
        details.set(id, { line: states.get(id), run: await get("api/run?id=" + encodeURIComponent(id)) });
      }
    }));
    $("link").textContent = "";
    $("link").className = "";
    draw();
  } catch (error) {
    $("link").textContent = "the server does not answer; trying again";
    $("link").className = "lost";
  }
  setTimeout(poll, POLL);
}

function draw() {
  drawTable();
  drawCharts();
  drawDetails();
}

function choose(id, more) {
  if (more) chosen = chosen.includes(id) ? chosen.filter((other) => other !== id) : [...chosen, id];
  else if (focus === id && chosen.includes(id)) chosen = chosen.filter((other) => other !== id);
  else if (!chosen.includes(id)) chosen = [...chosen, id];
  focus = id;
  drawTable();
  refresh();
}

async function refresh() {
  if (focus && !details.has(focus)) {
    try { details.set(focus, { line: "", run: await get("api/run?id=" + encodeURIComponent(focus)) }); } catch (error) { return; }
  }
  draw();
}

function drawTable() {
  const filter = $("filter").value;
  const shown = runs.filter((run) => !filter || run.state === filter);
  if (order.column !== null) {
    const value = COLUMNS[order.column][1];
    shown.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || x === undefined || y === null || y === undefined) return (y ?? null) === null ? ((x ?? null) === null ? 0 : -1) : 1;
      return (x < y ? -1 : x > y ? 1 : 0) * (order.down ? -1 : 1);
    });
  }
  const counts = {};
  for (const run of runs) counts[run.state] = (counts[run.state] || 0) + 1;
  $("count").textContent = Object.entries(counts).map(([state, count]) => `${count} ${state}`).join(", ") || "no runs yet";
  const head = element("tr", {});
  COLUMNS.forEach(([name], index) => {
    const cell = element("th", NUMBERS.has(name) ? { class: "number" } : {}, name + (order.column === index ? (order.down ? " ↓" : " ↑") : ""));
    cell.addEventListener("click", () => { order = { column: index, down: order.column === index && !order.down }; drawTable(); });
    head.append(cell);
  });
  const body = document.createDocumentFragment();
  for (const run of shown) {
    const row = element("tr", { tabindex: "0", class: run.id === focus ? "chosen" : "" });
    for (const [name, value, show] of COLUMNS) {
      const cell = element("td", NUMBERS.has(name) ? { class: "number" } : {});
      const content = value(run);
      if (name === "" && chosen && chosen.includes(run.id)) {
        cell.append(swatch(run.id));
      } else if (name === "state") {
        cell.className = "state-" + run.state;
        cell.textContent = content;
      } else if (name === "progress" && content !== null && content !== undefined) {
        cell.append(element("progress", { max: "1", value: String(content) }), ` ${Math.round(100 * content)} %`);
      } else if (content !== null && content !== undefined) {
        cell.textContent = show ? show(content) : content;
        if (name === "run") cell.title = content;
      }
      row.append(cell);
    }
    if (run.error) row.lastChild.append(element("span", { class: "fault" }, " " + run.error));
    row.addEventListener("click", (event) => choose(run.id, event.ctrlKey || event.metaKey));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(run.id, event.ctrlKey); });
    body.append(row);
  }
  const table = $("runs").firstElementChild;
  const held = document.activeElement && table.contains(document.activeElement) ? [...table.tBodies[0].rows].indexOf(document.activeElement) : -1;
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(body);
  if (held >= 0 && table.tBodies[0].rows[held]) table.tBodies[0].rows[held].focus();
}

// --- charts

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}
function label(value) { return Math.abs(value) >= 1e4 ? si(value) : String(Number(value.toPrecision(4))); }

function drawCharts() {
  const axis = $("axis").value;
  const names = (chosen || []).map((id) => element("span", {}, swatch(id), " " + id));
  const figures = CHARTS.map(([key, title]) => {
    const series = (chosen || []).map((id) => ({ id, points: details.get(id)?.run.curves[key][axis] || [] })).filter((line) => line.points.length);
    return series.length ? chart(title, axis, series, key) : null;
  });
  $("names").replaceChildren(...names);
  $("charts").replaceChildren(...figures.filter(Boolean));
}

function chart(title, axis, series, key) {
  const [width, height, left, right, top, bottom] = [520, 230, 46, 14, 8, 24];
  const all = series.flatMap((line) => line.points);
  const xs = all.map((point) => point[0]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (x0 === x1) [x0, x1] = [0, 2 * x1 || 1];
  // The first fall of a loss, or the first steps' speed, would take all of the height: the scale begins where a twentieth of the longest line is done.
  const tail = all.filter((point) => !["train_loss", "tokens_per_second"].includes(key) || point[0] >= x0 + (x1 - x0) / 20).map((point) => point[1]);
  let [y0, y1] = [Math.min(...tail), Math.max(...tail)];
  if (y0 === y1) [y0, y1] = [y0 - Math.abs(y0 || 1) / 20, y1 + Math.abs(y1 || 1) / 20];
  [x0, x1, y0, y1] = [x0 - (x1 - x0) / 50, x1 + (x1 - x0) / 50, y0 - (y1 - y0) / 25, y1 + (y1 - y0) / 25]; // marks stand clear of the edges
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const clip = "clip-" + key;
  const box = shape("clipPath", { id: clip });
  box.append(shape("rect", { x: left, y: top - 4, width: width - left - right + 4, height: height - top - bottom + 8 }));
  svg.append(box);
  for (const at of ticks(y0, y1, 5)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }));
    svg.append(text(left - 5, y(at) + 3, label(at), "end"));
  }
  for (const at of ticks(x0, x1, 6)) svg.append(text(x(at), height - bottom + 14, label(at), "middle"));
  for (const line of series) {
    const points = line.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`);
    const group = shape("g", { "clip-path": `url(#${clip})` });
    if (points.length > 1) group.append(shape("polyline", { points: points.join(" "), stroke: colour(line.id) }));
    const [cx, cy] = points[points.length - 1].split(",");
    group.append(shape("circle", { cx, cy, r: 2.5, fill: colour(line.id) }));
    svg.append(group);
  }
  const values = element("span", { class: "values" });
  const at = shape("line", { class: "at", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(at);
  svg.addEventListener("mousemove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const value = x0 + (((event.clientX - bounds.left) / bounds.width) * width - left) / (width - left - right) * (x1 - x0);
    at.setAttribute("x1", x(value));
    at.setAttribute("x2", x(value));
    at.setAttribute("visibility", value >= x0 && value <= x1 ? "visible" : "hidden");
    values.replaceChildren(label(value) + ": ", ...series.map((line) => {
      const near = line.points.reduce((best, point) => (Math.abs(point[0] - value) < Math.abs(best[0] - value) ? point : best));
      const shown = element("span", {}, label(near[1]) + " ");
      shown.style.color = colour(line.id);
      return shown;
    }));
  });
  svg.addEventListener("mouseleave", () => { at.setAttribute("visibility", "hidden"); values.replaceChildren(); });
  return element("figure", {}, element("figcaption", {}, `${title} over ${axis}`, values), svg);
}
function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
function text(x, y, content, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}

// --- the chosen run

function drawDetails() {
  const place = $("details");
  const run = details.get(focus)?.run;
  if (!run) return place.replaceChildren();
  const old = place.querySelector("pre");
  const following = !old || old.scrollTop + old.clientHeight >= old.scrollHeight - 4 || place.dataset.id !== focus;
  const [leftSide, rightSide] = [element("div", {}), element("div", {})];
  if (run.error) leftSide.append(element("p", { class: "fault" }, run.error));
  if (run.log) leftSide.append(element("h2", {}, run.log.name), element("pre", {}, run.log.lines.join("\n")));
  if (run.audit) {
    rightSide.append(element("h2", {}, `audit: ${run.audit.verdict}`), rows((run.audit.checks || []).map((check) => [check.name, check.verdict, check.figure])));
  }
  rightSide.append(element("h2", {}, "set for this run"), rows(Object.entries(run.changed).map(([name, value]) => [name.toUpperCase(), shown(value)])));
  const compared = chosen.filter((id) => details.get(id) && Object.keys(details.get(id).run.settings).length);
  const differing = compared.length > 1 ? Object.keys(details.get(compared[0]).run.settings).filter((name) =>
    new Set(compared.map((id) => shown(details.get(id).run.settings[name]))).size > 1) : [];
  if (differing.length) {
    const head = ["", ...compared.map(swatch)];
    rightSide.append(element("h2", {}, "settings in which the chosen runs differ"),
      rows([head, ...differing.map((name) => [name.toUpperCase(), ...compared.map((id) => shown(details.get(id).run.settings[name]))])]));
  }
  place.dataset.id = focus;
  place.replaceChildren(element("h2", {}, run.id), element("div", { class: "columns" }, leftSide, rightSide));
  const pre = place.querySelector("pre");
  if (pre) pre.scrollTop = following ? pre.scrollHeight : old.scrollTop;
}
function shown(value) { return value === undefined ? "" : value === true ? "1" : value === false ? "0" : value === "" ? "none" : String(value); }
function rows(list) {
  if (!list.length) return element("p", {}, "nothing");
  return element("table", {}, ...list.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell ?? "")))));
}

$("filter").addEventListener("change", drawTable);
$("axis").addEventListener("change", drawCharts);
poll();
