"use strict";
// Everything here adds to a page that can be read without it: the theme, the crosshair, the map's card, the search, the copy button.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const add = (parent, tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

  // ── Theme: the system's until the reader chooses ──
  const root = document.documentElement, theme = one("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameTheme = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  // A file opened from a disk or inside a frame may have no storage: then the choice lasts as long as the page.
  const stored = (use) => { try { return use(localStorage); } catch { return null; } };
  const chosen = stored((s) => s.getItem("theme"));
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  theme.hidden = false;
  theme.onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored((s) => s.setItem("theme", root.dataset.theme));
    nameTheme();
  };
  system.addEventListener("change", nameTheme);
  nameTheme();

  // ── Curves: one crosshair at the same step in all of them ──
  const plots = all(".plot").map((element) => {
    const rows = data.curves[Number(element.dataset.curve)];
    const hair = add(element, "i", "hair"), bead = add(element, "i", "bead");
    hair.hidden = bead.hidden = true;
    const output = one("output", element.parentElement);
    element.tabIndex = 0;
    element.setAttribute("role", "slider");
    element.setAttribute("aria-description", element.getAttribute("aria-label"));
    element.setAttribute("aria-label", one("b", element.parentElement).textContent);
    element.setAttribute("aria-valuemin", rows[0][2]);
    element.setAttribute("aria-valuemax", rows.at(-1)[2]);
    return { element, rows, hair, bead, output, index: rows.length - 1 };
  });
  const nearest = (rows, x) => {
    let low = 0, high = rows.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (rows[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(rows[low][0] - x) <= Math.abs(rows[high][0] - x) ? low : high;
  };
  const read = (plot, row) => {
    const [, , step, epoch, value] = row, at = `step ${step.toLocaleString("en")}${epoch === null ? "" : `, epoch ${epoch.toFixed(1)}`}`;
    plot.output.textContent = value;
    add(plot.output, "small", "", at);
    plot.element.setAttribute("aria-valuenow", step);
    plot.element.setAttribute("aria-valuetext", `${value}, ${at}`);
  };
  const mark = (plot) => {
    const row = plot.rows[plot.index];
    read(plot, row);
    plot.hair.hidden = plot.bead.hidden = false;
    plot.hair.style.left = plot.bead.style.left = `${row[0] / 10}%`;
    plot.bead.style.top = `${row[1] / 10}%`;
  };
  const markAll = (x) => plots.forEach((plot) => { plot.index = nearest(plot.rows, x); mark(plot); });
  const clear = () => plots.forEach((plot) => {
    plot.hair.hidden = plot.bead.hidden = true;
    read(plot, plot.rows.at(-1));
  });
  plots.forEach((plot) => {
    const { element, rows } = plot;
    read(plot, rows.at(-1));
    const follow = (event) => {
      const box = element.getBoundingClientRect();
      markAll((1000 * (event.clientX - box.left)) / box.width);
    };
    element.onpointermove = follow;
    element.onpointerdown = follow;
    element.onpointerleave = (event) => { if (event.pointerType === "mouse" && document.activeElement !== element) clear(); };
    element.onblur = clear;
    element.onkeydown = (event) => {
      const page = Math.max(1, Math.round(rows.length / 10));
      const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page, Home: -rows.length, End: rows.length };
      if (event.key === "Escape") clear();
      if (!(event.key in moves)) return;
      event.preventDefault();
      const index = clamp(plot.index + moves[event.key], 0, rows.length - 1);
      markAll(rows[index][0]);
      plot.index = index;
      mark(plot);
    };
  });

  // ── The map ──
  const plane = one(".plane");
  if (plane) {
    const { at, labels, predicted, names, crisp } = data.map;
    const svg = one("svg", plane), circles = all("circle:not(.ring)", svg), card = one(".card", plane), sheet = one("#sheet");
    const canvas = one("canvas", card), text = one("p", card), live = one(".map .sr");
    const name = (label) => names[label] ?? "unlabelled";
    const wrong = labels.map((label, i) => label >= 0 && predicted[i] !== label);
    const buttons = all("[data-class]", one(".map")).filter((b) => b.tagName === "BUTTON");
    const everything = one("[data-all]"), onlyWrong = one("[data-wrong]");
    const off = new Set();
    let here = -1;
    const shown = (i) => !off.has(labels[i]) && !(onlyWrong?.ariaPressed === "true" && !wrong[i]);

    const leave = () => {
      circles[here]?.classList.remove("here");
      here = -1;
      card.hidden = true;
    };
    const paint = () => {
      leave();
      circles.forEach((circle, i) => circle.classList.toggle("off", !shown(i)));
      all(".names span", plane).forEach((span) => span.classList.toggle("off", off.has(Number(span.dataset.class))));
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(!off.has(Number(button.dataset.class)))));
      everything?.setAttribute("aria-pressed", String(off.size === 0));
    };
    const dim = (label) => circles.forEach((circle, i) => circle.classList.toggle("dim", label !== null && labels[i] !== label));
    buttons.forEach((button) => {
      const label = Number(button.dataset.class);
      button.onclick = () => { if (!off.delete(label)) off.add(label); paint(); };
      button.onpointerenter = button.onfocus = () => dim(label);
      button.onpointerleave = button.onblur = () => dim(null);
    });
    if (everything) {
      everything.onclick = () => {
        if (off.size) off.clear(); else labels.forEach((label) => off.add(label));
        paint();
      };
      onlyWrong.onclick = () => { onlyWrong.ariaPressed = String(onlyWrong.ariaPressed !== "true"); paint(); };
    }

    const show = (i) => {
      if (i === here) return;
      leave();
      here = i;
      circles[i].classList.add("here");
      const columns = Math.ceil(Math.sqrt(at.length)), w = sheet.naturalWidth / columns;
      const h = sheet.naturalHeight / Math.ceil(at.length / columns);
      // The sheet is a data: URI, but a browser may decode it late; a card without its picture still tells the classes.
      if (w > 0) {
        canvas.width = w;
        canvas.height = h;
        canvas.getContext("2d").drawImage(sheet, (i % columns) * w, Math.floor(i / columns) * h, w, h, 0, 0, w, h);
        const zoom = Math.max(1, Math.round(80 / Math.max(w, h)));
        canvas.style.width = `${w * zoom}px`;
        canvas.classList.toggle("crisp", crisp);
      }
      text.replaceChildren();
      let spoken = `Test image ${i + 1}`;
      if (labels[i] >= 0) {
        add(text, "b", "", name(labels[i]));
        add(text, "br");
        add(text, "span", wrong[i] ? "cross" : "tick", wrong[i] ? "✗ " : "✓ ");
        text.append(`kNN: ${name(predicted[i])}`);
        spoken = `${name(labels[i])}, kNN says ${name(predicted[i])}, ${wrong[i] ? "wrong" : "right"}`;
      } else text.textContent = spoken;
      live.textContent = spoken;
      card.hidden = false;
      const scale = plane.clientWidth / svg.viewBox.baseVal.width, [x, y] = [at[i][0] * scale, at[i][1] * scale];
      const gap = 16, { offsetWidth: width, offsetHeight: height } = card;
      const left = x + gap + width < plane.clientWidth ? x + gap : x - gap - width;
      card.style.left = `${clamp(left, 4, Math.max(4, plane.clientWidth - width - 4))}px`;
      card.style.top = `${clamp(y - height - gap, 4, plane.clientHeight - height - 4)}px`;
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
      const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
      let best = -1, distance = ((event.pointerType === "mouse" ? 18 : 28) / scale) ** 2;
      at.forEach(([px, py], i) => {
        const d = (px - x) ** 2 + (py - y) ** 2;
        if (d < distance && shown(i)) { best = i; distance = d; }
      });
      if (best < 0) leave(); else show(best);
    };
    plane.onpointermove = point;
    plane.onpointerdown = point;
    plane.onpointerleave = (event) => { if (event.pointerType === "mouse") leave(); };
    plane.tabIndex = 0;
    plane.setAttribute("role", "application");
    plane.setAttribute("aria-roledescription", "map");
    plane.setAttribute("aria-label", `${plane.getAttribute("aria-label")}. Arrow keys walk from point to point.`);
    plane.onblur = leave;
    plane.onkeydown = (event) => {
      if (event.key === "Escape") leave();
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!way) return;
      event.preventDefault();
      // The nearest point ahead; what lies to the side counts as three times as far.
      const from = here < 0 ? [svg.viewBox.baseVal.width / 2, svg.viewBox.baseVal.height / 2] : at[here];
      let best = -1, cost = Infinity;
      at.forEach(([x, y], i) => {
        const ahead = (x - from[0]) * way[0] + (y - from[1]) * way[1], aside = Math.abs((x - from[0]) * way[1]) + Math.abs((y - from[1]) * way[0]);
        if (i !== here && ahead > 0 && shown(i) && ahead + 3 * aside < cost) { best = i; cost = ahead + 3 * aside; }
      });
      if (best >= 0) show(best);
    };
  }

  // ── Config and command ──
  const search = one("#search");
  if (search) {
    search.parentElement.hidden = false;
    const rows = all(".config tr"), output = one("output", search.parentElement);
    search.oninput = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => {
        const content = `${row.dataset.key} ${row.cells[1].textContent}`.toLowerCase();
        row.hidden = !words.every((word) => content.includes(word));
      });
      all(".config details").forEach((group) => {
        const found = all("tr", group).some((row) => !row.hidden);
        group.hidden = !found;
        if (words.length && found) group.open = true;
      });
      output.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
    };
  }
  addEventListener("beforeprint", () => all("details").forEach((group) => { group.open = true; }));

  const copy = one("#copy");
  if (copy) {
    copy.hidden = false;
    copy.onclick = async () => {
      const code = one("#command");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    };
  }
})();
