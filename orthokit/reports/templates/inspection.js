"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const esc = text => String(text).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const safe = text => esc(text).replaceAll("&quot;", '"'); // for Plotly, which knows no entity for quotes
const short = name => name.replace(/\.weight$/, "");
const COLUMN = Object.fromEntries(D.columns.map(c => [c.name, c]));
const state = { model: 0, sort: null, down: false, groups: new Set(D.groups), picked: D.chosen.slice() };
const model = () => D.models[state.model];
const rowOf = D.models.map(m => new Map(m.cells.name.map((name, i) => [name, i])));

// --- the table -------------------------------------------------------------------------------------------------
const shown = () => D.columns.filter(c => c.always || state.groups.has(c.group));
const why = (m, c, i) => m.reasons[typeof m.why[c.name] === "number" ? m.why[c.name] : m.why[c.name][i]];
const digits = v => (v === null ? null : String(Number(v.toPrecision(4))));
const textOf = (m, c, i) => (c.number ? m.texts[c.name][i] ?? digits(m.cells[c.name][i]) : m.cells[c.name][i]);

function head() {
  $("rows").tHead.innerHTML = "<tr>" + shown().map(c =>
    `<th scope="col" data-column="${c.name}" aria-sort="none"${c.number ? ' class="n"' : ""}>` +
    `<button type="button" title="${esc(c.meaning)}">${esc(c.label)}</button></th>`).join("") + "</tr>";
  marked();
}
function marked() {
  for (const th of $("rows").tHead.querySelectorAll("th"))
    th.setAttribute("aria-sort", th.dataset.column !== state.sort ? "none" : state.down ? "descending" : "ascending");
}
function kept(m) {
  const terms = $("filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const tests = terms.map(term => {
    const bound = /^(\w+)(<=|>=|<|>|=)(-?\d[\d.e+-]*)$/.exec(term);
    if (bound && COLUMN[bound[1]] && COLUMN[bound[1]].number) {
      const values = m.cells[bound[1]], to = Number(bound[3]);
      const holds = { "<": v => v < to, ">": v => v > to, "<=": v => v <= to, ">=": v => v >= to, "=": v => v === to }[bound[2]];
      return i => values[i] !== null && holds(values[i]);
    }
    const words = D.columns.filter(c => !c.number);
    return i => words.some(c => String(m.cells[c.name][i] ?? "").toLowerCase().includes(term));
  });
  const rows = m.cells.name.map((_, i) => i).filter(i => tests.every(test => test(i)));
  if (!state.sort || !COLUMN[state.sort]) return rows;
  const values = m.cells[state.sort], sign = state.down ? -1 : 1;
  const order = typeof values.find(v => v !== null) === "string"
    ? (a, b) => a.localeCompare(b, "en", { numeric: true }) : (a, b) => a - b;
  return rows.sort((a, b) => values[a] === null || values[b] === null
    ? (values[a] === null) - (values[b] === null) : sign * order(values[a], values[b]));
}
function cell(m, c, i) {
  const text = textOf(m, c, i);
  if (c.name === "name") return `<th scope="row"><label title="${esc(text)}"><input type="checkbox" data-pick="${esc(text)}"` +
    `${state.picked.includes(text) ? " checked" : ""}><span>${esc(short(text)).replace(/[._]/g, "$&<wbr>")}</span></label></th>`;
  if (text === null) {
    const reason = c.name === "alpha_refused" ? "an exponent is given" : why(m, c, i);
    return `<td class="${c.number ? "n" : ""}"><span class="none" title="${esc(reason)}" aria-label="no value: ${esc(reason)}">-</span></td>`;
  }
  return `<td class="${c.number ? "n" : text.length > 40 ? "long" : ""}">${esc(text)}</td>`;
}
function body() {
  const m = model(), columns = shown(), rows = kept(m);
  $("rows").tBodies[0].innerHTML = rows.map(i => `<tr${state.picked.includes(m.cells.name[i]) ? ' class="on"' : ""}>` +
    columns.map(c => cell(m, c, i)).join("") + "</tr>").join("");
  const sorted = state.sort && COLUMN[state.sort] ? `, sorted by ${COLUMN[state.sort].words}, ${state.down ? "falling" : "rising"}` : "";
  $("status").textContent = `${rows.length} of ${m.cells.name.length} matrices${sorted}.`;
}
function csv() {
  const m = model(), quote = v => (/[",\n\r]/.test(v) ? `"${v.replace(/"/g, '""')}"` : v);
  const lines = kept(m).map(i => D.columns.map(c => quote(String(m.cells[c.name][i] ?? textOf(m, c, i) ?? ""))).join(","));
  $("csv").href = "data:text/csv;charset=utf-8," + encodeURIComponent([D.columns.map(c => c.name).join(",")].concat(lines).join("\r\n"));
  $("csv").download = m.name.replace(/[^\w.-]+/g, "_") + ".csv";
}

// --- charts ----------------------------------------------------------------------------------------------------
function merged(old, patch) {
  const made = Array.isArray(old) ? old.slice() : Object.assign({}, old);
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete made[key];
    else if (typeof value === "object" && !Array.isArray(value) && typeof made[key] === "object") made[key] = merged(made[key], value);
    else made[key] = value;
  }
  return made;
}
const figureOf = (chart, column) => structuredClone(merged(chart.figure, chart.patches[column]));
function draw(name, figure) {
  const layout = figure.layout, plot = $(name + "-plot"), title = layout.title.text, room = 24 * title.split("<br>").length;
  $(name + "-title").textContent = title.replace(/<br>/g, " ").replace(/<[^>]*>/g, "");
  $(name + "-caption").textContent = layout.meta.caption;
  delete layout.title;
  layout.margin.t -= room; layout.height -= room;
  plot.style.height = layout.height + "px";
  Plotly.react(plot, figure.data, layout, { displaylogo: false, responsive: true });
}
function drawMap() {
  const m = model(), chart = D.charts.map[state.model], column = $("map-column").value, figure = figureOf(chart, column);
  const { roles, layers, cells } = m.map, values = m.cells[column], floor = chart.floors[column], c = COLUMN[column];
  const z = v => (v === null || floor === null ? v : v > 0 ? Math.log10(v) : floor);
  const said = i => safe(m.cells.name[i]) + "<br>" + safe(m.cells.shape[i]) + "<br>" + safe(c.words) +
    (textOf(m, c, i) === null ? ": " + safe(why(m, c, i)) : " " + safe(textOf(m, c, i)));
  const grid = f => cells.map(row => row.map(i => f(i)));
  const places = cells.flatMap((row, y) => row.map((i, x) => [x, y, i])).filter(p => p[2] !== null && values[p[2]] === null);
  Object.assign(figure.data[0], { x: layers, y: roles, z: grid(i => (i === null ? null : z(values[i]))),
    text: grid(i => (i === null ? "no such matrix" : said(i))) });
  Object.assign(figure.data[1], { x: places.map(p => layers[p[0]]), y: places.map(p => roles[p[1]]) });
  draw("map", figure);
}
function drawDepth() {
  if (!$("depth-plot")) return;
  const column = $("depth-column").value, c = COLUMN[column], figure = figureOf(D.charts.depth, column), m = D.models[0];
  for (const trace of figure.data.filter(t => t.customdata)) // of one model: each point is a matrix
    trace.text = trace.customdata.map(name => safe(name + ": " + (textOf(m, c, rowOf[0].get(name)) ?? "-")));
  draw("depth", figure);
}
function drawCompare() {
  if (!$("compare-plot")) return;
  const column = $("compare-column").value, c = COLUMN[column], figure = figureOf(D.charts.compare, column);
  const value = (k, name) => (rowOf[k].has(name) ? D.models[k].cells[column][rowOf[k].get(name)] : null);
  const names = [...new Set(D.models.flatMap(m => m.cells.name))];
  const key = new Map(names.map(name => [name, value(0, name) === null ? Infinity : -value(0, name)]));
  names.sort((a, b) => (key.get(a) === key.get(b) ? 0 : key.get(a) - key.get(b)));
  D.models.forEach((m, k) => Object.assign(figure.data[k], { x: names.map((_, i) => i + 1), y: names.map(name => value(k, name)),
    text: names.map(name => safe(name + ": " + (rowOf[k].has(name) ? textOf(m, c, rowOf[k].get(name)) ?? "-" : "-"))) }));
  const axis = figure.layout.xaxis;
  if (axis.showticklabels !== false) Object.assign(axis, { tickvals: names.map((_, i) => i + 1), ticktext: names.map(n => safe(short(n))) });
  draw("compare", figure);
}

// Spectra and profiles lie packed: 16 bits a value between two ends, one matrix after the other.
function unpacker(packed, parts, placesOf) {
  if (!packed) return () => null;
  const codes = new Uint16Array(Uint8Array.from(atob(packed.codes), c => c.charCodeAt(0)).buffer), starts = [];
  let at = 0, end = 0;
  for (const k of packed.k) { starts.push([at, end]); if (k) { at += parts * placesOf(k).length; end += parts; } }
  return (row, part = 0) => {
    const k = packed.k[row];
    if (!k) return null;
    const count = placesOf(k).length, from = starts[row][0] + part * count, [low, high] = packed.ends[starts[row][1] + part];
    return Array.from(codes.subarray(from, from + count), c => (c ? low + (high - low) * (c - 1) / 65534 : null));
  };
}
const unpacked = D.models.map(m => ({
  now: unpacker(m.spectra, 1, k => D.places[k]), before: unpacker(m.base_spectra, 1, k => D.places[k]),
  along: unpacker(m.profiles, 2, k => m.profiles.places[k]) }));
const power = log => (log === null ? 0 : 10 ** log);
function chosen() {
  const lines = [];
  state.picked.forEach((name, n) => D.models.forEach((m, k) => {
    if (rowOf[k].has(name)) lines.push({ m, k, n, row: rowOf[k].get(name), label: short(name) + (D.models.length > 1 ? ", " + m.name : "") });
  }));
  return lines;
}
function axisOf(title, log, values) {
  if (!log) return { title: { text: title }, automargin: true, type: "linear", rangemode: "tozero" };
  const positive = values.filter(v => v > 0), span = Math.log10(Math.max(...positive) / Math.min(...positive));
  return { title: { text: title }, automargin: true, type: "log", exponentformat: "power", dtick: span > 2.4 ? Math.ceil(span / 8) : "D2" };
}
function drawSpectra() {
  if (!$("spectra-plot")) return;
  const logX = $("log-x").checked, logY = $("log-y").checked, share = $("share").checked, unit = $("unit").value;
  const data = [], said = [], every = chosen().filter(l => unpacked[l.k].now(l.row)), lines = every.filter(l => l.n < D.most);
  lines.forEach(({ m, k, n, row, label }, index) => {
    const values = unpacked[k].now(row).map(power), K = m.spectra.k[row], name = safe(label);
    const by = unit === "first" ? m.cells.spectral_norm[row] : unit === "frobenius" ? m.cells.frobenius[row] : 1;
    const add = (y, K, dash, width, legend, of) => data.push({ type: "scatter", mode: "lines", name: legend, legendgroup: name + index,
      showlegend: legend === name, x: D.places[K].map(i => (share ? (i + 0.5) / K : i + 1)), customdata: D.places[K].map(i => i + 1),
      y: y.map(v => (logY && !(v > 0) ? null : v / (by || 1))), line: { color: D.styles[n][0], dash, width },
      hovertemplate: legend + "<br>k = %{customdata}: %{y:.4g}<extra></extra>" });
    add(values, K, ["solid", "dashdot", "longdashdot", "longdash"][k], 2, name);
    const before = $("base") && $("base").checked && unpacked[k].before(row);
    if (before) add(before.map(power), m.base_spectra.k[row], "dot", 1.5, name + ", base");
    const edge = m.cells.mp_edge && m.cells.mp_edge[row];
    if ($("edge").checked && edge) data.push({ type: "scatter", mode: "lines", legendgroup: name + index, showlegend: false, name: name + ", noise edge",
      x: share ? [0.5 / K, 1] : [1, K], y: [edge / (by || 1), edge / (by || 1)], hoverinfo: "name",
      line: { color: D.styles[n][0], dash: "dash", width: 1 } });
    const above = COLUMN.above_edge && textOf(m, COLUMN.above_edge, row);
    said.push(`${label}: σ₁ ${textOf(m, COLUMN.spectral_norm, row)}` + (above ? `, ${above} of ${K} above the noise edge` : ""));
  });
  const rest = state.picked.length - D.most, layout = structuredClone(D.charts.spectra);
  layout.meta.caption = (said.length ? said.join("; ") + "." : "Tick a matrix in the table, or add one above.") +
    (rest > 0 ? ` ${rest} more are ticked than the ${D.most} that can be told apart.` : "");
  Object.assign(layout, { xaxis: axisOf(share ? "share of the singular values (k − ½) / K" : "index k", logX, data.flatMap(t => t.x)), showlegend: true,
    yaxis: axisOf("singular value σ<sub>k</sub>" + { "": "", first: " / σ<sub>1</sub>", frobenius: " / ‖W‖<sub>F</sub>" }[unit], logY, data.flatMap(t => t.y)) });
  draw("spectra", { data, layout });
}
function drawProfiles() {
  if (!$("profiles-plot")) return;
  const data = [], said = [], layout = structuredClone(D.charts.profiles);
  const lines = chosen().filter(l => unpacked[l.k].along(l.row) && l.n < D.most);
  lines.forEach(({ m, k, n, row, label }, index) => [0, 1].forEach(part => {
    const y = unpacked[k].along(row, part), x = m.profiles.places[m.profiles.k[row]].map(i => i + 1), name = safe(label);
    data.push({ type: "scatter", mode: "lines", x, y, name, legendgroup: name, showlegend: part === 0, xaxis: part ? "x2" : "x", yaxis: part ? "y2" : "y",
      line: { color: D.styles[n][0], dash: D.styles[D.models.length > 1 ? k : n][1], width: 1.8 }, hovertemplate: name + "<br>direction %{x}: %{y:.3g}<extra></extra>" });
    if (!part) said.push(`${label} ${m.profiles.peaks[row][1]} at direction ${m.profiles.peaks[row][0]}`);
  }));
  layout.meta.caption = said.length ? `Largest retention drift: ${said.join(", ")}.` : "None of the chosen matrices was compared with a base.";
  layout.title.text = "Which directions moved?";
  layout.showlegend = true;
  for (const axis of [layout.xaxis, layout.xaxis2]) { delete axis.range; axis.type = "log"; axis.exponentformat = "power"; axis.dtick = 1; }
  draw("profiles", { data, layout });
}

// --- controls --------------------------------------------------------------------------------------------------
function picks() {
  if (!$("chips")) return;
  $("chips").innerHTML = state.picked.map(name =>
    `<li><button type="button" data-drop="${esc(name)}" aria-label="Remove ${esc(name)}">${esc(short(name))} ×</button></li>`).join("");
  const names = [...new Set(D.models.flatMap(m => m.cells.name))].filter(name => !state.picked.includes(name));
  $("add").innerHTML = `<option value="">choose …</option>` + names.map(n => `<option value="${esc(n)}">${esc(short(n))}</option>`).join("");
}
function pick(name, on) {
  state.picked = state.picked.filter(n => n !== name).concat(on ? [name] : []);
  for (const box of document.querySelectorAll("[data-pick]")) {
    box.checked = state.picked.includes(box.dataset.pick);
    box.closest("tr").classList.toggle("on", box.checked);
  }
  picks(); drawSpectra(); drawProfiles();
}
function drawAll() { drawMap(); drawSpectra(); drawProfiles(); drawDepth(); drawCompare(); }
function start() {
  for (const select of document.querySelectorAll("[data-columns]")) {
    const chart = select.id === "map-column" ? D.charts.map[0] : D.charts[select.id.replace("-column", "")];
    select.innerHTML = Object.keys(chart.patches).map(n => `<option value="${n}">${esc(COLUMN[n].words)}</option>`).join("");
    select.value = D.opening[select.id === "map-column" ? 0 : 1];
    select.addEventListener("change", { "map-column": drawMap, "depth-column": drawDepth, "compare-column": drawCompare }[select.id]);
  }
  if ($("model")) $("model").addEventListener("change", event => { state.model = Number(event.target.value); named(); body(); drawMap(); });
  $("filter").addEventListener("input", body);
  ["focus", "pointerenter", "click"].forEach(kind => $("csv").addEventListener(kind, csv));
  for (const box of document.querySelectorAll("[name=group]")) box.addEventListener("change", () => {
    state.groups[box.checked ? "add" : "delete"](box.value); head(); body();
  });
  $("rows").addEventListener("click", event => {
    const th = event.target.closest("thead th");
    if (!th) return;
    const name = th.dataset.column;
    state.down = state.sort === name ? !state.down : COLUMN[name].number;
    state.sort = name; marked(); body();
  });
  $("rows").addEventListener("change", event => { if (event.target.dataset.pick) pick(event.target.dataset.pick, event.target.checked); });
  if ($("chips")) {
    $("chips").addEventListener("click", event => { const b = event.target.closest("[data-drop]"); if (b) pick(b.dataset.drop, false); });
    $("add").addEventListener("change", event => { if (event.target.value) pick(event.target.value, true); });
    for (const id of ["unit", "log-x", "log-y", "share", "edge", "base"]) if ($(id)) $(id).addEventListener("change", drawSpectra);
  }
  const sized = width => { for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, { width, autosize: width === null }); };
  window.addEventListener("beforeprint", () => sized(960));
  window.addEventListener("afterprint", () => sized(null));
  named(); head(); body(); picks();
}
function named() { for (const span of document.querySelectorAll(".model-name")) span.textContent = model().name; }
start();
