// The way of one token: layers from left to right, ranks from top to bottom, a line from residence to residence.

import { $, percent, rankColour, svg } from "./draw.js";

const [LEFT, TOP, BOTTOM] = [46, 12, 34];

export function drawPath(model, token) {
  const picture = $("path");
  const layers = Math.max(model.moe_layers, 1);
  const step = Math.max(34, Math.min(60, 400 / layers));
  const high = Math.max(20, Math.min(44, 260 / model.ranks));
  const [width, height] = [LEFT + step * layers + 8, TOP + high * model.ranks + BOTTOM];
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.style.minWidth = layers > 12 ? `${width}px` : "0";
  const x = (layer) => LEFT + step * (layer + 0.5);
  const y = (rank) => TOP + high * (rank + 0.5);
  const parts = frame(model, layers, x, y, width, height);
  const hops = token?.path || [];
  const to = hops.map((hop) => `${x(hop.layer).toFixed(1)} ${y(hop.rank).toFixed(1)}`);
  if (to.length) {
    parts.push(svg("path", { d: `M${to.join("L")}`, fill: "none", stroke: "var(--accent)", "stroke-width": 2, class: "line" }));
  }
  for (const hop of hops) parts.push(...stop(model, hop, x(hop.layer), y));
  picture.replaceChildren(...parts);
  if (token) $("path-note").textContent = words(model, token, hops);
}

function frame(model, layers, x, y, width, height) {
  const parts = [];
  for (let rank = 0; rank < model.ranks; rank += 1) {
    parts.push(svg("line", { x1: LEFT, x2: width - 8, y1: y(rank), y2: y(rank), stroke: "var(--line)" }));
    parts.push(svg("text", { x: 2, y: y(rank) + 4 }, `rank ${rank}`));
  }
  const every = Math.ceil(layers / 16);
  for (let layer = 0; layer < layers; layer += every) {
    parts.push(svg("text", { x: x(layer), y: height - 16, "text-anchor": "middle", class: "soft" }, String(layer)));
  }
  parts.push(svg("text", { x: LEFT, y: height - 3, class: "soft" }, "MoE layer; in a circle: the main expert"));
  return parts;
}

// The residence with its main expert, and a thin line to every other rank that serves one of the chosen experts.
function stop(model, hop, x, y) {
  const serving = hop.experts.map((expert) => {
    const holders = model.assignment[hop.layer]?.[expert] || [];
    return holders.includes(hop.rank) ? hop.rank : holders[0];
  });
  const away = [...new Set(serving)].filter((rank) => rank !== undefined && rank !== hop.rank);
  const parts = away.flatMap((rank) => [
    svg("line", { x1: x, x2: x + 7, y1: y(hop.rank), y2: y(rank), stroke: rankColour(rank), "stroke-dasharray": "3 2" }),
    svg("circle", { cx: x + 7, cy: y(rank), r: 3, fill: rankColour(rank) }),
  ]);
  const disc = svg("circle", { cx: x, cy: y(hop.rank), r: 10, fill: "var(--card)", stroke: rankColour(hop.rank), "stroke-width": 2 });
  const each = hop.experts.map((expert, k) => `expert ${expert} on rank ${serving[k]}, weight ${percent(hop.weights[k])}`);
  disc.append(svg("title", {}, `layer ${hop.layer}, on rank ${hop.rank}: ${each.join("; ")}`));
  parts.push(disc, svg("text", { x, y: y(hop.rank) + 4, "text-anchor": "middle", "pointer-events": "none" }, String(hop.experts[0])));
  return parts;
}

function words(model, token, hops) {
  const name = token.text ? `“${token.text.replace(/\n/g, "⏎")}”` : `token ${token.token}`;
  if (!hops.length) return `${name}: its way was not told.`;
  const moves = hops.slice(1).filter((hop, i) => hop.rank !== hops[i].rank).length;
  const ranks = hops.filter((hop, i) => !i || hop.rank !== hops[i - 1].rank).map((hop) => hop.rank);
  const share = hops.length > 1 ? `, ${percent(1 - moves / (hops.length - 1))} of its transitions stayed` : "";
  return `${name} was made over ${hops.length} MoE layers; its residence: rank ${ranks.join(" → ")}${share}.`;
}
