"use strict";
// Reads the lines of a picture off where the pointer is.
const tip = document.getElementById("tip");
function linesOf(svg) {
  svg.lines ??= [...svg.querySelectorAll(".line")].map((line) => ({
    label: line.dataset.label,
    colour: line.classList[1],
    points: [...line.points].map((p) => [p.x, p.y]),
  }));
  return svg.lines;
}
function heightAt(points, x) {
  if (x < points[0][0] || x > points[points.length - 1][0]) return null;
  const after = Math.max(1, points.findIndex((p) => p[0] >= x));
  const [[x0, y0], [x1, y1]] = [points[after - 1], points[after] ?? points[after - 1]];
  return x1 === x0 ? y1 : y0 + ((x - x0) / (x1 - x0)) * (y1 - y0);
}
function show(event) {
  const svg = event.currentTarget;
  const [x0, x1, left, right, y0, y1, bottom, top] = svg.dataset.box.split(" ").map(Number);
  const frame = svg.getBoundingClientRect();
  const x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
  const rows = [];
  for (const { label, colour, points } of linesOf(svg)) {
    const y = heightAt(points, x);
    if (y === null) continue;
    const row = document.createElement("div");
    const name = document.createElement("b");
    name.className = colour;
    name.textContent = label;
    row.append(name, " " + Number((y0 + ((bottom - y) / (bottom - top)) * (y1 - y0)).toPrecision(3)));
    rows.push(row);
  }
  const at = document.createElement("div");
  at.textContent = "at " + Number((x0 + ((x - left) / (right - left)) * (x1 - x0)).toPrecision(3));
  tip.replaceChildren(at, ...rows);
  tip.hidden = rows.length === 0;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(4, Math.min(event.pageX + 14, room + window.scrollX)) + "px";
  tip.style.top = event.pageY + 14 + "px";
}
for (const svg of document.querySelectorAll("svg[data-box]")) {
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
