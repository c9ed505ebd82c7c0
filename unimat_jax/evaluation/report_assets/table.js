/* The table of all rows: sorted, filtered, paged, and one of them selected. */

const PAGE_LENGTH = 50;

/** Reads the columns of the data; `3D` says whether a row's atoms are in the page. */
function columns() {
  const inPage = { name: "3D", kind: "flag", values: DATA.generated.map((place) => (place < 0 ? 0 : 1)) };
  const all = DATA.crystals.length ? [...DATA.columns, inPage] : DATA.columns;
  return all.map((column) => {
    const values = column.values || column.codes.map((code) => (code < 0 ? null : column.texts[code]));
    const numbers = column.kind === "number" ? values.filter((v) => v !== null) : [];
    const largest = numbers.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const whole = numbers.every(Number.isInteger);
    return { ...column, values, digits: whole ? 0 : largest >= 1000 ? 1 : largest >= 10 ? 2 : 3 };
  });
}

function cellText(column, row) {
  const value = column.values[row];
  if (value === null) return "–";
  if (column.kind === "flag") return value ? "yes" : "no";
  if (column.kind === "number") return value.toFixed(column.digits);
  return value;
}

/** Draws filters and table into `host`; `onSelect(row)` is called for each newly selected row. */
function drawTable(host, table, onSelect) {
  const collator = new Intl.Collator("en", { numeric: true });
  const texts = table.filter((column) => column.kind === "text");
  const haystacks = Array.from({ length: DATA.num_rows }, (_, row) => {
    return texts.map((column) => column.values[row] ?? "").join("\n").toLowerCase();
  });
  const state = { sorted: null, descending: false, page: 0, selected: -1, rows: [] };
  const body = make("tbody");
  const said = make("span", { className: "muted", ariaLive: "polite" });
  const search = make("input", { type: "search", placeholder: "uid, formula, reason …", ariaLabel: "Find text", oninput: update });
  const choices = table.filter((column) => column.kind === "flag" || column.name === "status").map((column) => {
    const flag = column.kind === "flag";
    const names = flag ? ["yes", "no"] : [...new Set(column.values.filter((value) => value !== null))].sort(collator.compare);
    const options = names.map((name) => make("option", { value: name }, name));
    const select = make("select", { ariaLabel: column.name, onchange: update }, make("option", { value: "" }, "any"), ...options);
    return { column, select, label: make("label", {}, make("span", {}, column.name), select) };
  });
  const clear = make("button", { onclick: () => (reset(""), search.focus()) }, "clear");
  const headers = table.map((column) => {
    const button = make("button", { onclick: () => sort(column) }, ...breakable(column.name));
    return make("th", { scope: "col", className: column.kind === "number" ? "number" : "" }, button);
  });
  const pages = ["first", "previous", "next", "last"].map((name) => {
    return make("button", { onclick: () => turn(name) }, { first: "«", previous: "‹", next: "›", last: "»" }[name]);
  });
  ["First page", "Previous page", "Next page", "Last page"].forEach((name, i) => (pages[i].ariaLabel = name));
  const position = make("span", { className: "muted" });

  function reset(text) {
    search.value = text;
    for (const choice of choices) choice.select.value = "";
    update();
  }

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const active = choices.filter((choice) => choice.select.value);
    state.rows = haystacks.flatMap((text, row) => {
      const fits = words.every((word) => text.includes(word));
      return fits && active.every(({ column, select }) => cellText(column, row) === select.value) ? [row] : [];
    });
    order();
  }

  function sort(column) {
    state.descending = state.sorted === column && !state.descending;
    state.sorted = column;
    order();
  }

  /** Rows without a value come last in both directions. */
  function order() {
    const { sorted, descending, rows } = state;
    if (sorted) {
      const compare = sorted.kind === "text" ? collator.compare : (a, b) => a - b;
      const [none, some] = [[], []];
      for (const row of rows) (sorted.values[row] === null ? none : some).push(row);
      some.sort((a, b) => (descending ? -1 : 1) * compare(sorted.values[a], sorted.values[b]) || a - b);
      state.rows = [...some, ...none];
    }
    headers.forEach((header, i) => {
      const on = table[i] === sorted;
      header.ariaSort = on ? (descending ? "descending" : "ascending") : "none";
    });
    state.page = 0;
    draw();
  }

  function turn(name) {
    const last = Math.max(Math.ceil(state.rows.length / PAGE_LENGTH) - 1, 0);
    state.page = { first: 0, previous: state.page - 1, next: state.page + 1, last }[name];
    draw();
    body.closest(".scroll").scrollTop = 0;
  }

  function draw() {
    const { rows, page } = state;
    const start = page * PAGE_LENGTH;
    const shown = rows.slice(start, start + PAGE_LENGTH);
    const focused = body.contains(document.activeElement);
    const stop = shown.includes(state.selected) ? state.selected : shown[0];
    body.replaceChildren(
      ...shown.map((row) => {
        const cells = table.map((column) => {
          const text = cellText(column, row);
          const kind = column.kind === "flag" && text !== "–" ? `flag ${text}` : text === "–" ? "muted" : column.kind;
          return make("td", { className: kind, title: text.length > 24 ? text : "" }, text);
        });
        const line = make("tr", { tabIndex: row === stop ? 0 : -1, onclick: () => select(row) }, ...cells);
        line.dataset.row = row;
        if (row === state.selected) line.setAttribute("aria-current", "true");
        return line;
      }),
    );
    if (focused) body.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
    said.textContent = `${count(rows.length)} of ${count(DATA.num_rows)} rows`;
    position.textContent = rows.length ? `${count(start + 1)}–${count(start + shown.length)}` : "0";
    const last = start + PAGE_LENGTH >= rows.length;
    pages.forEach((button, i) => (button.disabled = i < 2 ? page === 0 : last));
  }

  function select(row) {
    if (row === state.selected) return;
    state.selected = row;
    draw();
    onSelect(row);
  }

  /** Arrow keys select the row above or below, over the borders of pages. */
  body.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, Enter: 0, " ": 0 }[event.key];
    if (step === undefined || !event.target.dataset.row) return;
    event.preventDefault();
    const place = state.rows.indexOf(Number(event.target.dataset.row)) + step;
    if (place < 0 || place >= state.rows.length) return;
    state.page = Math.floor(place / PAGE_LENGTH);
    state.selected = -1;
    select(state.rows[place]);
    const line = body.querySelector("[aria-current]");
    line.focus({ preventScroll: true });
    line.scrollIntoView({ block: "nearest" });
  });

  host.append(
    make("div", { className: "filters" }, search, ...choices.map((choice) => choice.label), clear, said),
    make(
      "div",
      { className: "scroll rows", tabIndex: 0, role: "region", ariaLabel: "Structures" },
      make("table", {}, make("thead", {}, make("tr", {}, ...headers)), body),
    ),
    make("div", { className: "pages" }, ...pages.slice(0, 2), position, ...pages.slice(2)),
  );
  update();
  return { select, find: reset };
}
