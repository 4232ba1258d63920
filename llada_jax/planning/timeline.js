// The script of timeline.html. `data` is what timeline.py writes: blocks of events, see `html` there.
const COLORS = { "embedding": "#8c6d31", "attention projections": "#2f6fb0", "attention": "#7b4fa3", "feed-forward": "#2b8a57",
  "norms": "#b8860b", "head and loss": "#b5533c", "optimizer": "#4a5a6a", "copies": "#8f8f8f", "communication": "#d0344b",
  "other": "#59809a" };
const PASS_COLORS = { "forward": "#6aa6dd", "recomputed": "#e0a83c", "backward": "#c46a9b", "update": "#7d8896" };
const byId = id => document.getElementById(id);
const color = part => COLORS[data.parts[part]];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const total = data.seconds * 1e6;

function time(micro) {
  if (Math.abs(micro) >= 1e6) return (micro / 1e6).toFixed(3) + " s";
  if (Math.abs(micro) >= 1e3) return (micro / 1e3).toFixed(2) + " ms";
  return micro.toFixed(1) + " µs";
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

// --- the words, the legend and the tables ---
byId("title").textContent = document.title = data.title;
for (const note of data.notes) byId("notes").append(element("p", note));
byId("notes").append(element("p", "This is an estimate of the compiler and of stated models. It has never been compared with a " +
  "measured step.", "soft"));
const legend = (name, fill) => {
  const one = element("span"), box = element("i");
  box.style.background = fill;
  one.append(box, name);
  byId("legend").append(one);
};
for (const part of data.parts) if (data.times[part]) legend(part, COLORS[part]);
for (const pass of data.passes) legend("pass: " + pass, PASS_COLORS[pass]);

function row(table, cells, tag) {
  const line = element("tr");
  for (const [text, name] of cells) line.append(element(tag || "td", text, name));
  table.append(line);
}
row(byId("table"), [["part"], ...data.passes.map(pass => [pass, "number"]), ["all", "number"], ["share", "number"]], "th");
for (const [part, times] of Object.entries(data.times)) {
  const sum = Object.values(times).reduce((a, b) => a + b, 0);
  row(byId("table"), [[part], ...data.passes.map(pass => [times[pass] ? times[pass].toFixed(3) : "", "number"]),
    [sum.toFixed(3), "number"], [(100 * sum / data.seconds).toFixed(1) + " %", "number"]]);
}
row(byId("dearest"), [["seconds", "number"], ["runs", "number"], ["instruction"], ["part"], ["pass"], ["duration from"],
  ["line"]], "th");
for (const one of data.dearest) {
  row(byId("dearest"), [[one.seconds.toFixed(3), "number"], [one.runs.toLocaleString("en"), "number"], [one.name],
    [one.part], [one.pass], [one.basis], [one.source]]);
}

// --- the treemap: tiles as square as they get, after Bruls, Huizing and van Wijk ---
function tiles(items, box) {
  const sum = items.reduce((a, item) => a + item.value, 0), placed = [];
  let rest = items.map(item => ({ ...item, area: item.value / sum * box.w * box.h })).sort((a, b) => b.area - a.area);
  let { x, y, w, h } = box;
  while (rest.length) {
    const side = Math.min(w, h);
    const worst = line => {
      const s = line.reduce((a, item) => a + item.area, 0);
      return Math.max(...line.map(item => Math.max(side * side * item.area / (s * s), s * s / (side * side * item.area))));
    };
    let count = 1;
    while (count < rest.length && worst(rest.slice(0, count + 1)) <= worst(rest.slice(0, count))) count++;
    const line = rest.slice(0, count), thick = line.reduce((a, item) => a + item.area, 0) / side;
    let at = 0;
    for (const item of line) {
      const long = item.area / thick;
      placed.push(w >= h ? { ...item, x, y: y + at, w: thick, h: long } : { ...item, x: x + at, y, w: long, h: thick });
      at += long;
    }
    if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
    rest = rest.slice(count);
  }
  return placed;
}

function drawMap() {
  const map = byId("map");
  map.replaceChildren();
  const groups = Object.entries(data.times).map(([part, times]) =>
    ({ part, times, value: Object.values(times).reduce((a, b) => a + b, 0) })).filter(group => group.value > 0);
  for (const group of tiles(groups, { x: 0, y: 0, w: map.clientWidth, h: map.clientHeight })) {
    const inner = Object.entries(group.times).map(([pass, value]) => ({ pass, value })).filter(one => one.value > 0);
    for (const tile of tiles(inner, group)) {
      const text = `${group.part}, ${tile.pass}: ${tile.value.toFixed(3)} s, ${(100 * tile.value / data.seconds).toFixed(1)} %`;
      const named = tile.w > 46 && tile.h > 20, box = element("div", named ? text : "", named ? "named" : "");
      box.title = text;
      const shade = { "forward": 1, "recomputed": 1.25, "backward": 0.82, "update": 1 }[tile.pass];
      Object.assign(box.style, { left: tile.x + "px", top: tile.y + "px", width: tile.w + "px", height: tile.h + "px",
        background: COLORS[group.part], filter: `brightness(${shade})` });
      map.append(box);
    }
  }
}

// --- the timeline ---
const canvas = byId("timeline"), pen = canvas.getContext("2d"), LEFT = 92;
const LANES = { loops: [26, 44], core: [76, 76], pass: [154, 10] };
data.units.slice(1).forEach((unit, i) => { LANES[unit] = [174 + 28 * i, 22]; });
let view = [0, total], hits = [], width = 0;

function walk(block, offset, depth, visit) {
  for (const event of data.blocks[block].rows) {
    const start = offset + event[1];
    if (start > view[1] || start + event[2] < view[0]) continue;
    visit(event, start, depth);
    if (event[7] < 0) continue;
    const one = data.blocks[event[7]].seconds * 1e6;
    const first = Math.max(0, Math.floor((view[0] - start) / one)), last = Math.min(event[8], Math.ceil((view[1] - start) / one));
    for (let turn = first; turn < last; turn++) walk(event[7], start + turn * one, depth + 1, visit);
  }
}

function draw() {
  const scale = window.devicePixelRatio || 1;
  width = canvas.clientWidth - LEFT;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const perPixel = (view[1] - view[0]) / width, x = t => LEFT + (t - view[0]) / perPixel;
  for (const [name, [top, high]] of Object.entries(LANES)) {
    pen.fillStyle = css("--lane");
    pen.fillRect(LEFT, top, width, high);
    pen.fillStyle = css("--soft");
    pen.fillText(name, 6, top + high / 2);
  }
  let tick = Math.pow(10, Math.floor(Math.log10((view[1] - view[0]) / 4)));
  if ((view[1] - view[0]) / tick > 14) tick *= 2;
  for (let t = Math.ceil(view[0] / tick) * tick; t <= view[1]; t += tick) {
    pen.fillStyle = css("--line");
    pen.fillRect(x(t), 20, 1, 240);
    pen.fillStyle = css("--soft");
    if (x(t) < LEFT + width - 50) pen.fillText(time(t), x(t) + 3, 11);
  }
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, width, 300);
  pen.clip();
  hits = [];
  // What covers a pixel only in part is summed for each pixel: lane -> column -> color -> share.
  const fine = {};
  const put = (lane, from, to, fill) => {
    const columns = fine[lane] ||= new Map();
    for (let column = Math.floor(from); column < to; column++) {
      const part = Math.min(to, column + 1) - Math.max(from, column);
      if (part <= 0) continue;
      if (!columns.has(column)) columns.set(column, new Map());
      const cell = columns.get(column);
      cell.set(fill, (cell.get(fill) || 0) + part);
    }
  };
  const bar = (lane, from, to, fill) => {  // whole pixels at once, the broken ones at both ends by their shares
    const first = Math.ceil(from), last = Math.floor(to);
    if (last <= first) return put(lane, from, to, fill);
    put(lane, from, first, fill);
    put(lane, last, to, fill);
    pen.fillStyle = fill;
    pen.fillRect(first, LANES[lane][0], last - first, LANES[lane][1]);
    pen.fillStyle = "rgba(0, 0, 0, 0.3)";
    if (last - first > 4) pen.fillRect(first, LANES[lane][0], 1, LANES[lane][1]);
  };
  walk(data.entry, 0, 0, (event, start, depth) => {
    const from = Math.max(x(start), LEFT - 2), to = Math.min(x(start + event[2]), LEFT + width + 2);
    const label = data.labels[event[5]];
    if (event[7] >= 0) {
      const top = LANES.loops[0] + Math.min(depth, 1) * 22;
      pen.fillStyle = PASS_COLORS[data.passes[event[4]]];
      pen.globalAlpha = 0.35;
      pen.fillRect(from, top, to - from - 1, 20);
      pen.globalAlpha = 1;
      pen.fillStyle = css("--ink");
      const text = `${label[0]}: ${event[8].toLocaleString("en")} iterations, ${time(event[2])}`;
      const short = `${event[8].toLocaleString("en")} x`;
      const fits = [text, short].find(one => pen.measureText(one).width < to - from - 8);
      if (fits) pen.fillText(fits, Math.max(from, LEFT) + 4, top + 10);
      hits.push([from, top, to - from, 20, event, start]);
      return;
    }
    const unit = data.units[event[0]], [top, high] = LANES[unit];
    const wait = event[6] === "wait" || event[6] === "transfer";
    const fill = unit === "core" && wait ? COLORS.communication : color(event[3]);
    bar(unit, from, to, fill);
    if (unit === "core") bar("pass", from, to, PASS_COLORS[data.passes[event[4]]]);
    if (to - from > 64) {
      pen.fillStyle = "#fff";
      const lines = high > 40 ? [label[0], data.parts[event[3]], time(event[2]), label[2]] : [label[0]];
      lines.forEach((text, i) => {
        let shown = text;
        while (shown && pen.measureText(shown).width > to - from - 8) shown = shown.slice(0, -1);
        pen.fillText(shown, Math.max(from, LEFT) + 4, high > 40 ? top + 11 + 18 * i : top + high / 2);
      });
    }
    hits.push([from, top, Math.max(to - from, 0.5), high, event, start]);
  });
  for (const [lane, columns] of Object.entries(fine)) {
    const [top, high] = LANES[lane];
    for (const [column, cell] of columns) {
      let below = top + high;
      for (const fill of [...cell.keys()].sort()) {
        const share = cell.get(fill) * high;
        pen.fillStyle = fill;
        pen.fillRect(column, below - share, 1, share);
        below -= share;
      }
    }
  }
  pen.restore();
}

function move(start, end) {
  const span = Math.min(total, Math.max(end - start, 0.5));
  start = Math.min(Math.max(start, 0), total - span);
  view = [start, start + span];
  requestAnimationFrame(draw);
}
const zoom = (factor, at = (view[0] + view[1]) / 2) => move(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
const pan = share => move(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));
byId("in").onclick = () => zoom(0.5);
byId("out").onclick = () => zoom(2);
byId("all").onclick = () => move(0, total);
byId("iteration").onclick = () => {
  let best = null;
  const search = (block, offset) => {
    for (const event of data.blocks[block].rows) if (event[7] >= 0) {
      const body = data.blocks[event[7]];
      if (body.rows.some(one => one[7] >= 0)) search(event[7], offset + event[1]);
      else if (!best || event[2] > best[2]) best = [offset + event[1], body.seconds * 1e6, event[2]];
    }
  };
  search(data.entry, 0);
  if (best) move(best[0] + best[1], best[0] + 2 * best[1]);
};
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const at = view[0] + (event.offsetX - LEFT) / width * (view[1] - view[0]);
  zoom(Math.exp(event.deltaY / 300), at);
}, { passive: false });
let held = null;
canvas.addEventListener("pointerdown", event => { held = [event.offsetX, ...view]; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("dblclick", () => move(0, total));
canvas.addEventListener("keydown", event => {
  const action = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => move(0, total),
    "ArrowLeft": () => pan(-0.2), "ArrowRight": () => pan(0.2) }[event.key];
  if (action) { event.preventDefault(); action(); }
});
canvas.addEventListener("pointermove", event => {
  if (held) {
    const shift = (held[0] - event.offsetX) / width * (held[2] - held[1]);
    move(held[1] + shift, held[2] + shift);
  }
  const found = hits.filter(([left, top, wide, high]) =>
    event.offsetX >= left - 0.5 && event.offsetX <= left + wide + 0.5 && event.offsetY >= top && event.offsetY <= top + high);
  found.sort((a, b) => Math.abs(a[0] + a[2] / 2 - event.offsetX) - Math.abs(b[0] + b[2] / 2 - event.offsetX));
  const tip = byId("tip");
  tip.style.display = found.length ? "block" : "none";
  if (!found.length) return;
  const [, , , , one, start] = found[0], [name, op, line] = data.labels[one[5]];
  tip.replaceChildren();
  const kind = one[7] >= 0 ? `loop, ${one[8]} iterations` : `${data.parts[one[3]]}, ${data.passes[one[4]]}; duration from: ${one[6]}`;
  for (const text of [name, `${time(one[2])}, begins at ${time(start)}`, kind, line, op]) if (text) tip.append(element("div", text));
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 480) + "px";
  tip.style.top = event.clientY + 14 + "px";
});
canvas.addEventListener("pointerleave", () => { byId("tip").style.display = "none"; });
window.addEventListener("resize", () => { draw(); drawMap(); });
if (location.hash === "#iteration") byId("iteration").click();
draw();
drawMap();
