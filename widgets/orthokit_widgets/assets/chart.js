// One chart: its question as a heading, the plot, and the sentence that answers the question.
const CONFIG = { displaylogo: false, responsive: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], toImageButtonOptions: { scale: 2 } };

export function render({ model, el }) {
  const figure = document.createElement("figure");
  figure.className = "card";
  const title = document.createElement("h2");
  const plot = document.createElement("div");
  plot.className = "plot";
  const empty = document.createElement("div");
  empty.className = "empty";
  const caption = document.createElement("figcaption");
  figure.append(title, plot, empty, caption);
  el.append(figure);

  let busy = false, again = false, width = 0, listening = false;
  function listen() {
    if (listening) return;
    listening = true;
    plot.on("plotly_click", (event) => {
      const point = event.points.find((each) => each.customdata);
      if (point) model.send_msg({ pick: point.customdata });
    });
  }
  async function draw() {
    if (busy) { again = true; return; }
    busy = true;
    do {
      again = false;
      const { heading, text, data, layout, message } = JSON.parse(model.figure);
      title.textContent = heading;
      figure.setAttribute("aria-label", heading);
      caption.textContent = text;
      empty.textContent = message || "";
      empty.style.display = message ? "flex" : "none";
      empty.style.height = `${model.plot_height}px`;
      plot.style.display = message ? "none" : "block";
      if (message || !window.Plotly) continue;
      width = plot.clientWidth;
      // A slow browser skips frames instead of queueing them.
      await window.Plotly.react(plot, data, { ...layout, width: width || undefined, height: model.plot_height }, CONFIG);
      listen();
    } while (again);
    busy = false;
  }
  const size = new ResizeObserver(() => {
    if (plot.clientWidth && plot.clientWidth !== width) draw();
  });
  size.observe(plot);
  model.on("figure", draw);
  model.on("plot_height", draw);
  model.on("remove", () => { size.disconnect(); if (window.Plotly) window.Plotly.purge(plot); });
  // The script of the charts may still be on its way in a notebook.
  let tries = 0;
  (function start() {
    if (window.Plotly || tries++ > 100) draw();
    else setTimeout(start, 100);
  })();
}
