/* Views of crystals side by side, drawn by 3Dmol.js. */

const SPHERE = 0.4; // of the covalent radius
const FILL = 1.85; // zoom after `zoomTo`, in a square
const HOME = [0.1192, -0.2064, -0.0253, 0.9709]; // quaternion: turned by -24 degrees about y, then by 14 about x
const AXIS_COLORS = ["#d1495b", "#3a8f5c", "#3f74c9"]; // a, b, c
const EDGE_COLOR = "#8a8f98";

/** An empty view in `host`, or null where the browser has no WebGL. */
function openView(host) {
  const probe = document.createElement("canvas");
  if (!probe.getContext("webgl2") && !probe.getContext("webgl")) return null; // 3Dmol.js would only complain
  const color = () => getComputedStyle(host).backgroundColor; // a transparent view is black on some machines
  const look = { backgroundColor: color(), orthographic: true, disableFog: true, minimumZoomToDistance: 1 };
  // Twice the resolution smooths edges too, and starts in two thirds of the time where there is no graphics card.
  const view = $3Dmol.createViewer(host, { ...look, antialias: false, upscale: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.setBackgroundColor(color()));
  return view;
}

/** Draws a crystal of the data, a towards the reader, b to the right, c up; the middle of the cell at the origin. */
function drawCrystal(view, crystal, beyond) {
  view.removeAllModels();
  view.removeAllShapes();
  if (crystal) {
    const { cell, atoms } = picture(crystal, beyond);
    const middle = cartesian(cell, [0.5, 0.5, 0.5]);
    const turned = ([x, y, z]) => ({ x: y - middle[1], y: z - middle[2], z: x - middle[0] });
    const model = view.addModel();
    model.addAtoms(
      atoms.map(({ z, at, bonds }) => {
        const { symbol, color } = DATA.atoms[z];
        return { elem: symbol, ...turned(at), bonds, bondOrder: bonds.map(() => 1), color: Number(`0x${color.slice(1)}`) };
      }),
    );
    for (const z of new Set(crystal.z)) {
      const { symbol, radius } = DATA.atoms[z];
      model.setStyle({ elem: symbol }, { sphere: { radius: SPHERE * radius }, stick: { radius: 0.08 } });
    }
    for (let axis = 0; axis < 3; axis++) {
      for (const [i, j] of [[0, 0], [0, 1], [1, 0], [1, 1]]) {
        const [from, to] = [0, 1].map((end) => {
          const place = [0, 0, 0];
          [place[axis], place[(axis + 1) % 3], place[(axis + 2) % 3]] = [end, i, j];
          return turned(cartesian(cell, place));
        });
        const first = i === 0 && j === 0;
        const radius = first ? 0.045 : 0.025;
        view.addCylinder({ start: from, end: to, radius, color: first ? AXIS_COLORS[axis] : EDGE_COLOR, fromCap: 1, toCap: 1 });
      }
    }
  }
  view.render();
}

/** All crystals fitted at one scale and centred; `turn` is the quaternion of all, without it each keeps its own. */
function fit(views, turn) {
  const states = views.map((view) => view.zoomTo().getView());
  const distances = states.filter((_, i) => views[i].getModel()).map((state) => state[3]);
  const distance = Math.min(...(distances.length ? distances : [0]));
  views.forEach((view, i) => {
    view.setView([0, 0, 0, distance, ...(turn || states[i].slice(4, 8)), 0, 0]);
    const { clientWidth, clientHeight } = view.container;
    view.zoom(FILL / Math.max(clientWidth / clientHeight, 1)); // `zoomTo` leaves more room than needed
  });
}

/** Keys of a focused view: arrows turn, + and - zoom, 0 resets. The wheel zooms it only then, and else scrolls the page. */
function addKeys(host, view, home) {
  const turns = { ArrowLeft: [-10, "vy"], ArrowRight: [10, "vy"], ArrowUp: [-10, "vx"], ArrowDown: [10, "vx"] };
  host.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (turns[event.key]) view.rotate(...turns[event.key]);
    else if (event.key === "+" || event.key === "=") view.zoom(1.2);
    else if (event.key === "-") view.zoom(1 / 1.2);
    else if (event.key === "0") home();
    else return;
    event.preventDefault();
  });
  host.addEventListener("pointerdown", () => host.focus({ preventScroll: true }));
  const unlessFocused = (event) => document.activeElement === host || event.stopPropagation();
  host.addEventListener("wheel", unlessFocused, { capture: true, passive: true });
}

/** Draws the views into `host`: one, and a second one if any row has a reference. The returned function shows a row. */
function drawViews(host) {
  const names = DATA.nearest.some((place) => place >= 0) ? [GENERATED, "nearest reference"] : [GENERATED];
  const sides = names.map((name) => {
    const canvas = make("div", { className: "view", tabIndex: 0, role: "img" });
    canvas.ariaLabel = `${name} structure; arrow keys turn it, + and - zoom, 0 resets`;
    const caption = make("p", { className: "caption" });
    return { name, canvas, caption, figure: make("figure", {}, make("figcaption", {}, name), canvas, caption) };
  });
  const option = (text, checked, onchange) => {
    const box = make("input", { type: "checkbox", checked, onchange });
    return [box, make("label", {}, box, ` ${text}`)];
  };
  const [linked, linkLabel] = option("turn together", true, () => linked.checked && follow(0));
  const [beyond, beyondLabel] = option("bonded atoms beyond the cell", false, () => show(shown));
  const legend = make("span", { className: "legend" });
  const home = make("button", { onclick: () => fit(views, HOME) }, "reset view");
  host.append(
    make("div", { className: "views" }, ...sides.map((side) => side.figure)),
    make("div", { className: "tools" }, legend, ...(sides[1] ? [linkLabel] : []), beyondLabel, home),
  );
  const views = sides.map((side) => openView(side.canvas));
  let shown = null;
  if (views.includes(null)) {
    for (const side of sides) side.canvas.append(make("p", { className: "absent" }, "This browser draws no WebGL."));
    return () => {};
  }

  let following = false;
  function follow(leader) {
    if (following || !linked.checked || !views[1]) return;
    following = true;
    views[1 - leader].setView(views[leader].getView());
    following = false;
  }
  views.forEach((view, i) => view.setViewChangeCallback(() => follow(i)));
  sides.forEach((side, i) => addKeys(side.canvas, views[i], () => fit(views, HOME)));

  /** crystals: [generated, nearest], null where there is none; `why` stands in the place of a missing one. */
  function show(crystals, why = ["", ""]) {
    const turn = shown ? undefined : HOME;
    shown = crystals.slice(0, sides.length);
    following = true;
    shown.forEach((crystal, i) => {
      drawCrystal(views[i], crystal, beyond.checked);
      if (crystal || why[i]) describeCrystal(sides[i].caption, crystal, why[i]);
    });
    fit(views, turn);
    following = false;
    const numbers = new Set(shown.flatMap((crystal) => (crystal ? crystal.z : [])));
    legend.replaceChildren(
      ...[...numbers].sort((a, b) => a - b).map((z) => {
        const patch = make("i");
        patch.style.backgroundColor = DATA.atoms[z].color;
        return make("span", {}, patch, DATA.atoms[z].symbol);
      }),
    );
  }
  return show;
}

function describeCrystal(caption, crystal, why) {
  if (!crystal) return caption.replaceChildren(why);
  const axes = crystal.cell.slice(0, 3).flatMap((length, i) => {
    const name = make("b", {}, "abc"[i]);
    name.style.color = AXIS_COLORS[i];
    return [name, ` ${length.toFixed(2)} `];
  });
  const angles = crystal.cell.slice(3).map((angle) => angle.toFixed(1)).join(" ");
  caption.replaceChildren(make("b", {}, crystal.formula), ` ${crystal.uid}`, make("br"), ...axes, `Å, ${angles}°`);
}
