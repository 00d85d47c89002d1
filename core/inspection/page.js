"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const shown = { document: data, layer: 0, expert: null, only: false };

  const unpacked = (layer, [load, by_source, [entropy_bits, divergence_bits, chance_bits], tokens, together, contexts]) => ({
    load, by_source, entropy_bits, divergence_bits, chance_bits,
    share: load / Math.max(1, layer.assignments),
    tokens: tokens.map(([text, z, count, share_of_token]) => ({ text, z, count, share_of_token })),
    together: together.map(([expert, count, expected]) => ({ expert, count, expected })),
    contexts: contexts.map(([before, token, after]) => ({ before, token, after })),
  });
  for (const one of data.beside ? [data, data.beside] : [data]) {
    for (const layer of one.layers) layer.experts = layer.experts.map((expert) => unpacked(layer, expert));
  }

  const make = (tag, text = "", name = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`;
  const whole = (value) => value.toLocaleString("en");
  const hue = (expert) => `oklch(var(--text-light) 0.1 ${((expert * 137.508) % 360).toFixed(1)})`;
  const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
  const label = (path) => {
    const block = path.match(/^blocks\.(\d+)$/);
    if (block) return `layer ${block[1]}`;
    const head = path.match(/^heads\.([^.]+)\.depths\.(\d+)\.block$/);
    return head ? `${head[1]} ${Number(head[2]) + 1}` : path;
  };
  const extra = (expert) => Math.max(0, expert.divergence_bits - expert.chance_bits);

  // ---- the map: background is load over the even share, the dot is specialisation ----

  const STOPS = [[47, 111, 179], [169, 198, 227], [239, 233, 223], [240, 178, 122], [198, 82, 26]];
  const loadColour = (ratio) => {
    if (!(ratio > 0)) return "var(--none)";
    const place = 2 + Math.max(-2, Math.min(2, Math.log2(ratio)));
    const low = Math.min(3, Math.floor(place));
    const mix = STOPS[low].map((a, i) => Math.round(a + (STOPS[low + 1][i] - a) * (place - low)));
    return `rgb(${mix.join(" ")})`;
  };

  const drawMap = () => {
    const layers = shown.document.layers;
    const map = byId("map");
    map.replaceChildren();
    const most = Math.max(...layers.map((layer) => layer.experts.length));
    const largest = Math.max(0.5, ...layers.flatMap((layer) => layer.experts.map(extra)));
    map.style.setProperty("--experts", most);
    map.style.setProperty("--cell", most > 128 ? "12px" : most > 32 ? "20px" : "30px");
    const numbers = make("div", "", "row numbers");
    numbers.append(make("span", "expert"));
    for (let e = 0; e < most; e++) numbers.append(make("i", most <= 32 || e % 8 === 0 ? String(e) : ""));
    map.append(numbers);
    layers.forEach((layer, index) => {
      const row = make("div", "", "row");
      const name = make("span", label(layer.path));
      name.append(make("small", `max ${layer.max_over_mean.toFixed(2)}×`));
      row.append(name);
      layer.experts.forEach((expert, e) => {
        const ratio = expert.share * layer.experts.length;
        const cell = make("button", "", "cell");
        cell.style.background = loadColour(ratio);
        const dot = document.createElement("i");
        const size = 2 + (most > 32 ? 12 : 20) * Math.sqrt(extra(expert) / largest);
        dot.style.width = dot.style.height = `${expert.load ? size.toFixed(1) : 0}px`;
        cell.append(dot);
        cell.title = `${label(layer.path)}, expert ${e}: ${ratio.toFixed(2)}× the even share, ${extra(expert).toFixed(2)} bits`;
        cell.setAttribute("aria-label", cell.title);
        cell.setAttribute("aria-pressed", String(index === shown.layer && e === shown.expert));
        cell.dataset.layer = index;
        cell.dataset.expert = e;
        row.append(cell);
      });
      map.append(row);
    });
  };

  byId("map").addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) choose(Number(cell.dataset.layer), Number(cell.dataset.expert));
  });

  // ---- the text ----

  const drawText = () => {
    const layer = shown.document.layers[shown.layer];
    const { tokens, first } = shown.document.reading;
    const firsts = first[layer.path];
    const text = byId("text");
    text.replaceChildren();
    const parts = document.createDocumentFragment();
    tokens.forEach((token, index) => {
      const span = make("span", token);
      const expert = firsts[index];
      if (expert >= 0) {
        span.style.background = hue(expert);
        span.dataset.expert = expert;
        span.title = `expert ${expert}`;
      }
      parts.append(span);
    });
    text.append(parts);
    mark();
  };

  const mark = () => {
    byId("text").classList.toggle("one", shown.only);
    byId("all").hidden = !shown.only;
    for (const span of byId("text").children) span.classList.toggle("own", Number(span.dataset.expert) === shown.expert);
    for (const cell of byId("map").querySelectorAll(".cell")) {
      cell.setAttribute("aria-pressed", String(Number(cell.dataset.layer) === shown.layer && Number(cell.dataset.expert) === shown.expert));
    }
  };

  byId("text").addEventListener("click", (event) => {
    const expert = event.target.dataset.expert;
    if (expert !== undefined) choose(shown.layer, Number(expert));
  });
  byId("all").addEventListener("click", () => { shown.only = false; mark(); });
  byId("layer").addEventListener("change", (event) => choose(Number(event.target.value), shown.expert, shown.only));

  // ---- one expert ----

  const bar = (share, colour = "") => {
    const cell = make("td", "", "wide");
    const line = make("span", "", "bar");
    line.style.width = `${Math.min(100, 100 * share).toFixed(1)}%`;
    if (colour) line.style.background = colour;
    cell.append(line);
    return cell;
  };
  const table = (heads, rows) => {
    const made = document.createElement("table");
    const head = made.createTHead().insertRow();
    for (const title of heads) head.append(make("th", title.replace("#", ""), title.startsWith("#") ? "n" : ""));
    const body = made.createTBody();
    for (const cells of rows) body.insertRow().append(...cells);
    return made;
  };
  const coded = (text) => { const cell = make("td"); cell.append(make("code", text)); return cell; };
  const number = (text) => make("td", text, "n");

  const drawExpert = () => {
    const layer = shown.document.layers[shown.layer];
    const box = byId("expert");
    box.replaceChildren();
    if (shown.expert === null || !layer.experts[shown.expert]) return;
    const expert = layer.experts[shown.expert];
    box.append(make("h2", `${label(layer.path)}, expert ${shown.expert}`));
    const facts = make("div", "", "facts");
    for (const [value, name] of [
      [percent(expert.share), `of the load (even: ${percent(1 / layer.experts.length)})`],
      [whole(expert.load), "assignments"],
      [`${extra(expert).toFixed(2)} bits`, `specialised (${expert.divergence_bits.toFixed(2)} − ${expert.chance_bits.toFixed(2)} of chance)`],
      [`${expert.entropy_bits.toFixed(1)} bits`, `entropy of its tokens (layer: ${layer.token_entropy_bits.toFixed(1)})`],
    ]) {
      const fact = make("div");
      fact.append(make("b", value), make("small", name));
      facts.append(fact);
    }
    box.append(facts, make("h3", "Most characteristic tokens"));
    if (expert.tokens.length) {
      box.append(table(["token", "#z", "#count", "share of the token's assignments"], expert.tokens.map((token) =>
        [coded(visible(token.text)), number(token.z.toFixed(1)), number(whole(token.count)), bar(token.share_of_token, hueStrong(shown.expert))])));
    } else box.append(make("p", "None: too few assignments.", "note"));
    if (expert.contexts.length) {
      box.append(make("h3", "Where it is first"));
      const places = make("div", "", "places");
      for (const place of expert.contexts) {
        const line = make("p", place.before.replaceAll("\n", "⏎"));
        const token = make("mark", visible(place.token));
        token.style.background = hue(shown.expert);
        line.append(token, place.after.replaceAll("\n", "⏎"));
        places.append(line);
      }
      box.append(places);
    }
    drawTogether(box, layer, expert);
    const sources = shown.document.text.sources;
    if (sources.length > 1) {
      box.append(make("h3", "Load by source"));
      box.append(table(["source", "#of its load", "#of the layer's"], sources.map((name, s) =>
        [make("td", name), number(percent(expert.by_source[s] / Math.max(1, expert.load))), number(percent(layer.by_source[s] / Math.max(1, layer.assignments)))])));
    }
  };
  const hueStrong = (expert) => `oklch(0.62 0.15 ${((expert * 137.508) % 360).toFixed(1)})`;

  const drawTogether = (box, layer, expert) => {
    if (!expert.together.length) return;
    box.append(make("h3", "Together with, against independence"));
    box.append(table(["expert", "#tokens", "#expected", "#ratio"], expert.together.map((pair) => {
      const link = make("button", String(pair.expert));
      link.addEventListener("click", () => choose(shown.layer, pair.expert));
      const cell = make("td");
      cell.append(link);
      return [cell, number(whole(pair.count)), number(pair.expected.toFixed(0)), number(`${(pair.count / pair.expected).toFixed(2)}×`)];
    })));
  };

  const choose = (layer, expert, only = true) => {
    const other = layer !== shown.layer;
    shown.only = only;
    shown.layer = layer;
    shown.expert = expert;
    byId("layer").value = String(layer);
    if (other) drawText(); else mark();
    drawExpert();
  };

  // ---- two checkpoints, attention, words ----

  const drawMoved = () => {
    if (!data.moved) return;
    byId("moved-section").hidden = false;
    if (!data.moved.length) { byId("moved").textContent = "The two have no layer with equally many experts in common."; return; }
    const rows = data.moved.map((layer) => {
      const words = layer.left.map(([expert, count, to]) => `${expert}: ${whole(count)} left, most to ${to}`);
      return [make("td", label(layer.path)), number(percent(layer.stayed / Math.max(1, layer.first))), bar(layer.stayed / Math.max(1, layer.first)), make("td", words.join("; ") || "none")];
    });
    byId("moved").append(table(["layer", "#stayed", "", "experts that tokens left most"], rows));
  };

  const drawAttention = () => {
    const rows = shown.document.attention.filter((one) => one.max_logit);
    byId("attention-section").hidden = !rows.length;
    if (!rows.length) return;
    const heads = Math.max(...rows.map((one) => one.max_logit.length));
    const largest = Math.max(...rows.flatMap((one) => one.max_logit));
    const made = table(["", ...Array.from({ length: heads }, (_, h) => `#head ${h}`), "#key-value latent", "#query latent"], rows.map((one) => {
      const cells = [make("td", label(one.path))];
      for (const value of one.max_logit) {
        const cell = number(value.toFixed(1));
        cell.style.background = `color-mix(in srgb, #c6521a ${(60 * Math.max(0, value) / Math.max(largest, 1e-9)).toFixed(0)}%, transparent)`;
        cells.push(cell);
      }
      for (const name of ["key_value", "query"]) cells.push(number(one.latent_rms[name] === undefined ? "–" : `rms ${one.latent_rms[name].toFixed(2)}`));
      return cells;
    }));
    byId("attention").replaceChildren(made);
  };

  const MEANINGS = [
    ["Load", "assignments of valid tokens to the expert, before any drop: exact integers, as the run's own metrics count them."],
    ["Characteristic tokens", `${data.statistic}: the expert against the layer's other experts. A token needs at least 3 assignments.`],
    ["Specialised", "Kullback-Leibler divergence of the expert's tokens from the layer's, less that of as many tokens drawn at random from the layer's."],
    ["First expert", "the chosen expert with the largest gate."],
    ["Together", "tokens that both experts received. Expected: the product of their loads, scaled to the layer's number of pairs."],
    ["Largest logit", "the largest scaled attention logit before the softmax, over all tokens read; rms: root mean square of a latent."],
  ];

  const drawAll = () => {
    const one = shown.document;
    byId("about").textContent = `${one.run}, ${one.checkpoint}; read: ${one.text.name}, ${whole(one.text.tokens)} tokens` +
      (one.text.sources.length > 1 ? ` from ${one.text.sources.length} sources` : "");
    const none = !one.layers.length;
    byId("dense").hidden = !none;
    byId("map-section").hidden = byId("below").hidden = none;
    drawAttention();
    if (none) return;
    if (shown.layer >= one.layers.length) shown.layer = 0;
    byId("layer").replaceChildren(...one.layers.map((layer, index) => new Option(label(layer.path), index)));
    byId("layer").value = String(shown.layer);
    drawMap();
    drawText();
    drawExpert();
  };

  if (data.beside) {
    const row = byId("checkpoints");
    row.hidden = false;
    [data, data.beside].forEach((one, index) => {
      const button = make("button", `${one.run}, ${one.checkpoint}`);
      button.setAttribute("aria-pressed", String(index === 0));
      button.addEventListener("click", () => {
        for (const each of row.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button));
        shown.document = one;
        drawAll();
      });
      row.append(button);
    });
  }
  for (const [name, meaning] of MEANINGS) byId("meanings").append(make("dt", name), make("dd", meaning));
  if (data.layers.length) {
    const experts = data.layers[0].experts;
    shown.expert = experts.indexOf(experts.reduce((a, b) => (extra(b) > extra(a) ? b : a)));
  }
  drawAll();
  drawMoved();
  document.documentElement.dataset.drawn = "1";
})();
