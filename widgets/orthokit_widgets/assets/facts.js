// A few numbers with their names, side by side.
export function render({ model, el }) {
  const list = document.createElement("dl");
  const cells = [];
  function show() {
    model.items.forEach((item, index) => {
      if (!cells[index]) {
        const cell = document.createElement("div");
        cell.className = "card";
        const [name, value, unit] = ["dt", "dd", "small"].map((tag) => document.createElement(tag));
        const text = document.createTextNode("");
        value.append(text, " ", unit); // a line may break there
        cell.append(name, value);
        list.append(cell);
        cells.push({ name, text, unit });
      }
      cells[index].name.textContent = item.name;
      cells[index].text.data = item.value;
      cells[index].unit.textContent = item.unit;
    });
  }
  show();
  el.append(list);
  model.on("items", show);
}
