"use strict";
// Draws the figures of the page in the colours of its light or dark scheme.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function scheme(layout) {
  const [text, grid, paper] = dark.matches
    ? ["#c6d0d8", "#323b44", "#262e36"]
    : ["#3a4651", "#e6eaee", "#ffffff"];
  const colours = { "font.color": text, "hoverlabel.bgcolor": paper, "hoverlabel.font.color": text };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    colours[axis + ".gridcolor"] = grid;
    colours[axis + ".linecolor"] = grid;
  }
  return colours;
}

for (const place of document.querySelectorAll(".plot")) {
  const { data, layout } = figures[Number(place.dataset.figure)];
  const modeBarButtons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
  const options = { responsive: true, displaylogo: false, modeBarButtons };
  Plotly.newPlot(place, data, layout, options).then(() => Plotly.relayout(place, scheme(layout)));
  dark.addEventListener("change", () => Plotly.relayout(place, scheme(layout)));
}
