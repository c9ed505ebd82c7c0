/* Which atoms and bonds a picture of a crystal shows. */

const BORDER = 0.25; // Angstrom: an atom so near to a face of the cell is drawn at the opposite face too.
const BOND_FACTOR = 1.25; // times the sum of the covalent radii
const SHELL_FACTOR = 1.2; // times the nearest distance of either atom: no lines through a first shell to the second
const MAX_REACH = 3; // cells in each direction: needle cells have no end of images
const EMPTY = 0.1; // Angstrom: atoms on one place have no line between them.

/** Rows of the cell (Angstrom), a along x and b in the xy plane, from a, b, c, alpha, beta, gamma (degrees). */
function cellVectors([a, b, c, alpha, beta, gamma]) {
  const cos = [alpha, beta, gamma].map((angle) => Math.cos((angle * Math.PI) / 180));
  const sin = Math.sin((gamma * Math.PI) / 180);
  const y = (cos[0] - cos[1] * cos[2]) / sin;
  const z = Math.sqrt(Math.max(1 - cos[1] ** 2 - y ** 2, 0));
  return [[a, 0, 0], [b * cos[2], b * sin, 0], [c * cos[1], c * y, c * z]];
}

function cross([a, b, c], [x, y, z]) {
  return [b * z - c * y, c * x - a * z, a * y - b * x];
}

function dot(a, b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

/** Distances (Angstrom) between opposite faces of the cell. */
function heights(cell) {
  const normals = [cross(cell[1], cell[2]), cross(cell[2], cell[0]), cross(cell[0], cell[1])];
  return normals.map((normal, i) => Math.abs(dot(normal, cell[i])) / Math.sqrt(dot(normal, normal)));
}

function cartesian(cell, [x, y, z]) {
  return [0, 1, 2].map((k) => x * cell[0][k] + y * cell[1][k] + z * cell[2][k]);
}

/** {cell, atoms: [{z, at: Cartesian, bonds: [index, ...]}]} of a crystal of the data; `beyond`: bonded atoms outside too. */
function picture(crystal, beyond) {
  const cell = cellVectors(crystal.cell);
  const height = heights(cell);
  const frac = crystal.z.map((_, i) => crystal.frac.slice(3 * i, 3 * i + 3).map((value) => value / 1e4));
  const pairs = bondedPairs(crystal.z, frac, cell, height);
  const drawn = new Map(); // "atom,i,j,k" -> atom of the picture
  const add = (atom, image) => {
    const key = [atom, ...image].join();
    if (!drawn.has(key)) {
      const at = cartesian(cell, frac[atom].map((value, axis) => value + image[axis]));
      drawn.set(key, { atom, image, z: crystal.z[atom], at, bonds: [], index: drawn.size });
    }
    return drawn.get(key);
  };
  frac.forEach((place, atom) => {
    const choices = place.map((value, axis) => {
      if (value * height[axis] < BORDER) return [0, 1];
      return (1 - value) * height[axis] < BORDER ? [0, -1] : [0];
    });
    for (const i of choices[0]) for (const j of choices[1]) for (const k of choices[2]) add(atom, [i, j, k]);
  });
  for (const start of [...drawn.values()]) {
    for (const pair of pairs[start.atom]) {
      const image = pair.image.map((value, axis) => value + start.image[axis]);
      const end = beyond ? add(pair.atom, image) : drawn.get([pair.atom, ...image].join());
      if (!end || pair.distance < EMPTY) continue;
      if (!start.bonds.includes(end.index)) start.bonds.push(end.index);
      if (!end.bonds.includes(start.index)) end.bonds.push(start.index);
    }
  }
  return { cell, atoms: [...drawn.values()] };
}

/** For each atom, its bonds [{atom, image, distance}]. */
function bondedPairs(numbers, frac, cell, height) {
  const radii = numbers.map((z) => DATA.atoms[z].radius);
  const longest = 2 * BOND_FACTOR * Math.max(...radii);
  const reach = height.map((h) => Math.min(Math.ceil(longest / h), MAX_REACH));
  const images = [];
  for (let i = -reach[0]; i <= reach[0]; i++)
    for (let j = -reach[1]; j <= reach[1]; j++) for (let k = -reach[2]; k <= reach[2]; k++) images.push([i, j, k]);
  const shifts = images.map((image) => cartesian(cell, image));
  const places = frac.map((place) => cartesian(cell, place));
  const near = places.map((from, a) =>
    places.flatMap((to, b) => {
      const limit = BOND_FACTOR * (radii[a] + radii[b]);
      const [x, y, z] = [to[0] - from[0], to[1] - from[1], to[2] - from[2]];
      const found = [];
      shifts.forEach((shift, s) => {
        const distance = Math.hypot(x + shift[0], y + shift[1], z + shift[2]);
        const itself = a === b && images[s].every((value) => value === 0);
        if (distance < limit && !itself) found.push({ atom: b, image: images[s], distance });
      });
      return found;
    }),
  );
  const nearest = near.map((pairs) => Math.min(...pairs.map((pair) => pair.distance)));
  return near.map((pairs, a) =>
    pairs.filter((pair) => pair.distance < SHELL_FACTOR * Math.max(nearest[a], nearest[pair.atom])),
  );
}
