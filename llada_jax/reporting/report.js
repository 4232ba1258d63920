// The script of report.html. `data` is what show.py writes: the report of `gather`, with the kinds of time in their order.
const KIND_COLORS = { train: "#2b8a57", startup: "#8c6d31", compile: "#e0a83c", data: "#2f6fb0", checkpoint: "#7b4fa3",
  evaluate: "#59a0a8", redone: "#d0344b", down: "#8f8f8f" };
const KIND_WORDS = { train: "steps that count", startup: "start-up", compile: "compiling", data: "waiting for data",
  checkpoint: "stalled by checkpoints", evaluate: "validation and samples", redone: "steps done again after a kill",
  down: "between two starts" };
const LINE_COLORS = ["#2f6fb0", "#d0344b", "#2b8a57", "#b8860b", "#7b4fa3"];
const byId = id => document.getElementById(id);
const sum = values => values.reduce((a, b) => a + b, 0);

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function duration(seconds) {
  if (seconds < 60) return seconds.toFixed(1) + " s";
  const two = n => String(Math.floor(n)).padStart(2, "0");
  const days = Math.floor(seconds / 86400), rest = seconds % 86400;
  const clock = `${Math.floor(rest / 3600)}:${two(rest / 60 % 60)}:${two(rest % 60)}`;
  return days ? `${days} d ${clock}` : clock;
}

function number(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e4) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function short(value) {  // for an axis: few characters
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return Number((value / unit).toPrecision(3)) + letter;
  return size && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function share(seconds) {
  const all = sum(Object.values(seconds));
  return all ? (100 * (seconds.train || 0) / all).toFixed(1) + " %" : "";
}

function bar(box, seconds, most) {
  for (const kind of data.kinds) if (seconds[kind] > 0) {
    const part = element("div");
    part.style.cssText = `background:${KIND_COLORS[kind]};width:${100 * seconds[kind] / most}%`;
    part.title = `${KIND_WORDS[kind]}: ${duration(seconds[kind])}`;
    box.append(part);
  }
  return box;
}

function row(table, cells, tag) {
  const line = element("tr");
  for (const [content, name] of cells) {
    const cell = element(tag || "td", content instanceof Node ? undefined : content, name);
    if (content instanceof Node) cell.append(content);
    line.append(cell);
  }
  table.append(line);
}

function key(box, name, color) {
  const one = element("span"), mark = element("i");
  mark.style.background = color;
  one.append(mark, name);
  box.append(one);
}

// --- the run, its starts, and what changed ---
byId("title").textContent = document.title = data.workdir;
const all = sum(Object.values(data.seconds));
byId("progress").textContent = `Step ${number(data.step)} of ${number(data.steps)}` +
  (all ? `; goodput ${share(data.seconds)} of ${duration(all)}` : "") + `; ${data.starts.length} start${data.starts.length > 1 ? "s" : ""}`;
bar(byId("whole"), data.seconds, all);
for (const kind of data.kinds) if (data.seconds[kind]) {
  const part = (100 * data.seconds[kind] / all).toFixed(1);
  key(byId("kinds"), `${KIND_WORDS[kind]} ${duration(data.seconds[kind])} (${part} %)`, KIND_COLORS[kind]);
}
const longest = Math.max(...data.starts.map(start => sum(Object.values(start.seconds))));
const kinds = data.kinds.filter(kind => data.starts.some(start => start.seconds[kind]));
row(byId("starts"), [["start"], ["began (UTC)"], ["from step", "number"], ["to step", "number"], ["time", "number"], [""],
  ["goodput", "number"], ...kinds.map(kind => [kind, "number"])], "th");
data.starts.forEach((start, i) => row(byId("starts"), [[String(i + 1)], [start.began.slice(0, 19).replace("T", " ")],
  [number(start.step), "number"], [number(start.to), "number"], [duration(sum(Object.values(start.seconds))), "number"],
  [bar(element("div", undefined, "bar"), start.seconds, longest), "bars"], [share(start.seconds), "number"],
  ...kinds.map(kind => [start.seconds[kind] ? duration(start.seconds[kind]) : "", "number"])]));

const changed = data.starts.flatMap((start, i) => Object.entries(start.changes).map(([name, pair]) => [i + 1, name, ...pair]));
if (changed.length) {
  const box = element("div", undefined, "wide"), table = element("table");
  row(table, [["start"], ["setting"], ["before"], ["from then on"]], "th");
  for (const [start, name, before, after] of changed)
    row(table, [[String(start)], [name], [JSON.stringify(before), "value"], [JSON.stringify(after), "value"]]);
  box.append(table);
  byId("changes").append(element("h2", "What changed between two starts"), box);
}
if (data.spikes.length) {
  byId("spikes").append(element("h2", "Spikes"));
  for (const spike of data.spikes) byId("spikes").append(element("p", spike.text));
}

// --- the curves: all show the same steps ---
const NS = "http://www.w3.org/2000/svg", LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;
const last = Math.max(1, ...data.curves.flatMap(chart => chart.series.flatMap(one => one.points.at(-1)[0])));
let view = [0, last];

function drawn(parent, tag, attributes, text) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function ticks(low, high, most) {
  const raw = (high - low) / most, unit = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 5, 10].find(factor => factor * unit >= raw) * unit, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function decades(low, high) {
  const within = factors => {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) for (const factor of factors) found.push(factor * 10 ** power);
    return found.filter(value => Math.log10(value) >= low && Math.log10(value) <= high);
  };
  return [[1, 2, 5], [1, 3], [1]].map(within).find(levels => levels.length < 7) || ticks(low, high, 4).map(t => 10 ** t);
}

function colors(chart) {
  const count = chart.series.length;
  return count <= LINE_COLORS.length ? LINE_COLORS : chart.series.map((_, i) => `hsl(${220 - 220 * i / (count - 1)} 62% 50%)`);
}

function limits(chart) {
  // A few wild values must not flatten a curve: the means decide, and the band is cut off where it goes further.
  const values = chart.series.flatMap(one => one.points.filter(p => p[0] >= view[0] && p[0] <= view[1]).map(p => p[1]))
    .filter(y => !chart.log || y > 0).sort((a, b) => a - b);
  if (!values.length) return [0, 1];
  let low = values[0], high = values[values.length - 1];
  if (values.length > 50 && !chart.log) {
    const middle = values[Math.floor(values.length / 2)], upper = values[Math.floor(values.length * 0.98)];
    high = Math.min(high, upper + 1.5 * Math.max(upper - middle, middle - low));
  }
  if (chart.log) return [Math.log10(low) - 0.05, Math.log10(high) + 0.05];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function draw(chart) {
  const svg = chart.svg, width = svg.clientWidth, height = svg.clientHeight;
  svg.replaceChildren();
  const [low, high] = limits(chart), scaled = y => chart.log ? Math.log10(y) : y;
  const x = step => LEFT + (step - view[0]) / (view[1] - view[0]) * (width - LEFT - RIGHT);
  const y = value => TOP + (high - scaled(value)) / (high - low) * (height - TOP - BOTTOM);
  chart.x = x;
  const levels = chart.log ? decades(low, high) : ticks(low, high, 5);
  for (const level of levels) {
    drawn(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y(level), y2: y(level), stroke: "var(--line)" });
    drawn(svg, "text", { x: LEFT - 5, y: y(level) + 4, "text-anchor": "end" }, short(level));
  }
  for (const step of ticks(view[0], view[1], Math.max(2, width / 110)))
    drawn(svg, "text", { x: Math.min(x(step), width - 14), y: height - 5, "text-anchor": "middle" }, short(step));
  const clip = drawn(drawn(svg, "clipPath", { id: `clip${chart.index}` }), "rect",
    { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: height - TOP - BOTTOM });
  const inner = drawn(svg, "g", { "clip-path": `url(#${clip.parentNode.id})` });
  for (const start of data.starts.slice(1)) drawn(inner, "line", { x1: x(start.step), x2: x(start.step), y1: TOP,
    y2: height - BOTTOM, stroke: "var(--soft)", "stroke-dasharray": "3 3" });
  chart.series.forEach((one, i) => {
    const color = colors(chart)[i];
    // One point beyond each end, so that a line that leaves the chart is drawn up to its edge.
    const first = Math.max(0, one.points.findIndex(p => p[0] >= view[0]) - 1);
    const end = one.points.findIndex(p => p[0] > view[1]);
    const points = one.points.slice(first, end < 0 ? undefined : end + 1).filter(p => !chart.log || p[2] > 0);
    if (points.some(p => p[3] > p[2]) && chart.series.length < 4) {
      const edge = [...points.map(p => [p[0], p[3]]), ...points.map(p => [p[0], p[2]]).reverse()];
      drawn(inner, "polygon", { points: edge.map(([s, v]) => `${x(s)},${y(v)}`).join(" "), fill: color, opacity: 0.2 });
    }
    drawn(inner, "polyline", { points: points.map(p => `${x(p[0])},${y(p[1])}`).join(" "), fill: "none", stroke: color,
      "stroke-width": 1.6, "stroke-linejoin": "round" });
    if (points.length <= 30) for (const p of points)
      drawn(inner, "circle", { cx: x(p[0]), cy: y(p[1]), r: 2.5, fill: color });
  });
  for (const spike of data.spikes) if (spike.step >= view[0] && spike.step <= view[1])
    drawn(svg, "circle", { cx: x(spike.step), cy: height - BOTTOM, r: 3.5, fill: "var(--mark)" });
  chart.cursor = drawn(svg, "line", { y1: TOP, y2: height - BOTTOM, stroke: "var(--soft)", visibility: "hidden" });
  chart.shade = drawn(svg, "rect", { y: TOP, height: height - TOP - BOTTOM, fill: "var(--soft)", opacity: 0.2, width: 0 });
}
const drawAll = () => data.curves.forEach(draw);
const stepAt = (chart, event) => {
  const width = chart.svg.clientWidth - LEFT - RIGHT, at = event.clientX - chart.svg.getBoundingClientRect().left - LEFT;
  return view[0] + Math.min(Math.max(at / width, 0), 1) * (view[1] - view[0]);
};

function tell(chart, event) {
  const step = stepAt(chart, event), tip = byId("tip"), lines = [];
  let nearest = null;
  chart.series.forEach((one, i) => {
    const point = one.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    if (nearest === null || Math.abs(point[0] - step) < Math.abs(nearest - step)) nearest = point[0];
    const range = point[3] > point[2] ? ` (${number(point[2])} to ${number(point[3])})` : "";
    lines.push([`${one.name}: ${number(point[1])}${range}`, colors(chart)[i]]);
  });
  tip.replaceChildren(element("div", `step ${nearest.toLocaleString("en")}`));
  for (const [text, color] of lines) {
    const line = element("div", undefined, "legend");
    key(line, text, color);
    tip.append(line);
  }
  tip.style.display = "block";
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)) + "px";
  for (const [name, value] of [["x1", chart.x(nearest)], ["x2", chart.x(nearest)], ["visibility", "visible"]])
    chart.cursor.setAttribute(name, value);
}

data.curves.forEach((chart, index) => {
  const box = element("div"), head = element("h3", chart.title), legend = element("div", undefined, "legend");
  head.append(element("span", chart.unit ? `, ${chart.unit}` : "", "soft"));
  chart.index = index;
  chart.svg = document.createElementNS(NS, "svg");
  chart.svg.setAttribute("role", "img");
  chart.svg.setAttribute("aria-label", chart.title);
  if (chart.series.length > 1) chart.series.forEach((one, i) => key(legend, one.name, colors(chart)[i]));
  box.append(head, chart.svg, legend);
  byId("charts").append(box);
  let from = null;
  chart.svg.addEventListener("pointerdown", event => {
    from = stepAt(chart, event);
    if (event.pointerType === "mouse") chart.svg.setPointerCapture(event.pointerId);
  });
  chart.svg.addEventListener("pointermove", event => {
    tell(chart, event);
    if (from === null || event.pointerType !== "mouse") return;
    const [a, b] = [from, stepAt(chart, event)].map(chart.x).sort((one, other) => one - other);
    chart.shade.setAttribute("x", a);
    chart.shade.setAttribute("width", b - a);
  });
  chart.svg.addEventListener("pointerup", event => {
    const ends = [from, stepAt(chart, event)].sort((a, b) => a - b);
    from = null;
    chart.shade.setAttribute("width", 0);
    if (event.pointerType === "mouse" && chart.x(ends[1]) - chart.x(ends[0]) > 8) { view = ends; drawAll(); }
  });
  chart.svg.addEventListener("pointerleave", () => {
    byId("tip").style.display = "none";
    chart.cursor.setAttribute("visibility", "hidden");
  });
  chart.svg.addEventListener("dblclick", () => { view = [0, last]; drawAll(); });
});

// --- the samples ---
if (data.samples.length) {
  const pick = element("div", undefined, "pick"), slider = element("input"), label = element("span"), text = element("pre");
  slider.type = "range";
  slider.min = 0;
  slider.max = data.samples.length - 1;
  slider.setAttribute("aria-label", "Step of the samples");
  const show = at => {
    slider.value = at;
    label.textContent = `step ${data.samples[slider.value].step.toLocaleString("en")}`;
    text.textContent = data.samples[slider.value].text;
  };
  const before = element("button", "‹"), after = element("button", "›");
  before.setAttribute("aria-label", "earlier samples");
  after.setAttribute("aria-label", "later samples");
  before.onclick = () => show(Number(slider.value) - 1);
  after.onclick = () => show(Number(slider.value) + 1);
  slider.oninput = () => show(slider.value);
  pick.append(before, slider, after, label);
  byId("samples").append(element("h2", "Samples"), pick, text);
  show(data.samples.length - 1);
}
window.addEventListener("resize", drawAll);
drawAll();
