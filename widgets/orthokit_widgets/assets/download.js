// A file that comes in pieces over the page's own channel, so that notebooks can save it too and no piece is large.
const PATIENCE = 10_000; // ms after which a piece is asked for once more

export function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "download";
  const button = document.createElement("button");
  button.type = "button";
  const note = document.createElement("span");
  note.setAttribute("role", "status");
  box.append(button, note);
  el.append(box);

  let pieces = [], offer = null, timer = null;
  function ask() {
    clearTimeout(timer);
    if (!offer) return;
    model.send_msg({ piece: pieces.length, of: offer.token });
    timer = setTimeout(ask, PATIENCE);
  }
  function begin() {
    clearTimeout(timer);
    offer = model.offer.token ? model.offer : null;
    pieces = [];
    if (offer) ask();
    show();
  }
  function take() {
    const { of, index, data } = model.piece;
    if (!offer || of !== offer.token || index !== pieces.length) return;
    pieces.push(Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)));
    if (pieces.length < offer.pieces) ask();
    else save();
    show();
  }
  function save() {
    clearTimeout(timer);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(pieces, { type: "application/octet-stream" }));
    link.download = offer.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    model.send_msg({ saved: offer.token });
    pieces = [];
    offer = null;
  }
  const show = () => {
    button.textContent = model.label;
    button.disabled = model.disabled || offer !== null;
    note.textContent = offer ? `${Math.round(100 * pieces.length / offer.pieces)} %` : model.note;
  };
  button.addEventListener("click", () => model.send_msg({ action: "export" }));
  show();
  for (const name of ["label", "note", "disabled"]) model.on(name, show);
  model.on("offer", begin);
  model.on("piece", take);
}
