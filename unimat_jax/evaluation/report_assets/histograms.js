/* Histograms of generated against reference structures, as SVG. */

const CHART = { width: 300, height: 132, left: 33, right: 6, top: 8, bottom: 22 };
const LETTER = 6; // width of one
const LINES = ["first", "second", "third"];

function drawHistograms(host) {
  if (!DATA.histograms.length) return;
  const names = [...new Set(DATA.histograms.flatMap((chart) => chart.series.map((series) => series.name)))];
  const style = (name) => (name === REFERENCE ? "filled" : LINES[names.filter((n) => n !== REFERENCE).indexOf(name) % 3]);
  const legend = names.map((name) => make("span", { className: `key ${style(name)}` }, name));
  host.append(heading("Distributions", ...legend, " share of each side's values"));
  host.append(make("div", { className: "charts" }, ...DATA.histograms.map((chart) => histogram(chart, style))));
}

function histogram(chart, style) {
  const { width, height, left, right, top, bottom } = CHART;
  const bins = (chart.categories || chart.edges.slice(1)).length;
  const most = Math.max(...chart.series.flatMap((series) => series.shares), 1e-9);
  const x = (bin) => left + ((width - left - right) * bin) / bins;
  const y = (share) => height - bottom - ((height - top - bottom) * share) / most;
  const gap = chart.categories ? 0.1 : 0;
  const drawn = [...chart.series].sort((a, b) => (b.name === REFERENCE) - (a.name === REFERENCE)).map((series) => {
    const parts = series.shares.map((share, bin) => {
      const [from, to, level] = [x(bin + gap).toFixed(1), x(bin + 1 - gap).toFixed(1), y(share).toFixed(1)];
      return gap ? `M${from} ${y(0)}V${level}H${to}V${y(0)}` : `${bin ? "" : `M${from} ${y(0)}`}V${level}H${to}`;
    });
    return makeSvg("path", { d: `${parts.join("")}V${y(0)}`, class: style(series.name) });
  });
  const text = (anchor, px, py, label) => makeSvg("text", { x: px, y: py, "text-anchor": anchor }, label);
  const axis = [
    makeSvg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), class: "axis" }),
    text("end", left - 4, y(most) + 7, percent(most, most < 0.1 ? 1 : 0).replace(" ", "")),
    text("end", left - 4, y(0) + 2, "0"),
    ...ticks(chart, x).map(([px, label]) => {
      const leaves = px + (LETTER / 2) * label.length > width; // the picture, at its right
      return text(leaves ? "end" : "middle", leaves ? width : px, height - 8, label);
    }),
  ];
  const cursor = makeSvg("rect", { y: top, height: height - top - bottom, width: x(1) - x(0), class: "cursor" });
  const readout = make("p", { className: "readout", ariaLive: "polite" });
  const labels = { role: "img", tabindex: 0, "aria-label": `${chart.title}: histogram, arrow keys read the bins` };
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, ...labels }, cursor, ...drawn, ...axis);

  let current = -1;
  function show(bin) {
    current = bin;
    cursor.classList.toggle("shown", bin >= 0);
    if (bin < 0) return readout.replaceChildren(summary(chart));
    cursor.setAttribute("x", x(bin));
    const values = chart.series.map((series) => `${series.name} ${percent(series.shares[bin])}`);
    readout.replaceChildren(make("b", {}, binName(chart, bin)), ` ${values.join(", ")}`);
  }
  function point(event) {
    const box = svg.getBoundingClientRect();
    const bin = Math.floor((((event.clientX - box.left) / box.width) * width - left) / (x(1) - x(0)));
    show(Math.min(Math.max(bin, 0), bins - 1));
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(-1)); // a tap stays
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    show((Math.max(current, step > 0 ? -1 : 0) + step + bins) % bins);
    event.preventDefault();
  });
  show(-1);
  return make("figure", {}, make("figcaption", {}, chart.title), svg, readout);
}

/** [place, label] along the axis: round numbers, or as many categories as fit. */
function ticks(chart, x) {
  if (chart.edges) {
    const bins = chart.edges.length - 1;
    const [low, high] = [chart.edges[0], chart.edges[bins]];
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step);
    const places = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
    return places.map((value) => [x((bins * (value - low)) / (high - low)), number(value)]);
  }
  const longest = Math.max(...chart.categories.map((name) => name.length), 1);
  const every = Math.max(1, Math.ceil((longest * LETTER + 4) / (x(1) - x(0))));
  return chart.categories.map((name, i) => [x(i + 0.5), name]).filter((_, i) => i % every === 0);
}

function binName(chart, bin) {
  if (chart.categories) return chart.categories[bin];
  const [low, high] = [number(chart.edges[bin]), number(chart.edges[bin + 1])];
  if (bin === 0 && chart.clipped[0]) return `below ${high}`;
  return bin === chart.edges.length - 2 && chart.clipped[1] ? `above ${low}` : `${low} – ${high}`;
}

function summary(chart) {
  const sides = chart.series.map((series) => {
    return `${count(series.n)} ${series.name}${series.left_out ? ` (${count(series.left_out)} without a value)` : ""}`;
  });
  return sides.join(", ");
}
