// The list of the last traces.
import * as api from "./api.js";
import { ago, badge, fill, h, hue, ms, plural, serviceName } from "./dom.js";

const PAUSE_MS = 1000;
const TYPING_MS = 200;
const SHOW = [
  ["all", "All"],
  ["failed", "Failed"],
  ["slow", "Slow"],
  ["degraded", "Degraded"],
  ["refused", "Refused"],
  ["malicious", "Malicious"],
];

/** A table of traces: `draw(traces)`, `complain(text)`. Compact: for the overview. */
export function traceTable(news, { compact = false } = {}) {
  const body = h("tbody");
  const empty = h("p", { class: "empty", hidden: true });
  const table = h(
    "table",
    { class: "traces" },
    h(
      "thead",
      {},
      h("tr", {}, ["State", "Request", "Duration", "Services", "When"].map((title) => h("th", { scope: "col" }, title))),
    ),
    body,
  );
  const rows = new Map();
  return {
    element: h("div", { class: "trace-table" }, table, empty),
    draw(traces, nothing = "No traces yet. Try a text, and look at what it did.") {
      const longest = Math.max(1, ...traces.map((each) => each.duration_ms));
      const kept = new Map();
      for (const each of traces) {
        const old = rows.get(each.trace_id);
        const key = JSON.stringify(each);
        const row = old?.key === key ? old : { key, element: traceRow(each) };
        row.element.style.setProperty("--share", Math.max(0.004, each.duration_ms / longest));
        row.element.querySelector("time").textContent = ago(each.start_ms);
        kept.set(each.trace_id, row);
      }
      const wanted = [...kept.values()].map((row) => row.element);
      // Moved only where something has changed, so that whoever is on a row stays there.
      if (wanted.length !== body.children.length || wanted.some((element, index) => body.children[index] !== element)) {
        const focused = document.activeElement;
        fill(body, wanted);
        if (focused && body.contains(focused)) focused.focus({ preventScroll: true });
      }
      rows.clear();
      for (const [id, row] of kept) rows.set(id, row);
      empty.hidden = traces.length > 0;
      table.hidden = traces.length === 0;
      empty.textContent = nothing;
    },
    complain(text) {
      empty.hidden = false;
      empty.textContent = text;
    },
    compact,
  };
}

function traceRow(each) {
  const when = h("time", { datetime: new Date(each.start_ms).toISOString() });
  return h(
    "tr",
    { "data-trace": each.trace_id },
    h("td", { class: "cell-state" }, badge(each.state, each.outcome && each.outcome !== "ok" ? `${label(each)}` : undefined)),
    h(
      "th",
      { scope: "row", class: "cell-name" },
      h("a", { href: `#/traces/${each.trace_id}` }, each.name || "(no name yet)"),
      h("span", { class: "request mono" }, each.request_id || each.trace_id),
      each.malicious === true && h("span", { class: "tag", "data-kind": "malicious" }, "malicious"),
      each.degraded && each.state !== "degraded" && h("span", { class: "tag" }, "degraded"),
      !each.complete && h("span", { class: "tag" }, "beginning not here"),
    ),
    h("td", { class: "cell-duration" }, h("span", { class: "length", "aria-hidden": "true" }), h("span", {}, ms(each.duration_ms))),
    h(
      "td",
      { class: "cell-services" },
      h("span", { class: "strip", title: each.services.map(serviceName).join(", ") }, each.services.map((service) => h("i", { "data-hue": hue(service) }))),
      h("span", { class: "hint" }, plural(each.spans, "span")),
    ),
    h("td", { class: "cell-when" }, when),
  );
}

function label(each) {
  return `${each.status ?? ""} ${each.outcome.replaceAll("_", " ")}`.trim();
}

/** What the list shows is kept here, so that it is the same after a look at one trace. */
const wanted = { search: "", show: "all", order: "notable" };

export function traceList(news) {
  const table = traceTable(news);
  const counts = new Map();
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "Request id, trace id, outcome, path",
    autocomplete: "off",
    spellcheck: "false",
    maxlength: "128",
    value: wanted.search,
  });
  const order = h(
    "select",
    { id: "order" },
    [
      ["notable", "Trouble first"],
      ["newest", "Newest first"],
      ["slowest", "Slowest first"],
    ].map(([value, text]) => h("option", { value, selected: value === wanted.order }, text)),
  );
  const filters = h(
    "fieldset",
    { class: "segments" },
    h("legend", { class: "unseen" }, "Which traces"),
    SHOW.map(([value, text]) => {
      const count = h("span", { class: "count" });
      counts.set(value, count);
      const input = h("input", { type: "radio", name: "show", value, checked: value === wanted.show });
      input.addEventListener("change", () => change({ show: value }));
      return h("label", {}, input, h("span", {}, text, count));
    }),
  );
  const element = h(
    "div",
    { class: "trace-list" },
    h("h1", {}, "Traces"),
    h(
      "form",
      { class: "tools", role: "search" },
      h("div", { class: "field grow" }, h("label", { for: "search" }, "Find"), search),
      h("div", { class: "field" }, h("label", { for: "order" }, "Order"), order),
    ),
    filters,
    h("section", { class: "panel", "aria-label": "Traces" }, table.element),
    h(
      "p",
      { class: "hint" },
      "Kept are traces of requests that failed, were refused or slow, that came with a sampled traceparent, and a few of all others each second. The oldest ordinary ones go first.",
    ),
  );

  let asked = 0;
  let later = null;
  let running = null;

  function change(what) {
    Object.assign(wanted, what);
    asked = 0;
    list();
  }

  async function list() {
    const wait = asked + PAUSE_MS - Date.now();
    clearTimeout(later);
    if (wait > 0) {
      later = setTimeout(list, wait);
      return;
    }
    asked = Date.now();
    running?.abort();
    running = new AbortController();
    try {
      const answer = await api.traces({ ...wanted, limit: 100 }, running.signal);
      for (const [value, count] of counts) count.textContent = answer.counts[value] ? String(answer.counts[value]) : "";
      const nothing = answer.counts.all ? "No trace is like that." : "No traces yet. Try a text, and look at what it did.";
      table.draw(answer.traces, nothing);
    } catch (error) {
      if (error.name !== "AbortError") table.complain(error.message);
    }
  }

  let typing = null;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ search: search.value.trim() }), TYPING_MS);
  });
  order.addEventListener("change", () => change({ order: order.value }));
  element.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    change({ search: search.value.trim() });
  });

  const hear = (event) => event === "traces" && list();
  news.listeners.add(hear);
  list();
  return {
    element,
    close() {
      news.listeners.delete(hear);
      clearTimeout(later);
      clearTimeout(typing);
      running?.abort();
    },
  };
}
