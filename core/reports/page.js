"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const paper = window.matchMedia("print");
  const PAPER = 960;
  const ABOVE = 32; // the height of the buttons
  const BELOW = 62; // under a plot: its numbers, the title of its axis, and a little more

  // ---- light and dark: as the system asks, until the button is pressed; paper is light ----

  let printing = false;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => !(paper.matches || printing) && (chosen === null ? system.matches : chosen === "dark");
  const LIGHT = { ink: "#1a1a1a", paper: "#ffffff", grid: "#dddddd", ends: [[0, 34, 78], [176, 120, 0]] };
  const DARK = { ink: "#e9e9e6", paper: "#16181c", grid: "#3a3e44", ends: [[120, 185, 245], [235, 190, 70]] };
  const look = () => (isDark() ? DARK : LIGHT);

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",");
  const onDark = new Map();
  for (const [from, to] of Object.entries(data.onDark)) {
    onDark.set(from, to);
    onDark.set(channels(from), channels(to));
  }

  // A copy of a trace whose colours are those of a dark page.
  const recoloured = (value, key) => {
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((item) => recoloured(item)) : value;
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recoloured(item, name)]));
    }
    if (typeof value !== "string" || !/color/.test(key || "")) return value;
    const faint = value.match(/^rgba\((\d+,\d+,\d+),(.*)\)$/);
    if (faint && onDark.has(faint[1])) return `rgba(${onDark.get(faint[1])},${faint[2]})`;
    return onDark.get(value) || value;
  };

  // ---- tables: sorted by a heading, filtered by a word ----

  const valueOf = (row, index) => {
    const raw = row.cells[index].dataset.value;
    if (raw === undefined) return null;
    const number = Number(raw);
    return raw.trim() === "" || Number.isNaN(number) ? raw : number;
  };

  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const sort = (table, index) => {
    const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    const order = heads[index].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[index].setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, index), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };

  for (const table of document.querySelectorAll(".sortable")) {
    const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    [...heads].forEach((head, index) => head.querySelector("button").addEventListener("click", () => sort(table, index)));
  }

  const hint = () => {
    for (const table of document.querySelectorAll(".sortable")) {
      const box = table.parentElement;
      byId(`${table.id}-hint`).hidden = box.scrollWidth <= box.clientWidth + 1;
    }
  };

  for (const box of document.querySelectorAll("[data-filter]")) {
    const rows = [...byId(box.dataset.filter).tBodies[0].rows];
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += row.hidden ? 0 : 1;
      }
      byId(`${box.dataset.filter}-count`).textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  }

  // ---- figures ----

  // Named one by one: among plotly's own choice is a button that sends a figure to a cloud.
  const BUTTONS = [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { displaylogo: false, responsive: false, modeBarButtons: BUTTONS };

  const axis = (own) => ({
    gridcolor: look().grid, linecolor: look().ink, tickcolor: look().ink, showline: true, ticks: "outside", zeroline: false,
    ...own, title: { standoff: 10, font: { size: 13 }, ...(own || {}).title },
  });

  const legendOf = (figure, width) => {
    const shown = figure.layout.showlegend === false ? [] : figure.traces.filter((trace) => trace.showlegend !== false);
    if (shown.length < 2) return { rows: 0, layout: { showlegend: false } };
    const longest = Math.max(...shown.map((trace) => trace.name.length));
    if (width >= 760) return { rows: 0, layout: { showlegend: true, legend: { x: 1.01, xanchor: "left", y: 1 } } };
    const across = Math.max(1, Math.floor((width - 40) / (longest * 7 + 55)));
    return { rows: Math.ceil(shown.length / across), layout: { showlegend: true } };
  };

  // Panels share both axes. They stand in as many columns as fit, and name an axis where it leaves the page.
  const panelsOf = (figure, width) => {
    const { xaxis, yaxis } = figure.layout;
    const columns = Math.min(figure.panels, width >= 1000 ? 3 : width >= 560 ? 2 : 1);
    const rows = Math.ceil(figure.panels / columns);
    const grid = { rows, columns, pattern: "independent", xgap: 0.05, ygap: 38 / figure.height };
    const axes = {};
    for (let i = 0; i < figure.panels; i += 1) {
      const number = i ? String(i + 1) : "";
      const [lowest, leftmost] = [i + columns >= figure.panels, i % columns === 0];
      const bare = (own, named) => axis({
        ...own, showticklabels: named, nticks: 5, zerolinecolor: look().ink, zerolinewidth: 1.5,
        title: named ? own.title : { text: "" },
      });
      axes[`xaxis${number}`] = { ...bare(xaxis, lowest), ...(i ? { matches: "x" } : {}) };
      axes[`yaxis${number}`] = { ...bare(yaxis, leftmost), ...(i ? { matches: "y" } : {}) };
    }
    return { height: rows * figure.height, layout: { grid, ...axes } };
  };

  const layoutOf = (figure, width) => {
    const legend = legendOf(figure, width);
    const below = BELOW + legend.rows * 20;
    const [side, above] = width >= 760 ? [16, ABOVE] : [8, figure.panels > 1 ? 24 : 10];
    const { xaxis, yaxis, ...rest } = figure.layout;
    const few = width >= 760 ? {} : { nticks: 4, tickangle: 0 }; // else long numbers are slanted into the legend
    const plots = figure.panels > 1
      ? panelsOf(figure, width)
      : { height: figure.height, layout: { xaxis: axis({ ...few, ...xaxis }), yaxis: axis(yaxis) } };
    const layout = {
      width, height: plots.height + above + below, font: { family: "inherit", size: 13, color: look().ink },
      paper_bgcolor: look().paper, plot_bgcolor: look().paper, hovermode: "closest", dragmode: width >= 760 ? "zoom" : false,
      hoverlabel: { bgcolor: look().paper, bordercolor: look().ink, font: { color: look().ink }, align: "left" },
      margin: { l: 76, r: side, t: above, b: below }, ...legend.layout, ...plots.layout, ...rest,
    };
    for (const shape of layout.shapes || []) shape.line = { ...shape.line, color: look().ink };
    if (legend.rows) {
      layout.legend = { orientation: "h", x: 0, xanchor: "left", y: -BELOW / figure.height, yanchor: "top" };
    }
    return layout;
  };

  // How high a legend is shows once it is drawn; with less margin plotly would make the plot smaller, and move the legend.
  const fitLegend = (plot) => {
    const legend = plot.querySelector(".legend");
    if (!legend || plot.layout.legend.orientation !== "h") return plot;
    const below = BELOW + Math.ceil(legend.getBoundingClientRect().height) + 12;
    const { height, margin } = plot.layout;
    return Plotly.relayout(plot, { height: height - margin.b + below, "margin.b": below });
  };

  const widthOf = (id) => (paper.matches || printing ? PAPER : Math.floor(byId(id).parentElement.clientWidth));
  const drawn = new Map();

  // ---- smoothing: s_i = sum_k w^k y_(i-k) / sum_k w^k, over the points of a curve ----

  const slider = byId("smoothing");
  const weight = () => (slider ? Number(slider.value) : 0);
  const FEWEST = 20; // points of a curve that is worth smoothing

  const average = (values, w) => {
    let sum = 0;
    let total = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      sum = w * sum + value;
      total = w * total + 1;
      return sum / total;
    });
  };

  const withAverage = (trace) => {
    const w = weight();
    if (!w || trace.fill || trace.type !== "scatter" || trace.x.length < FEWEST) return [trace];
    const raw = {
      ...trace, mode: "lines", opacity: 0.28, showlegend: false, hoverinfo: "skip", hovertemplate: null,
      line: { ...trace.line, width: 1, dash: "solid" },
    };
    return [raw, { ...trace, y: average(trace.y, w) }];
  };

  const draw = (figure, again = () => draw(figure)) => {
    drawn.set(figure.key, again);
    const id = `plot-${figure.key}`;
    const width = widthOf(id);
    const withButtons = { ...config, displayModeBar: width >= 760 ? "hover" : false };
    const smoothed = figure.smooth ? figure.traces.flatMap(withAverage) : figure.traces;
    const traces = isDark() ? smoothed.map((trace) => recoloured(trace)) : smoothed;
    return Plotly.react(id, traces, layoutOf(figure, width), withButtons).then(fitLegend);
  };

  const refit = () => {
    for (const again of [...drawn.values()]) again();
  };

  // ---- experts: load and biases of one run at one step ----

  const unpack = (packed) => {
    const text = atob(packed.data);
    const values = new Float64Array(text.length / 2);
    for (let i = 0; i < values.length; i += 1) {
      values[i] = packed.low + packed.step * (text.charCodeAt(2 * i) + 256 * text.charCodeAt(2 * i + 1));
    }
    return values;
  };

  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const experts = (runs) => {
    const [runs_, steps_, layers_] = ["run-choice", "step-choice", "layer-choice"].map(byId);
    const fill = (select, names) => select.replaceChildren(...names.map((name, i) => new Option(name, i)));
    let run, loads, biases;

    const choose = () => {
      run = runs[Number(runs_.value)];
      loads = run.layers.map((layer) => unpack(layer.load));
      biases = run.layers.map((layer) => layer.bias && unpack(layer.bias));
      steps_.max = run.steps.length - 1;
      steps_.value = run.steps.length - 1;
      const before = layers_.selectedOptions[0] && layers_.selectedOptions[0].text;
      fill(layers_, run.layers.map((layer) => layer.name));
      layers_.value = Math.max(0, run.layers.findIndex((layer) => layer.name === before));
      return Promise.all([showLoad(), showBias()]);
    };

    const showLoad = () => {
      const at = Number(steps_.value);
      const widest = Math.max(...run.layers.map((layer) => layer.experts));
      const rows = run.layers.map((layer, i) => [...loads[i].subarray(at * layer.experts, (at + 1) * layer.experts)]);
      const step = `step ${run.steps[at].toLocaleString("en")}`;
      byId("step-shown").textContent = step;
      steps_.setAttribute("aria-valuetext", step);
      byId("load-shown").textContent = `Shown: ${run.label}, ${step}.`;
      const ticks = [-2, -1, 0, 1, 2];
      const narrow = widthOf("plot-load") < 760;
      const named = (name) => escape(name).replace(/(\S{6,}?)\./g, narrow && name.length > 12 ? "$1.<br>" : "$1.");
      return draw({
        key: "load", height: Math.max(150, (narrow ? 44 : 30) * rows.length + (narrow ? 90 : 20)),
        traces: [{
          type: "heatmap", x: Array.from({ length: widest }, (_, i) => i), y: run.layers.map((layer) => named(layer.name)),
          z: rows.map((row) => row.map((v) => Math.max(-2, Math.min(2, Math.log2(Math.max(v, 1e-6)))))),
          customdata: rows, text: rows.map((row) => row.map((v) => (v === 0 ? "×" : ""))), texttemplate: "%{text}",
          textfont: { color: "#fff", size: 14 }, zmin: -2, zmax: 2, colorscale: "Cividis", xgap: 1, ygap: 1,
          colorbar: {
            tickvals: ticks, ticktext: ["≤ ¼", "½", "1", "2", "≥ 4"], thickness: 14,
            title: { text: "load / mean", side: narrow ? "bottom" : "right", font: { size: 13 } },
            ...(narrow ? { orientation: "h", y: 1, yanchor: "bottom" } : {}),
          },
          hovertemplate: "%{y}, expert %{x}: %{customdata:.3f} of the mean<extra></extra>",
        }],
        layout: {
          xaxis: { title: { text: "expert" }, showgrid: false, dtick: widest > 32 ? undefined : widest > 16 || narrow ? 4 : 1 },
          yaxis: { type: "category", autorange: "reversed", showgrid: false, automargin: true },
        },
      }, showLoad);
    };

    const showBias = () => {
      const index = Number(layers_.value);
      const [layer, values] = [run.layers[index], biases[index]];
      byId("plot-bias").hidden = !values;
      byId("bias-missing").hidden = Boolean(values);
      byId("bias-shown").textContent = `Shown: ${run.label}, ${layer.name}.`;
      if (!values) {
        drawn.delete("bias");
        byId("bias-missing").textContent = "No selection bias is recorded for this layer: its balancing has none, or it is not balanced.";
        return Promise.resolve();
      }
      const ends = Array.from({ length: layer.experts }, (_, e) => [values[(run.steps.length - 1) * layer.experts + e], e]);
      ends.sort((a, b) => b[0] - a[0]);
      const rank = new Map(ends.map(([, e], i) => [e, i]));
      const named = new Set([ends[0][1], ends[ends.length - 1][1]]);
      let [lowest, highest] = [Infinity, -Infinity];
      for (const value of values) [lowest, highest] = [Math.min(lowest, value), Math.max(highest, value)];
      if (lowest === highest) [lowest, highest] = [lowest - 1, highest + 1];
      // A name stands outside of the part of its line that it is next to.
      const nameOf = (e, isHighest) => {
        const line = run.steps.map((_, s) => values[s * layer.experts + e]).slice(Math.floor(0.6 * run.steps.length));
        return {
          x: run.steps[run.steps.length - 1], y: isHighest ? Math.max(...line) : Math.min(...line), xanchor: "right",
          yanchor: isHighest ? "bottom" : "top", showarrow: false, text: `expert ${e}`, bgcolor: look().paper, opacity: 0.9,
        };
      };
      const dashes = ["solid", "dash", "dot", "dashdot"];
      return draw({
        key: "bias", height: 330,
        traces: Array.from({ length: layer.experts }, (_, e) => ({
          type: "scatter", mode: "lines", showlegend: false, name: `expert ${e}`,
          x: run.steps, y: run.steps.map((_, s) => values[s * layer.experts + e]),
          line: { width: named.has(e) ? 2.4 : 1.3, dash: dashes[rank.get(e) % 4], color: shade(rank.get(e) / Math.max(1, layer.experts - 1)) },
          hovertemplate: "expert " + e + "<br>step %{x:,}: %{y:.4f}<extra></extra>",
        })),
        layout: {
          xaxis: { title: { text: "step" } },
          yaxis: { title: { text: "bias added for selection" }, range: [lowest - 0.12 * (highest - lowest), highest + 0.12 * (highest - lowest)] },
          annotations: [...named].map((e) => nameOf(e, rank.get(e) === 0)),
        },
      });
    };

    fill(runs_, runs.map((one) => one.label));
    runs_.addEventListener("change", choose);
    steps_.addEventListener("input", showLoad);
    layers_.addEventListener("change", showBias);
    return choose();
  };

  const shade = (at) => {
    const [from, to] = look().ends;
    return `rgb(${from.map((v, i) => Math.round(v + at * (to[i] - v))).join(",")})`;
  };

  // ---- drawing, screen sizes, paper ----

  const showWeight = () => {
    if (slider) byId("smoothing-shown").textContent = weight() ? `w = ${weight().toFixed(2)}, about ${Math.round(1 / (1 - weight()))} points` : "off";
  };

  let redraw = 0;
  if (slider) {
    slider.addEventListener("input", () => {
      showWeight();
      cancelAnimationFrame(redraw);
      redraw = requestAnimationFrame(() => {
        for (const figure of data.figures) if (figure.smooth) draw(figure);
      });
    });
  }

  const button = byId("theme");
  const showTheme = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Show the page light" : "Show the page dark");
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    showTheme();
    refit();
  });
  system.addEventListener("change", () => {
    showTheme();
    if (chosen === null) refit();
  });
  showTheme();

  const start = async () => {
    for (const figure of data.figures) {
      await draw(figure);
      await new Promise((go) => setTimeout(go));
    }
    if (data.experts.length) await experts(data.experts);
    showWeight();
    document.documentElement.dataset.drawn = String(Math.round(performance.now()));
  };

  // A wide table is two tables on paper; copies, so that they are sorted and filtered as the table on the screen is.
  const half = (table, isKept) => {
    const copy = table.cloneNode(true);
    copy.removeAttribute("id");
    copy.className = "half";
    for (const row of copy.rows) {
      let at = 0;
      for (const cell of [...row.cells]) {
        if (!isKept(at)) cell.remove();
        at += cell.colSpan;
      }
    }
    return copy;
  };

  const halve = (on) => {
    for (const copy of document.querySelectorAll(".half")) copy.remove();
    for (const table of document.querySelectorAll("[data-cut]")) {
      const cut = Number(table.dataset.cut);
      if (on) table.after(half(table, (at) => at < cut), half(table, (at) => at === 0 || at >= cut));
      table.hidden = on;
    }
  };

  let opened = [];
  const toPaper = (on) => {
    if (on === printing) return;
    printing = on;
    if (on) {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const one of opened) one.open = true;
    } else {
      for (const one of opened) one.open = false;
    }
    halve(on);
    refit();
  };
  window.addEventListener("beforeprint", () => toPaper(true));
  window.addEventListener("afterprint", () => toPaper(false));
  paper.addEventListener("change", (event) => toPaper(event.matches));

  let width = window.innerWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width || printing) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => { hint(); refit(); }, 120);
  });

  hint();
  start();
})();
