// The matrices of a model as a table: a press on a head sorts, a tick draws a spectrum, words filter by name.
export function render({ model, el }) {
  const make = (tag, text = null, name = "") => {
    const node = document.createElement(tag);
    if (text !== null) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const box = make("section", null, "card");
  el.append(box);
  const top = make("div", null, "top");
  const filter = make("input");
  filter.type = "search";
  const label = make("label", "Names with ");
  label.append(filter);
  const count = make("span", "", "count");
  top.append(make("h2", "What is each matrix like?"), label, count);
  const scroll = make("div", null, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Matrices, measured");
  const rest = make("div", null, "rest");
  box.append(top, scroll, rest);

  let table = { columns: [], rows: [], lists: [] };
  let lines = [], heads = new Map(), body = null;
  const drawable = 400; // rows in the page at first; more come with the scrolling, as a row costs layout
  let shown = 0, order = [];

  function compare(column, falling) {
    return (a, b) => {
      const [x, y] = [table.rows[a].keys[column], table.rows[b].keys[column]];
      if (x === null || y === null) return x === y ? a - b : x === null ? 1 : -1; // no value comes last, either way
      const less = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return (falling ? -less : less) || a - b;
    };
  }
  function line(place) {
    if (lines[place]) return lines[place];
    const { cells } = table.rows[place];
    const row = make("tr");
    const tick = make("input");
    tick.type = "checkbox";
    tick.dataset.place = place;
    tick.setAttribute("aria-label", `draw the spectrum of ${cells[0]}`);
    tick.addEventListener("change", () => model.send_msg({ tick: place, on: tick.checked }));
    const first = make("td", null, "tick");
    first.append(tick);
    row.append(first);
    cells.forEach((text, at) => {
      const { name, kind } = table.columns[at];
      const cell = make(at ? "td" : "th", text, name === "verdict" || name === "note" || name === "alpha_refused" ? "wide" : kind);
      if (!at) cell.scope = "row";
      row.append(cell);
    });
    lines[place] = row;
    mark(row, place);
    return row;
  }
  function mark(row, place) {
    const tick = row.querySelector("input");
    tick.checked = model.ticked.includes(place);
    tick.disabled = !model.tickable;
    row.classList.toggle("ticked", tick.checked);
  }
  const marks = () => lines.forEach((row, place) => { if (row) mark(row, place); });

  function fill(upto) {
    for (; shown < Math.min(upto, order.length); shown++) body.append(line(order[shown]));
  }
  scroll.addEventListener("scroll", () => {
    if (body && shown < order.length && scroll.scrollTop + scroll.clientHeight > scroll.scrollHeight - 600) fill(shown + 200);
  });
  function arrange(keep = false) {
    if (!body) return;
    const [top, before] = [scroll.scrollTop, shown];
    const { name, falling } = model.sort;
    const column = table.columns.findIndex((each) => each.name === name);
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (place) => words.every((word) => table.rows[place].cells[0].toLowerCase().includes(word));
    order = table.rows.map((_, place) => place).filter(fits);
    if (column >= 0) order.sort(compare(column, falling));
    const focused = el.getRootNode().activeElement;
    body.replaceChildren();
    shown = 0;
    fill(keep ? Math.max(drawable, before) : drawable);
    scroll.scrollTop = keep ? top : 0;
    if (focused?.dataset?.place !== undefined && focused.isConnected) focused.focus();
    for (const [own, head] of heads) {
      head.setAttribute("aria-sort", own !== name ? "none" : falling ? "descending" : "ascending");
    }
    count.textContent = words.length ? `${order.length} of ${table.rows.length}` : "";
  }
  function build() {
    const before = el.getRootNode().activeElement?.dataset ?? {};
    const same = table.columns.map((each) => each.name).join() === JSON.parse(model.content).columns.map((each) => each.name).join();
    table = JSON.parse(model.content);
    lines = [];
    if (!table.rows.length) {
      scroll.replaceChildren(make("p", model.empty, "none"));
      body = null;
    } else if (!same || !body) {
      const node = make("table");
      const head = make("tr");
      const first = make("td", "");
      first.append(make("span", "spectrum drawn", "hidden"));
      head.append(first);
      heads = new Map();
      for (const column of table.columns) {
        const cell = make("th", null, column.kind);
        cell.scope = "col";
        cell.title = column.help;
        const press = make("button", column.label);
        press.type = "button";
        press.dataset.head = column.name;
        press.addEventListener("click", () => model.send_msg({ sort: column.name }));
        cell.append(press);
        head.append(cell);
        heads.set(column.name, cell);
      }
      node.append(make("thead"), make("tbody"));
      node.tHead.append(head);
      body = node.tBodies[0];
      scroll.replaceChildren(node);
    }
    arrange(same);
    if (before.head) heads.get(before.head)?.querySelector("button").focus();
    else if (before.place !== undefined) lines[before.place]?.querySelector("input").focus();
    const open = new Set([...rest.querySelectorAll("details[open] summary")].map((each) => each.dataset.kind));
    rest.replaceChildren(...table.lists.map((each) => {
      const details = make("details");
      const summary = make("summary", each.title);
      summary.dataset.kind = each.kind;
      details.open = open.has(each.kind);
      const list = make("ul");
      list.append(...each.lines.map((text) => make("li", text)));
      details.append(summary, list);
      return details;
    }));
  }
  build();
  filter.addEventListener("input", () => arrange());
  model.on("content", build);
  model.on("empty", build);
  model.on("sort", () => arrange());
  model.on("ticked", marks);
  model.on("tickable", marks);
}
