"use strict";
// Draws the figures in the page's colours, again when the system changes between light and dark.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

// A copy of plotly's data with "c0", "c1", ... replaced by the page's colours
function painted(value, key) {
  if (Array.isArray(value)) return value.map((item) => painted(item, key));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
  }
  if (key !== "color" || typeof value !== "string") return value;
  if (value === "text") return color("text");
  return /^c\d+$/.test(value) ? color("c" + (Number(value.slice(1)) % 6)) : value;
}

function axis(given) {
  const common = {
    automargin: true, gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("line"), fixedrange: false,
  };
  return { ...common, ...given };
}

function layout(figure, width) {
  const given = painted(figure.layout);
  const narrow = width < 500;
  return {
    margin: { l: 10, r: 10, t: 10, b: 10 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("text"), size: narrow ? 12 : 13, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
    ...given,
    xaxis: axis(given.xaxis),
    yaxis: axis(given.yaxis),
  };
}

function draw() {
  for (const figure of figures) {
    const place = document.getElementById("plot-" + figure.id);
    const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
    Plotly.react(place, painted(figure.data), layout(figure, place.clientWidth), config);
  }
}

draw();
dark.addEventListener("change", draw);
