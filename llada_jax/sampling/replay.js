// The script of replay.html. `data` is what replay.py writes; `encoded` says what its columns mean.
const TAKEN = -1, SPEEDS = [0.5, 1, 2, 4, 8, 16, 32, 64, 128], SECONDS = 8;
const byId = id => document.getElementById(id);
const canvas = byId("canvas"), slider = byId("step"), tip = byId("tip"), tokens = data.tokens;
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
let sample, step = 0, picked = -1, pinned = false, playing = null, follow = true;

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

const percent = sure => (sure >= 9995 && sure < 10000 ? (sure / 100).toFixed(2) : (sure / 100).toFixed(1)) + " %";
const isControl = token => token >= 0 && tokens.control[token] === 1;
// What a character does elsewhere (move, turn the direction of the text, end a line) it must not do here.
const harmless = text => text.replace(/\r/g, "␍").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "\ufffd")
  .replace(/[\u2028\u2029]/g, "\u21b5").replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "");
const named = token => tokens.text[token] === "" ? "(part of a character)" :
  harmless(tokens.text[token].replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥"));

// --- the data: what happens at each position, and at each step ---
function decode(packed) {
  const found = { ...packed, total: packed.counts.length, happens: packed.start.map(() => []), steps: [[]], again: false };
  let next = 0, likely = 0;
  packed.counts.forEach((count, i) => {
    const at = [];
    for (let position = 0, n = 0; n < count; n++, next++) {
      position += packed.at[next];
      const events = found.happens[position], before = events[events.length - 1], code = packed.token[next];
      if (code < TAKEN) {
        const same = before || { step: 0, token: packed.start[position], sure: -1, likely: [], again: false };
        events.push({ ...same, token: -2 - code, from: i + 1 });
        continue;
      }
      at.push(position);
      const event = { step: i + 1, from: i + 1, token: code, sure: packed.sure[next], likely: [],
        again: events.some(one => one.token === TAKEN) || (code !== TAKEN && before !== undefined) };
      if (event.sure >= 0) for (let n = 0; n < data.alternatives; n++, likely++)
        event.likely.push([packed.likely[likely], packed.likely_sure[likely]]);
      found.again ||= event.again || code === TAKEN;
      events.push(event);
    }
    found.steps.push(at);
  });
  return found;
}

function stateAt(position) {  // the last event up to now, or undefined if nothing has happened yet
  const events = sample.happens[position];
  let low = 0, high = events.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (events[middle].from <= step) low = middle + 1; else high = middle;
  }
  return events[low - 1];
}

// --- the canvas: one span for each token that is filled in, and one for each run of given tokens ---
function fill(span, text) {
  span.replaceChildren();
  harmless(text).split("\n").forEach((line, i) => {
    if (i) span.append(element("i", "⏎"), "\n");
    if (line) span.append(line);
  });
}

function build() {
  canvas.replaceChildren();
  sample.spans = [];
  const finals = sample.start.map((token, at) => sample.happens[at].length ? sample.happens[at][sample.happens[at].length - 1].token : token);
  sample.short = finals.map((token, at) => at > 0 && isControl(token) && finals[at - 1] === token);
  sample.finals = finals;
  sample.live = [];
  let run = "", head = null;
  const flush = () => {
    if (run && !sample.live.length && run.length > 700) {
      head = element("span", harmless(run.slice(0, -300)), "given");
      canvas.append(head, element("span", harmless(run.slice(-300)), "given"));
    } else if (run) canvas.append(element("span", harmless(run), "given"));
    run = "";
  };
  sample.start.forEach((token, at) => {
    if (token >= 0 && !sample.happens[at].length) { run += tokens.text[token]; return; }
    flush();
    const span = element("span", undefined, "t");
    span.at = at;
    sample.spans[at] = span;
    sample.live.push(at);
    canvas.append(span);
  });
  flush();
  const whole = byId("whole");
  whole.hidden = !head;
  if (head) {
    head.hidden = true;
    whole.textContent = `Show the first ${head.textContent.length.toLocaleString("en")} characters of the prompt`;
    whole.onclick = () => { head.hidden = false; whole.hidden = true; };
  }
}

const look = at => {  // the class, the text and the color value of a position
  const event = stateAt(at), token = event ? event.token : sample.start[at];
  const shown = token >= 0 ? token : sample.finals[at];
  const text = shown < 0 ? "  " : isControl(shown) && sample.short[at] && shown === sample.finals[at] ? "·" : tokens.text[shown];
  let name = token < 0 ? "t mask" : event && event.step ? "t text" : "t given";
  if (event && token < 0) name += " taken";
  if (event && token >= 0 && event.step && event.step === step) name += " new";
  if (event && token >= 0 && event.again) name += " again";
  if (event && token >= 0 && event.sure < 0) name += " unknown";
  if (shown >= 0 && isControl(shown)) name += " control";
  if (at > sample.end && token >= 0) name += " after";
  const value = !event || token < 0 ? 0 : byId("color").value === "sure" ? event.sure / 10000 : event.step / sample.total;
  return [name, text, value];
};

function render() {
  let filled = 0, open = null;
  for (const at of sample.live) {
    const [name, text, value] = look(at), span = sample.spans[at], key = name + "|" + text + "|" + value;
    if (name.startsWith("t mask")) open ??= span; else if (sample.start[at] < 0) filled++;
    if (span.key === key) continue;
    span.key = key;
    span.className = name + (at === picked ? " picked" : "");
    span.style.setProperty("--at", value.toFixed(4));
    if (span.text !== text) fill(span, span.text = text);
  }
  slider.value = step;
  byId("at").textContent = `step ${step} of ${sample.total}`;
  byId("filled").textContent = `, ${filled} of ${sample.start.filter(one => one < 0).length} tokens`;
  slider.setAttribute("aria-valuetext", byId("where").textContent);
  byId("back").disabled = step === 0;
  byId("forward").disabled = step === sample.total;
  if (playing && follow && open) open.scrollIntoView({ block: "nearest" });
  if (!playing) canvas.setAttribute("aria-label", spoken());
  if (picked >= 0) showTip();
}

function spoken() {
  let text = "", masked = 0;
  const flush = () => { if (masked) text += ` [${masked} masked] `; masked = 0; };
  sample.start.forEach((given, at) => {
    const event = stateAt(at), token = event ? event.token : given;
    if (token < 0) { masked++; return; }
    flush();
    text += tokens.text[token];
  });
  flush();
  return `The text after step ${step}: ${text}`;
}

// --- what happened, in words ---
function words(at, event, plain) {
  if (event.token === TAKEN) return "taken back";
  const sure = event.sure < 0 ? (plain ? "" : ", filled in behind the end of the text") : `, ${percent(event.sure)}`;
  return `${named(event.token)}${sure}`;
}

function sayStep() {
  const at = sample.steps[step] || [];
  const said = at.slice(0, 6).map(one => `${words(one, stateAt(one), true)} at ${one + 1}`);
  byId("said").textContent = `step ${step} of ${sample.total}` + (said.length ? ": " + said.join("; ") : "") +
    (at.length > 6 ? `; and ${at.length - 6} more` : "");
}

function list() {
  const lines = document.createDocumentFragment(), kept = step;
  for (step = 1; step <= sample.total; step++) {
    const line = element("li");
    line.value = step;
    sample.steps[step].forEach((at, i) => {
      const event = stateAt(at);
      if (i) line.append("; ");
      line.append(event.token === TAKEN ? element("i", "taken back") : element("b", named(event.token)), ` at ${at + 1}`,
        event.sure >= 0 ? ` (${percent(event.sure)})` : "");
    });
    lines.append(line);
  }
  step = kept;
  byId("list").replaceChildren(lines);
}

// --- the token that is pointed at ---
function showTip() {
  const span = sample.spans[picked], event = stateAt(picked), token = event ? event.token : sample.start[picked];
  tip.replaceChildren();
  tip.append(element("b", token < 0 ? "masked" : named(token)), element("span", `  position ${picked + 1}`, "soft"));
  if (event) {
    const done = event.token === TAKEN ? `taken back in step ${event.step}` : event.sure < 0 ?
      `filled in in step ${event.step}: the text had ended` : `kept in step ${event.step} with ${percent(event.sure)}`;
    tip.append(element("div", done));
  }
  if (event && event.likely.length) {
    const table = element("table");
    const add = (one, sure, name) => {
      const row = element("tr", undefined, name);
      row.append(element("td", named(one)), element("td", percent(sure)));
      table.append(row);
    };
    const same = one => tokens.id[one] === tokens.id[token];
    for (const [one, sure] of event.likely) add(one, sure, same(one) ? "kept" : "");
    if (!event.likely.some(([one]) => same(one))) add(token, event.sure, "kept");
    tip.append(table);
  }
  const events = sample.happens[picked].filter(one => one.from === one.step && one.step <= step);
  if (events.length > 1) {
    tip.append(element("div", "at this position:", "soft"));
    for (const one of events) tip.append(element("div", `step ${one.step}: ${words(picked, one)}`));
  }
  tip.style.display = "block";
  const box = span.getClientRects()[0] || span.getBoundingClientRect(), bottom = byId("player").getBoundingClientRect().top;
  const below = box.bottom + 8 + tip.offsetHeight < bottom;
  tip.style.left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + scrollX + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)) + scrollY + "px";
}

function pick(at, pin) {
  if (picked >= 0) sample.spans[picked].classList.remove("picked");
  picked = at;
  pinned = at >= 0 && pin;
  tip.style.display = "none";
  if (at < 0) return;
  sample.spans[at].classList.add("picked");
  showTip();
}

const pointed = event => event.target.closest ? event.target.closest(".t") : null;
canvas.addEventListener("pointerover", event => {
  const span = pointed(event);
  if (span && !pinned && event.pointerType === "mouse") pick(span.at, false);
});
canvas.addEventListener("pointerout", event => { if (!pinned && event.pointerType === "mouse") pick(-1); });
document.addEventListener("click", event => {
  const span = pointed(event);
  if (span && canvas.contains(span)) pick(pinned && span.at === picked ? -1 : span.at, true);
  else if (!tip.contains(event.target) && !byId("player").contains(event.target)) pick(-1);
});
canvas.addEventListener("blur", () => pick(-1));
addEventListener("resize", () => { if (picked >= 0) showTip(); });

// --- going from step to step ---
function go(to, say) {
  step = Math.max(0, Math.min(sample.total, to));
  render();
  if (say) sayStep();
}

function pause() {
  if (playing) cancelAnimationFrame(playing.frame);
  playing = null;
  byId("play").textContent = "Play";
}

function play() {
  if (playing) { pause(); render(); return; }
  if (step === sample.total) step = 0;
  follow = true;
  playing = { last: performance.now(), debt: 0 };
  byId("play").textContent = "Pause";
  render();
  const tick = now => {
    if (!playing) return;
    playing.debt += Math.min(now - playing.last, 500) / 1000 * byId("speed").value;
    playing.last = now;
    const whole = Math.floor(playing.debt);
    playing.debt -= whole;
    if (step + whole >= sample.total) pause();
    if (whole) go(step + whole, !playing);
    if (playing) playing.frame = requestAnimationFrame(tick);
  };
  playing.frame = requestAnimationFrame(tick);
}

const by = count => { pause(); go(step + count, true); };
byId("play").onclick = play;
byId("back").onclick = () => by(-1);
byId("forward").onclick = () => by(1);
slider.oninput = () => { pause(); go(Number(slider.value), false); };
for (const name of ["wheel", "touchmove"]) addEventListener(name, () => { follow = false; }, { passive: true });

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const on = event.target, typed = on.tagName;
  if (event.key === "Escape") { pick(-1); return; }
  if (typed === "SELECT" || (typed === "INPUT" && event.key !== " ")) return;
  if ((typed === "BUTTON" || typed === "SUMMARY") && (event.key === " " || event.key === "Enter")) return;
  let action = { " ": play, ArrowLeft: () => by(-1), ArrowRight: () => by(1), Home: () => by(-sample.total),
    End: () => by(sample.total) }[event.key];
  if (on === canvas && sample.live.length) {
    const now = sample.live.indexOf(picked), last = sample.live.length - 1;
    const to = { ArrowLeft: Math.max(now - 1, 0), ArrowUp: Math.max(now - 1, 0), ArrowRight: Math.min(now + 1, last),
      ArrowDown: Math.min(now + 1, last), Home: 0, End: last }[event.key];
    if (to !== undefined) action = () => {
      sample.spans[sample.live[to]].scrollIntoView({ block: "nearest" });
      pick(sample.live[to], true);
      byId("said").textContent = tip.innerText;
    };
  }
  if (action) { event.preventDefault(); action(); }
});

// --- the words around, and the choice of the sample ---
function legend() {
  const mode = byId("color").value, box = byId("legend");
  box.replaceChildren();
  canvas.className = mode;
  const add = (name, text) => {
    const one = element("span"), swatch = element("span", name === "mask" || name === "mask taken" ? "  " : "abc", "t " + name);
    swatch.style.setProperty("--at", mode === "sure" ? "1" : "0.5");
    one.className = mode;
    one.append(swatch, text);
    box.append(one);
  };
  if (mode !== "plain") {
    const one = element("span"), ramp = element("span"), stops = [];
    for (let i = 0; i <= 6; i++) stops.push(mode === "step" ? `oklch(var(--tint) var(--chroma) ${300 - 215 * i / 6})` :
      `color-mix(in oklab, var(--doubt) ${100 - 95 * i / 6}%, transparent)`);
    ramp.id = "ramp";
    ramp.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    one.append(mode === "step" ? "kept in step 1" : "probability 0 %", ramp, mode === "step" ? `${sample.total}` : "100 %");
    box.append(one);
  }
  add("mask", "masked");
  add("text new", "new in this step");
  if (sample.again) { add("mask taken", "taken back"); add("text again", "changed before"); }
}

function facts() {
  const line = byId("settings");
  line.replaceChildren();
  Object.entries({ ...data.settings, ...sample.settings }).forEach(([name, value], i) => {
    line.append(i ? ", " : "", name + " ", element("b", value));
  });
  byId("finished").textContent = sample.completion;
}

function choose(number) {
  pause();
  pick(-1);
  sample = decode(data.samples[number]);
  step = 0;
  byId("sample").value = number;
  byId("previous").disabled = number === 0;
  byId("next").disabled = number === data.samples.length - 1;
  slider.max = sample.total;
  const fitting = SPEEDS.filter(speed => speed <= Math.max(sample.total / SECONDS, SPEEDS[0]));
  byId("speed").value = fitting[fitting.length - 1];
  facts();
  build();
  legend();
  if (byId("all").open) list();
  render();
}

data.samples.forEach((one, i) => {
  const said = harmless(one.prompt).replace(/\s+/g, " ").trim(), short = said.length > 60 ? said.slice(0, 60) + "…" : said;
  const option = element("option", `${i + 1} of ${data.samples.length}: ${short || "(no prompt)"}`);
  option.value = i;
  byId("sample").append(option);
});
for (const speed of SPEEDS) {
  const option = element("option", `${speed} step${speed === 1 ? "" : "s"}/s`);
  option.value = speed;
  byId("speed").append(option);
}
byId("samples").hidden = data.samples.length < 2;
byId("sample").onchange = () => choose(Number(byId("sample").value));
byId("previous").onclick = () => choose(Number(byId("sample").value) - 1);
byId("next").onclick = () => choose(Number(byId("sample").value) + 1);
byId("color").onchange = () => { legend(); render(); };
byId("all").ontoggle = () => { if (byId("all").open) list(); };

// #sample=2&step=12&color=sure opens the page at a moment; otherwise it begins to play.
const asked = new URLSearchParams(location.hash.slice(1));
if (["step", "sure", "plain"].includes(asked.get("color"))) byId("color").value = asked.get("color");
choose(Math.max(0, Math.min(data.samples.length, Number(asked.get("sample")) || 1) - 1));
if (asked.has("step")) go(Number(asked.get("step")) || 0);
else if (!calm) play();
