/* Two periodic tables: the share of structures that hold each element, generated and reference. */

function drawElements(host) {
  const { places, generated, reference } = DATA.elements;
  if (!generated.n && !reference.n) return;
  const sides = [[GENERATED, generated], [REFERENCE, reference]].filter(([, side]) => side.n);
  const share = (side, z) => side.counts[z] / side.n;
  const most = Math.max(...sides.flatMap(([, side]) => places.map(([, z]) => share(side, z))));
  const readout = make("p", { className: "readout", ariaLive: "polite" });
  const cells = new Map(places.map(([, z]) => [z, []]));
  let current = 0;

  function show(z) {
    for (const cell of cells.get(current) || []) cell.classList.remove("current");
    current = z;
    if (!z) return readout.replaceChildren(differences(sides));
    for (const cell of cells.get(z)) cell.classList.add("current");
    const [symbol] = places.find((place) => place[1] === z);
    const parts = sides.map(([name, side]) => `${name} ${percent(share(side, z))} (${count(side.counts[z])} of ${count(side.n)})`);
    readout.replaceChildren(make("b", {}, `${symbol} ${z}`), ` ${parts.join(", ")}`);
  }

  const tables = sides.map(([name, side]) => {
    const grid = make("div", { className: "periodic", role: "img", tabIndex: 0 });
    grid.ariaLabel = `Periodic table of ${name} structures; arrow keys read the elements`;
    for (const [symbol, z, row, column] of places) {
      const level = most ? Math.sqrt(share(side, z) / most) : 0;
      const cell = make("span", { className: level > 0.55 ? "strong" : level ? "" : "absent" }, symbol);
      cell.dataset.z = z;
      cell.style.gridArea = `${row + 1} / ${column + 1}`;
      cell.style.setProperty("--level", `${(100 * level).toFixed(1)}%`);
      cells.get(z).push(cell);
      grid.append(cell);
    }
    const point = (event) => event.target.dataset.z && show(Number(event.target.dataset.z));
    grid.addEventListener("pointerover", point);
    grid.addEventListener("pointerdown", point);
    grid.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(0)); // a tap stays
    grid.addEventListener("blur", () => show(0));
    grid.addEventListener("keydown", (event) => {
      const next = neighbour(places, current, event.key);
      if (!next) return;
      show(next);
      event.preventDefault();
    });
    return make("figure", {}, make("figcaption", {}, `${name}, ${count(side.n)} structures`), grid);
  });
  const scale = make("span", { className: "scale" }, "0", make("i"), `${percent(most, 0)}, square root scale`);
  host.append(heading("Elements", "share of structures that hold the element", scale), readout);
  host.append(make("div", { className: `tables ${GENERATED}` }, ...tables));
  show(0);
}

/** The element next to `z` in the direction of an arrow key, over gaps; 0 for other keys and at the border. */
function neighbour(places, z, key) {
  const direction = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
  if (!direction) return 0;
  if (!z) return 1;
  const [, , row, column] = places.find((place) => place[1] === z);
  for (let step = 1; step < 18; step++) {
    const found = places.find((p) => p[2] === row + step * direction[0] && p[3] === column + step * direction[1]);
    if (found) return found[1];
  }
  return z;
}

/** The elements whose shares differ most. */
function differences(sides) {
  if (sides.length < 2) return "";
  const [generated, reference] = sides.map(([, side]) => side);
  const rows = DATA.elements.places.map(([symbol, z]) => {
    return [symbol, 100 * (generated.counts[z] / generated.n - reference.counts[z] / reference.n)];
  });
  rows.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const parts = rows.slice(0, 6).filter(([, points]) => Math.abs(points) >= 0.05);
  if (!parts.length) return "no element differs by 0.1 percentage points";
  const sign = (points) => (points > 0 ? "+" : "−") + Math.abs(points).toFixed(1);
  return `largest differences, generated − reference in percentage points: ${parts.map(([s, p]) => `${s} ${sign(p)}`).join(", ")}`;
}
