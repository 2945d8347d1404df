"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = [];

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // colours of text, axes and lines follow the page; the figure's own numbers stay as they came
  function themed(layout) {
    const ink = variable("--ink"), soft = variable("--soft"), line = variable("--line");
    const named = { page: variable("--card"), axis: variable("--axis") };
    const copy = JSON.parse(JSON.stringify(layout));
    copy.autosize = true;
    copy.paper_bgcolor = copy.plot_bgcolor = "rgba(0,0,0,0)";
    copy.font = { family: variable("--sans"), size: 12.5, color: ink };
    copy.hoverlabel = { align: "left", bgcolor: variable("--card"), bordercolor: named.axis, font: { color: ink } };
    for (const key of Object.keys(copy)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      Object.assign(copy[key], { gridcolor: line, linecolor: line, automargin: true, fixedrange: true, exponentformat: "none" });
      copy[key].tickfont = { color: soft, size: 11.5 };
      if (copy[key].title) copy[key].title.font = { color: soft, size: 12.5 };
    }
    for (const shape of copy.shapes || []) shape.line.color = named[shape.line.color] || shape.line.color;
    if (copy.coloraxis) Object.assign(copy.coloraxis.colorbar, { tickfont: { color: soft }, tickcolor: line });
    return copy;
  }

  function draw(figure) {
    const view = figure.views[figure.chosen];
    const options = { responsive: true, displayModeBar: false };
    Plotly.react(figure.plot, view.data, themed(view.layout), options);
  }

  for (const source of document.querySelectorAll("script[data-figure]")) {
    const holder = source.parentElement;
    const figure = { views: JSON.parse(source.textContent), chosen: 0, plot: holder.querySelector(".plot") };
    const bar = holder.querySelector(".views");
    if (figure.views.length > 1) {
      figure.views.forEach((view, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = view.label;
        button.setAttribute("aria-pressed", String(index === 0));
        button.addEventListener("click", () => {
          figure.chosen = index;
          bar.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
          draw(figure);
        });
        bar.append(button);
      });
    }
    figures.push(figure);
    draw(figure);
  }
  dark.addEventListener("change", () => figures.forEach(draw));
})();
