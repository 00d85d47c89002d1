"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plan = data.plan;
const byId = (id) => document.getElementById(id);
const root = document.documentElement;
// one hue for each chunk; forwards are light, backwards full, gradients of weights dark
const HUES = [210, 30, 130, 290, 350, 175, 60, 250];
const WORDS = { F: "forward", B: "backward", I: "gradient of the input", W: "gradient of the weights" };
const ROW = 26;
const LARGEST = 16000;
let spots = [];

function isDark() {
  const theme = root.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function colour(kind, chunk) {
  const light = isDark() ? { F: 68, B: 46, I: 54, W: 32 } : { F: 78, B: 52, I: 62, W: 36 };
  const hue = HUES[chunk % HUES.length];
  return `hsl(${hue} 62% ${light[kind]}%)`;
}

function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(value * 1e3).toFixed(1)} ms` : `${(value * 1e6).toFixed(0)} µs`;
}

function draw() {
  const canvas = byId("canvas");
  const wide = byId("scroll").clientWidth * Number(byId("zoom").value);
  const ratio = devicePixelRatio || 1;
  const width = Math.max(50, Math.min(wide, LARGEST / ratio));
  const height = plan.ranks.length * ROW;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const scale = width / plan.seconds;
  const ink = isDark() ? "#0b0c0e" : "#1a1a1a";
  spots = [];
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  plan.ranks.forEach((slots, rank) => {
    for (const slot of slots) {
      const count = (slot.length - 2) / 3;
      const left = slot[0] * scale;
      const length = Math.max(0.4, (slot[1] - slot[0]) * scale);
      const high = (ROW - 4) / count;
      for (let part = 0; part < count; part += 1) {
        const [kind, chunk, batch] = slot.slice(2 + 3 * part, 5 + 3 * part);
        const top = rank * ROW + 2 + part * high;
        pen.fillStyle = colour(kind, chunk);
        pen.fillRect(left, top, length > 3 ? length - 0.7 : length, high);
        if (length > 18 && count === 1) {
          pen.fillStyle = kind === "W" ? "#ffffff" : ink;
          pen.fillText(String(batch), left + length / 2, top + high / 2 + 0.5);
        }
      }
      spots.push([rank, left, left + length, slot]);
    }
  });
}

function show(event) {
  const box = byId("canvas").getBoundingClientRect();
  const x = event.clientX - box.left;
  const rank = Math.floor((event.clientY - box.top) / ROW);
  const spot = spots.find((one) => one[0] === rank && one[1] <= x && x <= one[2]);
  const line = byId("shown");
  if (!spot) {
    line.textContent = `Rank ${rank} waits at ${seconds((x / box.width) * plan.seconds)}.`;
    return;
  }
  const slot = spot[3];
  const words = [];
  for (let at = 2; at < slot.length; at += 3) {
    words.push(`${WORDS[slot[at]]} of micro-batch ${slot[at + 2]}, chunk ${slot[at + 1]}`);
  }
  line.textContent = `Rank ${rank}, ${seconds(slot[0])} to ${seconds(slot[1])}: ${words.join(" beside ")}.`;
}

function table(id, head, rows) {
  const own = byId(id);
  const top = own.createTHead().insertRow();
  for (const text of head) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    top.append(cell);
  }
  const body = own.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const text of row) line.insertCell().textContent = text;
  }
}

function words() {
  document.title = data.title;
  byId("title").textContent = data.title;
  byId("about").textContent = data.about;
  byId("canvas").setAttribute("aria-label", `${data.title}: when each rank computes what`);
  const answers = [
    ["a step", seconds(data.step)],
    ["tokens/s for each GPU", Math.round(data.rate).toLocaleString("en")],
    ["tokens a day", `${(data.day / 1e9).toPrecision(4)} billion`],
    ["TFLOP/s for each GPU", data.tflops.toFixed(0)],
  ];
  for (const [name, value] of answers) {
    const box = document.createElement("div");
    const term = document.createElement("dt");
    const own = document.createElement("dd");
    term.textContent = name;
    own.textContent = value;
    box.append(term, own);
    byId("answers").append(box);
  }
  plan.ranks.forEach((_, rank) => {
    const name = document.createElement("div");
    name.textContent = rank;
    name.style.height = name.style.lineHeight = `${ROW}px`;
    byId("names").append(name);
  });
  const total = data.step;
  table("parts", ["part", "seconds", "share"], data.parts.map(([name, value]) =>
    [name, value.toFixed(3), `${((100 * value) / total).toFixed(1)}%`]));
  table("ranks", ["rank", "busy", "micro-batches at once", "memory, GB"], data.memory.map(([rank, bytes]) =>
    [rank, `${(100 * plan.busy[rank]).toFixed(1)}%`, plan.in_flight[rank], (bytes / 1e9).toFixed(1)]));
  for (const text of data.assumptions) {
    const item = document.createElement("li");
    item.textContent = `${text}.`;
    byId("assumptions").append(item);
  }
}

function legend() {
  const kinds = new Set(plan.ranks.flat().flatMap((slot) => slot.filter((_, at) => at >= 2 && at % 3 === 2)));
  const own = byId("legend");
  own.replaceChildren();
  for (let chunk = 0; chunk < plan.chunks; chunk += 1) {
    for (const kind of ["F", "B", "I", "W"].filter((one) => kinds.has(one))) {
      const item = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.style.background = colour(kind, chunk);
      item.append(swatch, `${WORDS[kind]}, chunk ${chunk}`);
      own.append(item);
    }
  }
}

function redraw() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  legend();
  draw();
}

byId("zoom").addEventListener("input", draw);
byId("canvas").addEventListener("pointermove", show);
byId("canvas").addEventListener("click", show);
byId("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  byId("theme").setAttribute("aria-pressed", String(isDark()));
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", draw);
words();
redraw();
root.dataset.drawn = String(performance.now());
