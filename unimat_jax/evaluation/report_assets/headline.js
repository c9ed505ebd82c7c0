/* The metrics beside those of others, and what failed. */

function drawHeadline(host) {
  const others = [...new Set(DATA.headline.flatMap((row) => Object.keys(row.comparison)))];
  const titles = ["metric", "this run", "95 % interval", "", ...others, "n", "not judged"];
  const header = make("tr", {}, ...titles.map((title, i) => make("th", { scope: "col", className: i ? "number" : "" }, title)));
  header.children[3].append(make("span", { className: "hidden" }, "range"));
  const body = DATA.headline.map((row) => {
    const unit = row.unit ? make("span", { className: "unit" }, ` ${row.unit}`) : "";
    const name = make("th", { scope: "row" }, row.name, unit, make("small", {}, row.definition));
    const interval = row.interval ? row.interval.map((value) => quantity(value, row.unit)).join(" – ") : "";
    const cells = [
      make("td", { className: "number ours" }, quantity(row.ours, row.unit)),
      make("td", { className: "number muted" }, interval),
      make("td", { className: "strip" }, strip(row)),
      ...others.map((other) => make("td", { className: "number" }, quantity(row.comparison[other], row.unit))),
      make("td", { className: "number muted" }, count(row.n)),
      make("td", { className: "number muted" }, row.failures ? count(row.failures) : ""),
    ];
    return make("tr", {}, name, ...cells);
  });
  const table = make("table", {}, make("thead", {}, header), make("tbody", {}, ...body));
  host.append(
    heading("Metrics", `protocol: ${DATA.protocol}. In the small scale: dot, this run with its interval; ticks, the others.`),
    make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Metrics, scrolls sideways" }, table),
  );
}

/** This run's value and interval among the other columns, on a scale from the smallest to the largest of them. */
function strip(row) {
  const others = Object.entries(row.comparison).filter(([, value]) => value !== null);
  const values = [row.ours, ...(row.interval || []), ...others.map(([, value]) => value)].filter((v) => v !== null);
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (row.ours === null || !others.length || high === low) return "";
  const place = (value) => 5 + (90 * (value - low)) / (high - low);
  const marks = others.map(([name, value]) => {
    const text = makeSvg("title", {}, `${name}: ${quantity(value, row.unit)}`);
    return makeSvg("line", { x1: place(value), x2: place(value), y1: 3, y2: 13, class: "tick" }, text);
  });
  const interval = row.interval || [row.ours, row.ours];
  marks.unshift(makeSvg("line", { x1: 2, x2: 98, y1: 8, y2: 8, class: "axis" }));
  marks.push(makeSvg("line", { x1: place(interval[0]), x2: place(interval[1]), y1: 8, y2: 8, class: "interval" }));
  marks.push(makeSvg("circle", { cx: place(row.ours), cy: 8, r: 3, class: "dot" }));
  return makeSvg("svg", { viewBox: "0 0 100 16", width: 100, height: 16, "aria-hidden": "true" }, ...marks);
}

/** Counts by reason; a click on a reason looks for it in the table of structures. */
function drawFailures(host, find) {
  const total = Math.max(DATA.num_rows, 1);
  const most = Math.max(...DATA.failures.map(([, number]) => number), 1);
  const rows = DATA.failures.map(([reason, number]) => {
    const bar = makeSvg("rect", { width: (100 * number) / most, height: 10, class: "failed" });
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("button", { className: "link", onclick: () => find(reason) }, reason)),
      make("td", { className: "number" }, count(number)),
      make("td", { className: "number muted" }, percent(number / total)),
      make("td", { className: "bar" }, makeSvg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, bar)),
    );
  });
  const remark = rows.length ? `of ${count(DATA.num_rows)} structures; a reason finds its rows` : "none";
  host.append(heading("Failures by reason", remark));
  if (rows.length) host.append(make("table", {}, make("tbody", {}, ...rows)));
}
