/* Puts the page together. */

document.getElementById("subtitle").textContent =
  `${count(DATA.num_rows)} structures, protocol ${DATA.protocol}, ${DATA.created}`;

/** All values of a row. */
function details(table, row) {
  const entries = table.flatMap((column) => {
    return [make("dt", {}, ...breakable(column.name)), make("dd", {}, cellText(column, row))];
  });
  return make("dl", {}, ...entries);
}

function drawStructures(host) {
  if (!DATA.num_rows) return () => {};
  const table = columns();
  const carried = DATA.generated.filter((place) => place >= 0).length;
  const remark = `${count(DATA.num_rows)} rows; the page carries the atoms of ${count(carried)} of them`;
  host.append(heading("Structures", remark));
  const values = make("div", { className: "details", tabIndex: 0, role: "region", ariaLabel: "Values of the selected row" });
  const pane = make("div", { className: "pane" });
  host.append(pane);
  let show = () => {};
  if (carried) {
    const left = make("div");
    pane.append(left);
    show = drawViews(left);
  }
  pane.append(values);
  const { select, find } = drawTable(host, table, (row) => {
    const crystal = (places) => DATA.crystals[places[row]] || null;
    const why = DATA.generated[row] === -2 ? "The page does not carry this row's atoms." : "There is no structure to draw.";
    show([crystal(DATA.generated), crystal(DATA.nearest)], [why, "No reference structure is given for this row."]);
    values.replaceChildren(details(table, row));
  });
  const first = DATA.nearest.findIndex((place) => place >= 0);
  select(Math.max(first, 0));
  return (text) => {
    find(text);
    host.scrollIntoView();
  };
}

function drawFooter(host) {
  const files = Object.entries(DATA.files).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]);
  if (files.length) host.append(make("h2", {}, "Files"), make("dl", {}, ...files));
  const bonds = `Lines join atoms nearer than ${BOND_FACTOR} times the sum of their covalent radii and ${SHELL_FACTOR} times `;
  host.append(
    make("p", {}, bonds, `the nearest distance of either; atoms within ${BORDER} Å of a face are repeated at the opposite one. `),
    make("p", {}, "Structures are drawn by 3Dmol.js. This page loads nothing from elsewhere."),
  );
}

drawHeadline(document.getElementById("headline"));
drawHistograms(document.getElementById("histograms"));
drawElements(document.getElementById("elements"));
let findRows = () => {};
drawFailures(document.getElementById("failures"), (reason) => findRows(reason));
drawFooter(document.getElementById("footer"));
findRows = drawStructures(document.getElementById("structures"));
requestAnimationFrame(() => performance.mark("report-drawn"));
