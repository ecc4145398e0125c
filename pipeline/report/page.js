"use strict";
/* Plots in the page's colours, and the token viewer. All text of a corpus is put in as text, never as markup. */
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  // Plots come with placeholders for colours: light and dark are the page's variables.
  const plots = read("plots-data");
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    let text = JSON.stringify(plots.items);
    for (const [placeholder, variable] of Object.entries(plots.colours)) {
      text = text.replaceAll(placeholder, style.getPropertyValue(variable).trim());
    }
    for (const item of JSON.parse(text)) {
      const place = document.getElementById(item.target_id);
      place.replaceChildren();
      Bokeh.embed.embed_item(item);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // The token viewer.
  const groups = read("tokens-data");
  const box = document.getElementById("viewer");
  if (!box || !groups.length) return;
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
  const percent = (p) => (p === 0 ? "< 0.01 %" : (p / 100).toFixed(p < 100 ? 2 : 1) + " %");
  let group, page, rows, spans, current = -1, shade = "entropy";

  const choose = $("document");
  groups.forEach((g, i) => {
    const parent = groups.length > 1 ? choose.appendChild(Object.assign(make("optgroup"), { label: g.name })) : choose;
    g.documents.forEach((d, j) => {
      const part = d.shown < d.tokens ? `first ${d.shown.toLocaleString("en")} of ${d.tokens.toLocaleString("en")} tokens` : `${d.tokens.toLocaleString("en")} tokens`;
      const option = make("option", `${d.title} (${part})`);
      option.value = `${i}/${j}`;
      parent.append(option);
    });
  });
  choose.addEventListener("change", () => open(choose.value));

  function open(which) {
    const [i, j] = which.split("/").map(Number);
    const other = group !== groups[i];
    group = groups[i];
    page = group.documents[j];
    if (other) switches();
    const bare = new Set(page.bare);
    rows = [];
    let row = 0;
    page.ids.forEach((_, at) => rows.push(bare.has(at) ? -1 : row++));
    spans = page.ids.map((id, at) => {
      const span = make("span", group.texts[id]);
      span.dataset.at = at;
      span.id = `token-${at}`;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.tabIndex = -1;
      if (rows[at] < 0) span.classList.add("bare");
      return span;
    });
    $("text").replaceChildren(...spans);
    $("text").scrollTop = 0;
    paint();
    current = -1;
    select(Math.min(bare.has(0) ? 1 : 0, spans.length - 1), false);
  }

  function switches() {
    const places = [["entropy", "teacher's entropy"]];
    group.students.forEach((name, s) => {
      if (group.kl_of.includes(name)) places.push([String(s), `KL, teacher to ${name}`]);
    });
    if (!places.some(([value]) => value === shade)) shade = "entropy";
    $("shades").replaceChildren(...places.map(([value, words]) => {
      const label = make("label");
      const input = Object.assign(make("input"), { type: "radio", name: "shade", value, checked: value === shade });
      input.addEventListener("change", () => { shade = value; paint(); });
      label.append(input, " ", words);
      return label;
    }));
  }

  const values = () => (shade === "entropy" ? page.entropy : page.students[Number(shade)].kl) || [];

  function paint() {
    const found = values();
    const sorted = found.filter((v) => v !== null).sort((a, b) => a - b);
    const most = Math.max(0.1, sorted[Math.floor(sorted.length * 0.98)] || 0);
    spans.forEach((span, at) => {
      const value = rows[at] < 0 ? null : found[rows[at]];
      span.style.setProperty("--v", value === null || value === undefined ? 0 : Math.min(1, Math.max(0, value / most)).toFixed(3));
    });
    $("most").textContent = `${most.toFixed(1)} nats and more`;
  }

  function select(at, focus = true) {
    if (at < 0 || at >= spans.length) return;
    if (current >= 0 && spans[current]) {
      spans[current].tabIndex = -1;
      spans[current].setAttribute("aria-selected", "false");
    }
    current = at;
    spans[at].tabIndex = 0;
    spans[at].setAttribute("aria-selected", "true");
    if (focus) {
      spans[at].focus({ preventScroll: true });
      const text = $("text"), top = spans[at].offsetTop;
      if (top < text.scrollTop + 20) text.scrollTop = top - 40;
      else if (top + 40 > text.scrollTop + text.clientHeight) text.scrollTop = top - text.clientHeight + 80;
      // On a narrow page the panel lies over the lower end of the text: the token must not be under it.
      const here = spans[at].getBoundingClientRect(), over = $("panel").parentElement.getBoundingClientRect();
      if (here.top < 0 || here.bottom > innerHeight) spans[at].scrollIntoView({ block: "center", behavior: "instant" });
      else if (here.bottom > over.top && here.top < over.bottom && here.right > over.left && here.left < over.right) {
        scrollBy({ top: here.bottom - over.top + 24, behavior: "instant" });
      }
    }
    tell(at);
  }

  function tell(at) {
    const id = page.ids[at], row = rows[at], parts = [];
    // Said aloud: the token and the teacher's first guess. The tables below are there to be read.
    const said = [`Token ${at + 1} of ${spans.length}: `, make("code", visible(group.texts[id])), ` id ${id}`];
    if (row < 0) {
      parts.push(make("p", "The first token that was read: nothing predicted it.", "quiet"));
    } else {
      const entropy = page.entropy[row];
      const own = page.top[row] || [];
      if (own.length) said.push("; teacher's first ", make("code", visible(group.texts[own[0]])), ` ${percent(own[1])}`);
      parts.push(...model("Teacher", entropy === null ? "" : `entropy ${entropy.toFixed(2)} nats`, own, id, "var(--ink-2)"));
      page.students.forEach((student, s) => {
        const kl = student.kl ? `KL ${student.kl[row].toFixed(2)} nats` : "";
        parts.push(...model(group.students[s], kl, student.top[row], id, group.colours[s]));
      });
    }
    $("said").replaceChildren(...said);
    $("panel").replaceChildren(...parts);
    keepHeight();
  }

  // The panel grows and does not shrink while the page's width stays: one that shrank under the pointer could make the page
  // shorter, and so scroll the token away from under the pointer, which made it grow again: it flickered.
  let width = innerWidth;
  function keepHeight() {
    const panel = $("panel").parentElement;
    if (innerWidth !== width) panel.style.minHeight = "";
    width = innerWidth;
    panel.style.minHeight = `${Math.ceil(panel.getBoundingClientRect().height)}px`;
  }

  function model(name, number, top, id, colour) {
    const head = make("h3", number ? `${name}: ${number}` : name);
    const lines = [head];
    let among = false;
    for (let i = 0; i < top.length; i += 2) {
      const line = make("div", undefined, "row");
      const word = make("div"), bar = make("div"), fill = make("div", undefined, "bar");
      word.append(make("code", visible(group.texts[top[i]])));
      word.title = `id ${top[i]}`;
      fill.style.setProperty("--c", colour);
      fill.style.width = `${top[i + 1] / 100}%`;
      bar.append(fill);
      line.append(word, bar, make("div", percent(top[i + 1])));
      if (top[i] === id) { among = true; line.classList.add("right"); word.append(" read here"); }
      lines.push(line);
    }
    if (!top.length) lines.push(make("p", "nothing is stored here that tells ids", "quiet"));
    else if (!among) lines.push(make("p", `the token that was read is not among its first ${top.length / 2}`, "quiet"));
    return lines;
  }

  // Up and down go to the token nearest in the line above or below.
  function beside(at, step) {
    const here = spans[at].getClientRects()[0], middle = here.left + here.width / 2;
    let best = at, line = null, distance = Infinity;
    for (let i = at + step; i >= 0 && i < spans.length; i += step) {
      const r = spans[i].getClientRects()[0];
      if (!r || Math.abs(r.top - here.top) < 4) continue;
      if (line === null) line = r.top;
      if (Math.abs(r.top - line) > 4) break;
      const d = Math.abs(r.left + r.width / 2 - middle);
      if (d < distance) { distance = d; best = i; }
    }
    return best;
  }

  const text = $("text");
  const tokenOf = (event) => (event.target instanceof Element && event.target.dataset.at !== undefined ? Number(event.target.dataset.at) : -1);
  text.addEventListener("mouseover", (event) => { const at = tokenOf(event); if (at >= 0) tell(at); });
  text.addEventListener("mouseleave", () => tell(current));
  text.addEventListener("click", (event) => { const at = tokenOf(event); if (at >= 0) select(at); });
  text.addEventListener("focusin", (event) => { const at = tokenOf(event); if (at >= 0 && at !== current) select(at, false); });
  text.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = {
      ArrowRight: () => current + 1, ArrowLeft: () => current - 1, Home: () => 0, End: () => spans.length - 1,
      ArrowDown: () => beside(current, 1), ArrowUp: () => beside(current, -1),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    select(moves[event.key]());
  });
  addEventListener("resize", keepHeight);
  open("0/0");
})();
