// A model of one's own: by its path where the server allows it, or sent piece by piece over the page's own channel.
export function render({ model, el }) {
  const id = `o${Math.random().toString(36).slice(2, 9)}`;
  const make = (tag, attributes = {}, text = null) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    return node;
  };
  const form = make("form", { "aria-label": "Your own model" });
  form.append(make("h2", {}, "Your own model"));

  const label = make("span", { id: `${id}-use`, class: "label" }, "Open it as");
  const group = make("div", { class: "segments", role: "radiogroup", "aria-labelledby": `${id}-use` });
  for (const [value, text] of [["model", "model"], ["base", "base"], ["beside", "comparison"]]) {
    const part = make("label");
    const input = make("input", { type: "radio", name: `${id}-as`, value });
    input.checked = value === "model";
    part.append(input, make("span", {}, text));
    group.append(part);
  }
  const use = () => group.querySelector("input:checked").value;
  form.append(label, group);

  const where = make("div", { class: "path" });
  const path = make("input", { type: "text", id: `${id}-path`, spellcheck: "false", autocomplete: "off" });
  const open = make("button", { type: "submit" }, "Open");
  where.append(make("label", { for: path.id }, "Path on this machine"), path, open);
  form.append(where);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (model.paths) model.send_msg({ open: path.value, use: use() });
  });

  const drop = make("div", { class: "drop" });
  const chooser = make("input", { type: "file", id: `${id}-file`, "aria-label": "Upload a file" });
  const press = make("label", { class: "press", for: chooser.id }, "Upload a file");
  const help = make("span", { class: "help" });
  drop.append(chooser, press, make("span", {}, "or drop it here"), help);
  form.append(drop);
  el.append(form);

  let file = null;
  function begin(chosen) {
    if (!chosen) return;
    file = chosen;
    model.send_msg({ upload: file.name, size: file.size, use: use() });
  }
  chooser.addEventListener("change", () => { begin(chooser.files[0]); chooser.value = ""; });
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  drop.addEventListener("drop", (event) => begin(event.dataTransfer.files[0]));

  function send() {
    const { token, start, stop } = model.wanted;
    if (!token || !file) return;
    const reader = new FileReader();
    reader.onload = () => model.send_msg({ piece: reader.result.slice(reader.result.indexOf(",") + 1), of: token, start });
    reader.onerror = () => model.send_msg({ unreadable: token });
    reader.readAsDataURL(file.slice(start, stop));
  }
  function show() {
    where.style.display = model.paths ? "" : "none";
    help.textContent = model.help;
  }
  show();
  model.on("paths", show);
  model.on("help", show);
  model.on("wanted", send);
}
