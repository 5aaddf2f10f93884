"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const panel = one("#panel");
  let lang = root.lang;

  // -- words ------------------------------------------------------------------------------------
  const lookup = (key) => data.words[lang][key] ?? data.words.en[key] ?? key;
  const say = (phrase) => {
    if (typeof phrase === "string") return lookup(phrase);
    const [key, places] = phrase;
    return lookup(key).replace(/\{(\w+)\}/g, (_, name) => {
      const value = places?.[name] ?? "";
      return Array.isArray(value) ? say(value) : value;
    });
  };
  const spoken = (phrase, tag = "span") => {
    const made = document.createElement(tag);
    if (Array.isArray(phrase)) {
      made.dataset.w = phrase[0];
      made.dataset.p = JSON.stringify(phrase[1] ?? {});
      made.textContent = say(phrase);
    } else made.textContent = phrase;
    return made;
  };
  const ATTRIBUTES = ["aria-label", "title", "placeholder", "alt", "data-label"];

  function speak(next) {
    lang = next;
    root.lang = next;
    for (const el of all("[data-w]")) {
      el.textContent = say([el.dataset.w, el.dataset.p ? JSON.parse(el.dataset.p) : {}]);
    }
    for (const name of ATTRIBUTES) {
      for (const el of all(`[data-w-${name}]`)) {
        el.setAttribute(name, say(JSON.parse(el.getAttribute(`data-w-${name}`))));
      }
    }
    for (const button of all("[data-lang]")) {
      button.setAttribute("aria-pressed", String(button.dataset.lang === next));
    }
    redraw();
  }
  for (const button of all("[data-lang]")) button.onclick = () => speak(button.dataset.lang);

  // -- light and dark ---------------------------------------------------------------------------
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  one("#theme").onclick = () => {
    root.dataset.theme = dark() ? "light" : "dark";
    redraw();
  };
  prefersDark.addEventListener("change", () => redraw());

  // -- explanations -----------------------------------------------------------------------------
  const tip = one("#tip");
  let tipped = null;
  function showTip(el, text) {
    tipped = el;
    tip.textContent = text;
    (panel.open ? panel : document.body).append(tip);  // a modal dialog lies above all else
    tip.hidden = false;
    const at = el.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const x = Math.max(8, Math.min(at.left, innerWidth - size.width - 8));
    const above = at.top - size.height - 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  }
  function hideTip() {
    tip.hidden = true;
    tipped = null;
  }
  const explained = (target) => target.closest?.("[data-term], .tokens i[data-k]");
  function explain(event) {
    const el = explained(event.target);
    if (!el) return hideTip();
    if (el.dataset.term) showTip(el, lookup(`term.${el.dataset.term}`));
    else showTip(el, `${el.textContent.trim()} · ${el.dataset.k} nats`);
  }
  for (const el of all("[data-term]")) {
    if (one(`#term-${CSS.escape(el.dataset.term)}`)) {
      el.setAttribute("aria-describedby", `term-${el.dataset.term}`);
    }
  }
  document.addEventListener("mouseover", explain);
  document.addEventListener("focusin", explain);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("click", explain);
  addEventListener("scroll", () => tipped && !tipped.closest(".tokens") && hideTip(), { passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

  // arrow keys walk through the tokens of a window
  for (const box of all(".tokens")) {
    let at = -1;
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      box.children[at]?.classList.remove("at");
      at = Math.max(0, Math.min(box.children.length - 1, at + step));
      const token = box.children[at];
      token.classList.add("at");
      token.scrollIntoView({ block: "nearest" });
      showTip(token, `${token.textContent.trim()} · ${token.dataset.k ?? "–"} nats`);
    });
    box.addEventListener("blur", () => box.children[at]?.classList.remove("at"));
  }

  // -- charts -----------------------------------------------------------------------------------
  const colour = (name) =>
    getComputedStyle(root).getPropertyValue(`--${name.replace("_", "-")}`).trim() || name;
  function filled(value) {
    if (Array.isArray(value)) return value.map(filled);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, filled(inner)]));
    }
    if (typeof value !== "string") return value;
    if (/^c:\w+$/.test(value)) return colour(value.slice(2));
    return value.includes("{w:") ? value.replace(/\{w:([^}]+)\}/g, (_, key) => lookup(key)) : value;
  }
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  function layoutOf(figure, wide) {
    const made = filled(figure.layout);
    const ink = colour("ink"), soft = colour("soft"), line = colour("line"), paper = colour("paper");
    const axis = (own = {}) => ({
      gridcolor: colour("grid"), zerolinecolor: line, linecolor: line, automargin: true,
      tickfont: { color: soft, size: 12 }, ...own,
      ...(own.title ? { title: { text: capital(own.title.text), font: { color: soft, size: 12.5 }, standoff: 8 } } : {}),
    });
    return {
      ...made,
      xaxis: axis(made.xaxis),
      yaxis: axis(made.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink },
      margin: figure.data[0].type === "treemap" ? { l: 0, r: 0, t: 0, b: 0 } : { l: 8, r: 8, t: 12, b: 8 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: soft, size: 12 } },
      hoverlabel: { bgcolor: ink, bordercolor: ink, font: { color: paper, size: 13 }, align: "left" },
      hovermode: made.hovermode ?? "closest",
      dragmode: wide ? "zoom" : false,
    };
  }
  // the colour at a share of a scale of three
  function between([[, low], [, middle], [, high]], share) {
    const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [from, to, t] = share < 0.5 ? [low, middle, 2 * share] : [middle, high, 2 * share - 1];
    const [a, b] = [parts(from), parts(to)];
    return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * t)).join(",")})`;
  }
  const drawn = new Map();
  function draw(el, figure) {
    if (!window.Plotly || !figure) return;
    const wide = el.clientWidth > 520;
    const layout = layoutOf(figure, wide);
    for (const [name, type] of Object.entries(drawn.get(el)?.types ?? {})) layout[name].type = type;
    const traces = filled(figure.data);
    traces.forEach((trace, number) => {
      if (figure.data[number].name?.startsWith("{w:")) trace.name = capital(trace.name);
      if (trace.type === "treemap") {
        // with a colour scale of its own plotly would paint the frame too
        const { colorscale, ...marker } = trace.marker;
        if (colorscale) marker.colors = marker.colors.map((share) => {
          if (share === null) return "rgba(0,0,0,0)";
          return share > 1.005 ? colour("grown") : between(colorscale, Math.min(1, share));
        });
        trace.marker = marker;
        trace.pathbar = { ...trace.pathbar, textfont: { color: colour("ink") } };
      }
    });
    drawn.set(el, { ...(drawn.get(el) ?? {}), figure });
    window.Plotly.react(el, traces, layout, {
      responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset+autosize",
    });
    if (el.dataset.chart?.startsWith("treemap")) listen(el);
  }
  function listen(el) {
    if (drawn.get(el).listening) return;
    drawn.get(el).listening = true;
    el.on("plotly_treemapclick", (event) => {
      const name = event.points[0].customdata;
      if (byName.has(name)) {
        openPanel(byName.get(name));
        return false;
      }
      return true;
    });
  }
  function redraw() {
    for (const [el, state] of drawn) if (el.isConnected) draw(el, state.figure);
  }
  const places = all(".chart[data-chart]");
  function drawPlace(el) {
    if (!drawn.has(el)) draw(el, data.figures[el.dataset.chart]);
  }

  // the trade-off curve: what is across, what is up, logarithms
  for (const box of all("[data-curve]")) {
    const chart = box.nextElementSibling;
    const pressed = (attribute) => one(`[${attribute}][aria-pressed="true"]`, box)?.getAttribute(attribute);
    const [firstCost, firstQuality] = chart.dataset.chart.slice(6).split("|");
    const show = () => {
      let key = `${pressed("data-cost") ?? firstCost}|${pressed("data-quality") ?? firstQuality}`;
      chart.dataset.chart = `curve:${key}`;
      const types = Object.fromEntries(
        all("[data-log]", box).map((b) => [b.dataset.log, b.getAttribute("aria-pressed") === "true" ? "log" : "linear"]),
      );
      drawn.set(chart, { ...(drawn.get(chart) ?? {}), types });
      draw(chart, data.figures[`curve:${key}`]);
    };
    choose(box, "data-cost", show);
    choose(box, "data-quality", show);
    for (const button of all("[data-log]", box)) {
      button.onclick = () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
        show();
      };
    }
  }
  for (const box of all("[data-treemap]")) {
    const chart = box.parentElement.nextElementSibling;
    choose(box, "data-side", (side) => {
      chart.dataset.chart = `treemap:${side}`;
      draw(chart, data.figures[chart.dataset.chart]);
    });
  }
  function choose(box, attribute, then) {
    const buttons = all(`[${attribute}]`, box);
    for (const button of buttons) {
      button.onclick = () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        then(button.getAttribute(attribute));
      };
    }
  }

  // -- the table of layers ----------------------------------------------------------------------
  const byName = new Map(data.panels.map((panel, number) => [panel.name, number]));
  const table = one("#layers");
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    for (const button of all("[data-sort]", table)) {
      button.onclick = () => {
        const head = button.closest("th");
        const column = head.cellIndex;
        const was = head.getAttribute("aria-sort");
        const numeric = !["name", "done"].includes(button.dataset.sort);
        // numbers from the largest on, as one looks for what is large; the order of layers is one of reading
        const first = numeric && button.dataset.sort !== "number" ? "descending" : "ascending";
        const next = was === first ? (first === "ascending" ? "descending" : "ascending") : first;
        for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const value = (row) => row.cells[column].dataset.v;
        const collator = new Intl.Collator(undefined, { numeric: true });
        const order = rows
          .map((row) => [row, numeric && value(row) !== "" ? Number(value(row)) : value(row)])
          .sort(([a, x], [b, y]) => {
            if (x === "" || y === "") return (x === "") - (y === "");
            const by = numeric ? x - y : collator.compare(x, y);
            return sign * by || a.dataset.number - b.dataset.number;
          });
        body.append(...order.map(([row]) => row));
      };
    }
    const search = one("#search"), found = one("#found");
    const more = one("#more");
    let short = table.classList.contains("short");
    if (more) {
      more.onclick = () => {
        short = false;
        table.classList.remove("short");
        more.remove();
      };
    }
    const look = () => {
      table.classList.toggle("short", short && !search.value);
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of rows) {
        const text = `${data.panels[row.dataset.number].name} ${row.textContent}`.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        count += !row.hidden;
      }
      found.replaceChildren(spoken(["map.count", { n: String(count), all: found.dataset.all }]));
    };
    search.addEventListener("input", look);
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row && !getSelection().toString()) openPanel(Number(row.dataset.number));
    });
  }
  for (const chip of all("button[data-layer]")) {
    if (byName.has(chip.dataset.layer)) chip.onclick = () => openPanel(byName.get(chip.dataset.layer));
    else chip.disabled = true;
  }

  // -- one layer --------------------------------------------------------------------------------
  let shown = 0;
  function openPanel(number) {
    shown = number;
    const layer = data.panels[number];
    if (!layer) return;
    hideTip();
    one("#panel-title").textContent = layer.name;
    const opens = !panel.open;
    one("#panel-facts").replaceChildren(
      ...layer.facts.map(([label, value]) => {
        const row = document.createElement("div");
        const dt = spoken([label, {}], "dt");
        const key = label.split(".")[1];
        if (data.words.en[`term.${key}`]) {
          dt.tabIndex = 0;
          dt.dataset.term = key;
          dt.classList.add("term");
        }
        row.append(dt, spoken(value, "dd"));
        return row;
      }),
    );
    const charts = one("#panel-charts");
    for (const el of all(".chart", charts)) {
      if (window.Plotly) window.Plotly.purge(el);
      drawn.delete(el);
    }
    charts.replaceChildren();
    const figures = Object.entries(layer.charts);
    for (const [kind, figure] of figures) {
      const chart = document.createElement("div");
      chart.className = "chart";
      chart.style.minHeight = `${figure.layout.height}px`;
      chart.setAttribute("role", "img");
      chart.setAttribute("aria-label", say(`panel.${kind}`));
      charts.append(spoken([`panel.${kind}`, {}], "h3"), chart, numbersOf(figure));
    }
    const axes = one("#panel-axes");
    axes.replaceChildren();
    for (const [key, names] of [["panel.writes", layer.writes], ["panel.reads", layer.reads]]) {
      if (!names.length) continue;
      const list = document.createElement("p");
      for (const name of names) {
        const chip = document.createElement("span");
        chip.className = "chip";
        chip.textContent = name;
        list.append(chip);
      }
      axes.append(spoken([key, {}], "h3"), list);
    }
    const order = visible();
    one("#panel-previous").disabled = order.indexOf(number) <= 0;
    one("#panel-next").disabled = order.indexOf(number) >= order.length - 1;
    if (opens) panel.showModal();
    if (opens) one("#panel-title").focus();
    panel.scrollTop = 0;
    all(".chart", charts).forEach((el, i) => draw(el, figures[i][1]));
  }
  function numbersOf(figure) {
    const box = document.createElement("details");
    box.className = "numbers";
    box.append(spoken(["page.numbers", {}], "summary"));
    box.addEventListener("toggle", () => {
      if (box.children.length > 1) return;
      for (const trace of filled(figure.data)) {
        const list = document.createElement("p");
        list.className = "small";
        list.textContent = `${trace.name}: ` + trace.x.map((x, i) => `${x}: ${trace.y[i]}`).join("; ");
        box.append(list);
      }
    });
    return box;
  }
  const visible = () =>
    table ? [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => Number(row.dataset.number)) : [];
  const move = (by) => {
    const order = visible();
    const next = order[order.indexOf(shown) + by];
    if (next !== undefined) openPanel(next);
  };
  one("#panel-close").onclick = () => panel.close();
  one("#panel-previous").onclick = () => move(-1);
  one("#panel-next").onclick = () => move(1);
  panel.addEventListener("click", (event) => event.target === panel && panel.close());
  panel.addEventListener("keydown", (event) => {
    if (event.target.closest("summary")) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  panel.addEventListener("close", () => {
    const row = table && one(`tr[data-number="${shown}"]`, table);
    if (row && !row.hidden) one(".open", row).focus({ preventScroll: true });
  });

  // -- copy, print ------------------------------------------------------------------------------
  for (const button of all("[data-copy]")) {
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(one(`#${button.dataset.copy}`).textContent);
        button.replaceChildren(spoken(["origin.copied", {}]));
      } catch {
        getSelection().selectAllChildren(one(`#${button.dataset.copy}`));
      }
    };
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    places.forEach(drawPlace);
    root.dataset.was = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    closed = all("details:not([open])");
    for (const el of closed) el.open = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    for (const el of closed) el.open = false;
    if (root.dataset.was) root.dataset.theme = root.dataset.was;
    else delete root.dataset.theme;
    redraw();
  });

  // -- plotly, packed at the end of the page ----------------------------------------------------
  async function unpack() {
    const packed = one("#plotly").textContent.trim();
    let bytes;
    if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(packed);
    else {
      const text = atob(packed);
      bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    }
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    script.remove();
    one("#plotly").remove();
    if (!window.Plotly) throw new Error("plotly did not start");
    // what is in sight first, the rest as it comes near
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          watch.unobserve(entry.target);
          drawPlace(entry.target);
        }
      }
    }, { rootMargin: "600px" });
    places.forEach((el) => watch.observe(el));
    root.dataset.ready = "charts";
    if (panel.open) openPanel(shown);
  }
  document.addEventListener("DOMContentLoaded", () => {
    root.dataset.ready = "page";
    unpack().catch((error) => {
      console.warn(`no charts: ${error.message}`);
      root.classList.add("no-charts");
      one("#no-charts").hidden = false;
      for (const el of all("details.numbers")) el.open = true;
    });
  });
})();
