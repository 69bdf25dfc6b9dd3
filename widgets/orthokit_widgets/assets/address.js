// Keeps the settings in the address without filling the browser's history with every position of a slider.
export function render({ model }) {
  const write = () => {
    if (!model.active) return;
    const url = new URL(window.location.href);
    url.search = model.query;
    if (url.href !== window.location.href) window.history.replaceState(window.history.state, "", url);
  };
  model.on("query", write);
}
