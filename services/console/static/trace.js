// One trace: a page of its own, and the waterfall that the box for texts shows too.
import * as api from "./api.js";
import { badge, clock, copyable, fill, h, hue, ms, plural, serviceName } from "./dom.js";

const FIRST_ROWS = 400;
const TICKS = [0, 0.25, 0.5, 0.75, 1];

/** The waterfall of a trace: `draw(trace)` again whenever more of it has come; what is open stays open. */
export function waterfall() {
  const open = new Set();
  const folded = new Set();
  let all = false;
  let last = null;
  const element = h("div", { class: "waterfall" });

  function redraw(focusOn) {
    draw(last);
    if (focusOn) element.querySelector(`[data-span="${focusOn}"] .span-row`)?.focus({ preventScroll: true });
  }

  function draw(trace) {
    last = trace;
    const total = Math.max(1, ...trace.spans.map((span) => span.offset_us + span.duration_us));
    const parents = new Set(trace.spans.map((span) => span.parent_id));
    const shown = [];
    let hiddenBelow = null;
    for (const span of trace.spans) {
      if (hiddenBelow !== null && span.depth > hiddenBelow) continue;
      hiddenBelow = folded.has(span.span_id) ? span.depth : null;
      shown.push(span);
    }
    const rows = all ? shown : shown.slice(0, FIRST_ROWS);
    const services = [...new Set(trace.spans.map((span) => span.service))];
    fill(
      element,
      h("p", { class: "legend" }, services.map((service) => h("span", {}, h("i", { "data-hue": hue(service), "aria-hidden": "true" }), serviceName(service)))),
      h(
        "div",
        { class: "axis", "aria-hidden": "true" },
        h("span", {}),
        h("div", {}, TICKS.map((share) => h("span", { vars: { at: share } }, ms((share * total) / 1000)))),
      ),
      h("ol", { class: "spans" }, rows.map((span) => spanItem(span, total, parents.has(span.span_id)))),
      rows.length < shown.length &&
        h("button", { class: "quiet", type: "button", onclick: () => ((all = true), redraw()) }, `Show ${plural(shown.length - rows.length, "more span")}`),
      trace.cut > 0 && h("p", { class: "hint" }, `${plural(trace.cut, "span")} of this trace found no room.`),
    );
  }

  function spanItem(span, total, isParent) {
    const isOpen = open.has(span.span_id);
    const id = `span-${span.span_id}`;
    const end = (span.offset_us + span.duration_us) / total;
    const toggle = () => {
      if (!open.delete(span.span_id)) open.add(span.span_id);
      redraw(span.span_id);
    };
    const fold = () => {
      if (!folded.delete(span.span_id)) folded.add(span.span_id);
      redraw(span.span_id);
    };
    const row = h(
      "button",
      {
        class: "span-row",
        type: "button",
        "aria-expanded": String(isOpen),
        "aria-controls": id,
        "aria-label": `${serviceName(span.service)}: ${span.name}, ${ms(span.duration_us / 1000)}, begins after ${ms(span.offset_us / 1000)}${span.failed ? `, failed ${span.error}` : ""}`,
        onclick: toggle,
      },
      h(
        "span",
        { class: "span-name", vars: { depth: Math.min(span.depth, 12) } },
        h("i", { "data-hue": hue(span.service) }),
        span.failed && h("b", { class: "fail-sign" }, "✕"),
        h("span", {}, span.name),
        folded.has(span.span_id) && h("em", {}, "…"),
      ),
      h(
        "span",
        { class: "span-track", vars: { from: Math.max(0, span.offset_us / total), length: span.duration_us / total } },
        h("i", { class: "bar", "data-hue": hue(span.service), "data-kind": span.kind, "data-failed": span.failed }),
        span.events.slice(0, 8).map((event) => h("i", { class: "mark", vars: { at: Math.min(1, Math.max(0, event.offset_us / total)) } })),
        h("span", { class: "bar-label", "data-side": end > 0.82 ? (span.offset_us / total > 0.2 ? "before" : "inside") : "after" }, ms(span.duration_us / 1000)),
      ),
    );
    row.addEventListener("keydown", (event) => {
      const rows = [...element.querySelectorAll(".span-row")];
      const here = rows.indexOf(row);
      const go = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (go !== undefined && rows[go]) {
        event.preventDefault();
        rows[go].focus();
      } else if (isParent && ((event.key === "ArrowLeft" && !folded.has(span.span_id)) || (event.key === "ArrowRight" && folded.has(span.span_id)))) {
        event.preventDefault();
        fold();
      }
    });
    return h("li", { "data-span": span.span_id, "data-service": span.service }, row, isOpen && spanDetail(span, id));
  }

  return { element, draw };
}

function spanDetail(span, id) {
  const attributes = Object.entries(span.attributes);
  const facts = [
    ["service", serviceName(span.service)],
    ["instance", span.instance],
    ["kind", span.kind],
    ["begins", `after ${ms(span.offset_us / 1000)}`],
    ["takes", ms(span.duration_us / 1000)],
  ].filter(([, value]) => value);
  return h(
    "div",
    { class: "span-detail", id },
    span.failed && h("p", { class: "complaint" }, span.error ? `Failed: ${span.error}` : "Failed"),
    h("dl", { class: "facts" }, [...facts, ...attributes].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "mono" }, String(value))))),
    span.events.length > 0 && [
      h("h4", {}, "Events"),
      h(
        "ul",
        { class: "events" },
        span.events.map((event) =>
          h("li", {}, h("span", { class: "mono" }, `+${ms((event.offset_us - span.offset_us) / 1000)}`), " ", event.name, Object.entries(event.attributes).map(([name, value]) => h("span", { class: "hint" }, ` ${name}=${value}`))),
        ),
      ),
    ],
    span.links.length > 0 && [
      h("h4", {}, "Linked traces"),
      h("ul", { class: "events" }, span.links.map((link) => h("li", {}, h("a", { class: "mono", href: `#/traces/${link.trace_id}` }, link.trace_id)))),
    ],
  );
}

export function tracePage(news, id) {
  const head = h("div", { class: "trace-head" }, h("h1", {}, "Trace"));
  const body = h("section", { class: "panel", "aria-label": "Waterfall" }, h("p", { class: "empty" }, "Loading…"));
  const picture = waterfall();
  let shown = "";

  async function load() {
    let found;
    try {
      found = await api.trace(id);
    } catch (error) {
      if (!shown) fill(body, h("p", { class: "empty" }, error.message));
      return;
    }
    if (!found) {
      if (!shown) fill(body, h("p", { class: "empty" }, "There is no such trace here: not yet, or no more. It is shown when it comes."));
      return;
    }
    const key = JSON.stringify(found.summary);
    if (key === shown) return;
    const first = !shown;
    shown = key;
    drawHead(head, found.summary);
    const focused = document.activeElement?.closest?.("[data-span]")?.dataset.span;
    picture.draw(found);
    if (focused) picture.element.querySelector(`[data-span="${focused}"] .span-row`)?.focus({ preventScroll: true });
    if (first) fill(body, picture.element);
  }

  const hear = (event) => event === "traces" && load();
  news.listeners.add(hear);
  load();
  return {
    element: h("div", { class: "trace-page" }, h("p", { class: "back" }, h("a", { href: "#/traces" }, "← All traces")), head, body),
    close: () => news.listeners.delete(hear),
  };
}

function drawHead(element, summary) {
  const facts = [
    ["request", summary.request_id && copyable(summary.request_id, "request id")],
    ["trace", copyable(summary.trace_id, "trace id")],
    ["key", summary.key_id && h("span", { class: "mono" }, summary.key_id)],
    ["began", `${new Date(summary.start_ms).toLocaleDateString()}, ${clock(summary.start_ms)}`],
    ["spans", `${summary.spans} in ${plural(summary.services.length, "service")}`],
  ].filter(([, value]) => value);
  fill(
    element,
    h("h1", {}, summary.name || "Trace"),
    h(
      "p",
      { class: "trace-tags" },
      badge(summary.state, summary.outcome && summary.outcome !== "ok" ? `${summary.status ?? ""} ${summary.outcome.replaceAll("_", " ")}`.trim() : undefined),
      h("b", { class: "trace-duration" }, ms(summary.duration_ms)),
      summary.malicious === true && h("span", { class: "tag", "data-kind": "malicious" }, "malicious"),
      summary.malicious === false && h("span", { class: "tag" }, "benign"),
      summary.degraded && summary.state !== "degraded" && h("span", { class: "tag" }, "degraded"),
      !summary.complete && h("span", { class: "tag" }, "beginning not here"),
    ),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
  );
}
