"use strict";
// Draws the report from the data that stands in the page; src/report/page.py says what is in it.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const PAGE_SIZE = 25;

// ---- building blocks

function el(tag, attributes = {}, ...children) {
  const node = tag === "svg" || el.inSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function svg(build) { // nodes made by el() inside build() are svg nodes
  el.inSvg = true;
  try { return build(); } finally { el.inSvg = false; }
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function short(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function colour(value, least, most) { // red at the least, nothing at 0 or in the middle, green at the most
  const middle = least < 0 ? 0 : (least + most) / 2;
  const share = value >= middle ? (value - middle) / (most - middle || 1) : (value - middle) / (middle - least || 1);
  const strength = Math.min(1, Math.abs(share)) * 0.55;
  return `background: rgb(${share >= 0 ? "20 160 80" : "220 50 40"} / ${strength.toFixed(3)})`;
}

function select(label, values, onchange) {
  const box = el("select", { "aria-label": label, onchange: () => onchange(box.value) },
    el("option", { value: "" }, label), values.map((value) => el("option", { value }, value)));
  return box;
}

// ---- figures

function figures() {
  const labels = [...new Set(data.runs.flatMap((run) => run.figures.map((figure) => figure.label)))];
  const cell = (run, label) => {
    const found = run.figures.find((figure) => figure.label === label);
    if (!found) return el("td", {});
    const interval = found.interval && ` ${found.interval.map(percent).join(" .. ")}`;
    return el("td", { class: "number" }, found.share ? percent(found.value) : String(found.value),
      interval && el("span", { class: "faint" }, interval));
  };
  return el("table", { class: "figures" },
    data.runs.length > 1 && el("tr", {}, el("th"), data.runs.map((run, i) => el("th", { class: `run${i}` }, run.name))),
    labels.map((label) => el("tr", {}, el("th", {}, label), data.runs.map((run) => cell(run, label)))));
}

// ---- curves

function chart({ title, series, alerts = [], steps = false, log = false }) {
  const [width, height, left, right, top, bottom] = [360, 200, 46, 8, 8, 24];
  const points = series.flatMap((line) => line.points).filter(([, y]) => Number.isFinite(y));
  if (!points.length) return null;
  const place = log ? (x) => Math.log2(x) : (x) => x;
  const xs = points.map(([x]) => place(x));
  const ys = points.flatMap(([, y, low = y, high = y]) => [low, high]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const pad = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
  const X = (x) => left + (place(x) - x0) / (x1 - x0 || 1) * (width - left - right);
  const Y = (y) => top + (y1 + pad - y) / (y1 - y0 + 2 * pad) * (height - top - bottom);
  const palette = ["var(--run0)", "var(--run1)", "var(--right)", "var(--wrong)", "#8a63d2", "#b08900", "#3aa0a0", "#777777"];
  const picture = svg(() => el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
    [y0, (y0 + y1) / 2, y1].map((y) => [
      el("line", { class: "axis", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }),
      el("text", { x: left - 4, y: Y(y) + 4, "text-anchor": "end" }, short(y))]),
    [...new Set(log ? points.map(([x]) => x) : [points[0][0], points[points.length - 1][0]])].map((x) =>
      el("text", { x: X(x), y: height - 8, "text-anchor": "middle" }, short(x))),
    series.map((line, i) => {
      const known = line.points.filter(([, y]) => Number.isFinite(y));
      const stroke = line.colour || palette[i % palette.length];
      const band = known.every((point) => point.length === 4) && known.length > 1 && el("polygon", {
        fill: stroke, opacity: 0.12,
        points: [...known.map(([x, , low]) => [X(x), Y(low)]), ...[...known].reverse().map(([x, , , high]) => [X(x), Y(high)])].join(" ") });
      const path = el("polyline", { fill: "none", stroke, "stroke-width": 1.6, points: known.map(([x, y]) => [X(x), Y(y)]).join(" ") });
      const dots = known.length > 60 ? [] : known.map(([x, y]) => el("circle", { cx: X(x), cy: Y(y), r: 2.4, fill: stroke },
        el("title", {}, `${line.name}: ${short(y)} at ${short(x)}`)));
      return [band, path, dots];
    }),
    alerts.map(([step, name, advice]) => el("line", { class: "alert", x1: X(step), x2: X(step), y1: height - bottom - 6, y2: height - bottom + 4 },
      el("title", {}, `${name} at ${step}: ${advice}`)))));
  return el("figure", { class: "chart", style: "margin: 0" }, el("h3", {}, title), picture,
    el("div", { class: "legend" }, series.map((line, i) =>
      el("span", { style: `color: ${line.colour || palette[i % palette.length]}` }, line.name)),
      alerts.length > 0 && el("span", { class: "wrong" }, "| alarm"), steps && el("span", { class: "faint" }, "over steps")));
}

function choiceCurves() {
  return data.runs.filter((run) => run.curves.length).map((run) =>
    chart({ title: data.runs.length > 1 ? `accuracy over samples, ${run.name}` : "accuracy over samples", series: run.curves, log: true }));
}

function metricCurves() {
  const titles = [...new Set(data.runs.flatMap((run) => run.metrics.map((metric) => metric.group)))];
  return titles.flatMap((group) => {
    const names = [...new Set(data.runs.flatMap((run) => run.metrics.filter((metric) => metric.group === group).map((metric) => metric.name)))];
    return [el("h2", {}, group), el("div", { class: "charts" }, names.map((name) => chart({
      title: name, steps: true, alerts: data.runs.flatMap((run) => run.alerts),
      series: data.runs.flatMap((run, i) => run.metrics.filter((metric) => metric.name === name).map((metric) =>
        ({ name: data.runs.length > 1 ? run.name : name, points: metric.points, colour: `var(--run${i})` }))) })))];
  });
}

function alertTable() {
  const rows = data.runs.flatMap(({ alerts }) => [...new Set(alerts.map(([, name]) => name))].map((name) =>
    [name, alerts.filter(([, other]) => other === name)]));
  return rows.length > 0 && [el("h2", {}, "Alarms"), el("table", {}, rows.map(([name, alerts]) => el("tr", {},
    el("td", { class: "wrong number" }, name),
    el("td", { class: "number" }, `${alerts.length} times, steps ${alerts[0][0]} to ${alerts[alerts.length - 1][0]}`),
    el("td", {}, alerts[0][2]))))];
}

function groupTables() {
  return data.runs[0].groups.filter((group) => group.entries.length).map((group) => [
    el("h2", {}, `By ${group.kind}`),
    el("table", { class: "figures" }, group.entries.map((entry) => el("tr", {}, el("td", {}, entry.name),
      data.runs.map((run, i) => {
        const found = run.groups.find((other) => other.kind === group.kind)?.entries.find((other) => other.name === entry.name);
        return found && el("td", { class: `number run${i}` }, percent(found.accuracy), " ",
          el("span", { class: "faint" }, found.interval.map(percent).join(" .. ")));
      }), el("td", { class: "faint number" }, `${entry.problems} problems`))))]);
}

// ---- a text with colours

function coloured(pieces, values, least, most, unit) {
  return pieces.map((piece, i) => values[i] === null ? el("span", { class: "faint", title: "printed by code" }, piece) : el("span", {
    class: "step", style: colour(values[i], least, most), title: `${unit} ${short(values[i])}` }, piece));
}

function sampleText(sample) { // steps as colour, and the place that the answer was read from
  const pieces = sample.steps || [sample.response];
  let start = 0;
  return pieces.map((piece, i) => {
    const [from, to] = sample.span ? sample.span.map((at) => Math.min(Math.max(at - start, 0), piece.length)) : [0, 0];
    start += piece.length;
    const parts = [piece.slice(0, from), to > from && el("mark", {}, piece.slice(from, to)), piece.slice(to)];
    if (!sample.steps) return parts;
    const score = sample.step_scores[i];
    return el("span", score === undefined ? {} : { class: "step", style: colour(score, 0, 1), title: `step score ${short(score)}` }, parts);
  });
}

function sampleCard(sample, samples) {
  const votes = samples.filter((other) => other.answer !== null && other.answer === sample.answer).length;
  const facts = [`sample ${sample.sample}`,
    sample.score !== null && `score ${short(sample.score)}`,
    samples.length > 1 && sample.answer !== null && `${votes} of ${samples.length} answer so, spelled alike`,
    sample.tokens !== null && `${sample.tokens} tokens`, sample.finish && sample.finish !== "stop" && `ended by ${sample.finish}`];
  return el("div", { class: "sample" },
    el("div", {}, el("b", { class: sample.outcome }, sample.outcome), " ", el("span", { class: "faint" }, facts.filter(Boolean).join(" · "))),
    el("div", { class: "faint" }, sample.reason), el("pre", {}, sampleText(sample)));
}

// ---- problems

const countRight = (samples) => samples.filter((sample) => sample.outcome === "right").length;
// of the samples that were asked for: one that is missing is wrong
const rightShare = (samples, i) => countRight(samples) / data.runs[i].samples_a_problem;

function kindsOf(problem) { // what the outcome filter finds a problem by
  const all = problem.runs.flat();
  const kinds = new Set(all.map((sample) => sample.outcome));
  const shares = problem.runs.map(rightShare).filter((share, i) => problem.runs[i].length);
  const every = (share) => shares.every((other) => other === share);
  kinds.add(every(1) ? "all right" : every(0) ? "none right" : "some right");
  if (all.some((sample) => sample.finish && sample.finish !== "stop")) kinds.add("cut off");
  if (problem.runs.length > 1) {
    const [before, after] = problem.runs.map(rightShare);
    if (after !== before) kinds.add(after > before ? "gained" : "lost");
  }
  return kinds;
}

function problemTable() {
  if (!data.problems.length) return null;
  const wanted = { outcome: "", level: "", subject: "", text: "" };
  let first = 0;
  const kinds = data.problems.map(kindsOf);
  const values = (key) => [...new Set(data.problems.map((problem) => problem[key]).filter((value) => value !== null))].sort();
  const body = el("tbody", { id: "problems" });
  const count = el("span", { class: "faint", id: "count" });
  const back = el("button", { onclick: () => { first -= PAGE_SIZE; show(); } }, "previous");
  const on = el("button", { onclick: () => { first += PAGE_SIZE; show(); } }, "next");
  const choose = (key) => (value) => { wanted[key] = value; first = 0; show(); };
  const search = el("input", { type: "search", placeholder: "search problems and samples", oninput: () => choose("text")(search.value.toLowerCase()) });

  function matches(problem, i) {
    return (!wanted.outcome || kinds[i].has(wanted.outcome))
      && ["level", "subject"].every((key) => !wanted[key] || String(problem[key]) === wanted[key])
      && (!wanted.text || [problem.id, problem.prompt, problem.label, ...problem.runs.flat().map((sample) => sample.response)]
        .some((text) => text.toLowerCase().includes(wanted.text)));
  }

  function show() {
    const found = data.problems.filter(matches);
    first = Math.max(0, Math.min(first, found.length - 1));
    const shown = found.slice(first, first + PAGE_SIZE);
    body.replaceChildren(...shown.map(problemRow));
    count.textContent = found.length ? `${first + 1} to ${first + shown.length} of ${found.length} problems` : "no problem";
    back.disabled = first === 0;
    on.disabled = first + PAGE_SIZE >= found.length;
  }

  function problemRow(problem) {
    const toggle = () => {
      const next = row.nextSibling;
      if (next?.classList.contains("detail")) next.remove(); else row.after(detail(problem));
    };
    const row = el("tr", { class: "row", tabindex: 0, onclick: toggle, onkeydown: (event) => event.key === "Enter" && toggle() },
      el("td", {}, problem.id), problem.runs.map((samples, i) => {
        const [right, n] = [countRight(samples), data.runs[i].samples_a_problem];
        return el("td", { class: "number" }, data.runs.length > 1 && el("span", { class: `run${i}` }, `${"AB"[i]} `),
          el("span", { class: right ? "right" : "wrong" }, n === 1 && samples.length ? samples[0].outcome : `${right} of ${n} right`));
      }), el("td", { class: "text" }, problem.prompt), el("td", { class: "number" }, problem.label));
    return row;
  }

  function detail(problem) {
    const about = [problem.level !== null && `level ${problem.level}`, problem.subject, `label ${problem.label}`];
    return el("tr", { class: "detail" }, el("td", { colspan: 3 + data.runs.length },
      el("div", { class: "problem" }, problem.prompt), el("div", { class: "faint" }, about.filter(Boolean).join(" · ")),
      problem.runs.map((samples, i) => [data.runs.length > 1 && el("h3", { class: `run${i}` }, data.runs[i].name),
        el("div", { class: "samples" }, samples.map((sample) => sampleCard(sample, samples)))])));
  }

  show();
  return [el("h2", {}, "Problems"),
    data.n_problems > data.problems.length && el("p", { class: "note" },
      `${data.problems.length} of ${data.n_problems} problems are in this page, spread evenly over the file; the figures are of all.`),
    el("div", { class: "controls" }, select("any outcome", [...new Set(kinds.flatMap((kind) => [...kind]))].sort(), choose("outcome")),
      values("level").length > 0 && select("any level", values("level"), choose("level")),
      values("subject").length > 0 && select("any subject", values("subject"), choose("subject")), search, back, on, count),
    el("table", {}, body)];
}

// ---- rollouts and credits

function tokenText(row, key, unit) {
  const values = row[key];
  const most = Math.max(1e-9, ...values.map(Math.abs));
  return el("pre", {}, coloured(row.pieces, values, -most, most, unit));
}

function rolloutTable() {
  const buffers = data.runs[0].buffers;
  if (!buffers.length) return null;
  const cards = el("div", { class: "samples", id: "rollouts" });
  let [chosen, coloursBy] = [buffers.length - 1, "advantages"];
  const box = el("select", { "aria-label": "buffer", onchange: () => { chosen = box.selectedIndex; show(); } },
    buffers.map((buffer) => el("option", {}, `buffer ${buffer.step}`)));
  const by = el("select", { "aria-label": "colour by", onchange: () => { coloursBy = by.value; show(); } },
    el("option", { value: "advantages" }, "colour: advantage"), el("option", { value: "token_kl" }, "colour: KL"));
  box.selectedIndex = chosen;

  function card(row) {
    const rewards = Object.entries(row.rewards).map(([name, value]) => `${name} ${short(value)}`).join(", ");
    const facts = `KL ${short(row.kl)} · ${row.tokens} tokens${row.finished ? "" : " · cut off"}${row.learned ? "" : " · not learnt from"}`;
    const unit = coloursBy === "advantages" ? "advantage" : "KL";
    return el("div", { class: "sample" }, el("div", {}, el("b", {}, rewards), " ", el("span", { class: "faint" }, facts)),
      row.label && el("div", { class: "faint" }, `label ${row.label}`),
      el("details", {}, el("summary", { class: "faint" }, "problem"), el("div", { class: "problem" }, row.prompt)),
      row.pieces ? tokenText(row, coloursBy, unit) : el("pre", {}, row.response));
  }

  function show() { cards.replaceChildren(...buffers[chosen].rows.map(card)); }
  show();
  return [el("h2", {}, "Rollouts"), data.runs[0].n_buffers > buffers.length && el("p", { class: "note" },
    `${buffers.length} of ${data.runs[0].n_buffers} buffers are in this page.`),
    el("div", { class: "controls" }, box, by), cards];
}

function creditCards() {
  const rows = data.runs[0].credits;
  return rows.length > 0 && [el("h2", {}, "Credit of tokens"), el("div", { class: "samples" }, rows.map((row) =>
    el("div", { class: "sample" }, el("div", {}, el("b", {}, `reward ${short(row.reward)}`), " ",
      el("span", { class: "faint" }, row.first_wrong < 0 ? "no wrong step" : `step ${row.first_wrong + 1} is the first wrong one`)),
    el("details", {}, el("summary", { class: "faint" }, "problem"), el("div", { class: "problem" }, row.prompt)),
    tokenText(row, "credits", "credit, nats"))))];
}

// ---- the page

document.title = data.runs.map((run) => run.name).join(" and ");
page.append(...[
  el("h1", {}, document.title), el("p", { class: "note" }, data.runs.map((run) => run.subtitle).join("; ")), figures(),
  data.comparison && el("p", { id: "comparison" }, data.comparison),
  choiceCurves().length > 0 && [el("h2", {}, "Choosing among samples"), el("div", { class: "charts" }, choiceCurves())],
  groupTables(), alertTable(), metricCurves(), problemTable(), rolloutTable(), creditCards(),
].flat(Infinity).filter(Boolean));
