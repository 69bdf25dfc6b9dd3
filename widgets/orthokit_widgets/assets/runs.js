// The recorded runs as a table; a tick draws a run over the others.
const COLUMNS = [["name", "run"], ["status", "state"], ["what", "what"], ["steps", "steps"], ["loss", "last loss"], ["created", "started"], ["error", "note"]];

export function render({ model, el }) {
  const box = document.createElement("section");
  box.className = "card";
  el.append(box);
  const cell = (tag, text, name = "") => {
    const node = document.createElement(tag);
    node.textContent = text;
    node.className = name;
    return node;
  };
  const top = document.createElement("div");
  top.className = "top";
  const again = cell("button", "Read the folder again");
  again.type = "button";
  again.addEventListener("click", () => model.send_msg({ action: "reread" }));
  const where = cell("span", "");
  where.style.color = "var(--soft)";
  top.append(cell("h2", "Recorded runs"), where, again);
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Recorded runs");
  box.append(top, scroll);

  function show() {
    where.textContent = model.folder;
    const focused = el.getRootNode().activeElement?.dataset?.run;
    scroll.replaceChildren();
    if (!model.rows.length) {
      scroll.append(cell("p", "No run here yet: press Start, or record one in a notebook.", "none"));
      return;
    }
    const table = document.createElement("table");
    const head = document.createElement("tr");
    head.append(cell("th", "draw"), ...COLUMNS.map(([key, text]) => {
      const title = cell("th", text, ["steps", "loss"].includes(key) ? "number" : "");
      title.scope = "col";
      return title;
    }));
    const body = document.createElement("tbody");
    for (const row of model.rows) {
      const line = document.createElement("tr");
      const tick = document.createElement("input");
      tick.type = "checkbox";
      tick.checked = row.chosen;
      tick.disabled = !row.drawable;
      tick.dataset.run = row.name;
      tick.setAttribute("aria-label", `draw ${row.name}`);
      tick.addEventListener("change", () => model.send_msg({ draw: row.name, on: tick.checked }));
      const first = document.createElement("td");
      first.append(tick);
      line.append(first);
      for (const [key] of COLUMNS) {
        const kind = { steps: "number", loss: "number", error: "wide", status: `state ${row.status}` }[key] || "";
        line.append(cell("td", row[key], kind));
      }
      body.append(line);
      if (row.name === focused) queueMicrotask(() => tick.focus());
    }
    table.append(document.createElement("thead"), body);
    table.tHead.append(head);
    scroll.append(table);
  }
  show();
  model.on("rows", show);
  model.on("folder", show);
}
