// The element stays and only its text changes: that is what screen readers announce.
export function render({ model, el }) {
  const box = document.createElement("div");
  box.className = `note ${model.role}`;
  box.setAttribute("role", model.role);
  const show = () => { if (box.textContent !== model.text) box.textContent = model.text; };
  el.append(box);
  show();
  model.on("text", show);
}
