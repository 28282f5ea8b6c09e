// The ranks and hosts as a picture: one circle a rank, one arc a direction of a link, as thick as its traffic.

import { $, bytes, count, html, percent, rankColour, svg, swatch } from "./draw.js";

const SIZE = 320;
const MIDDLE = SIZE / 2;

function places(ranks) {
  const radius = ranks > 1 ? 105 : 0;
  const at = (rank) => {
    const angle = (2 * Math.PI * rank) / ranks - Math.PI / 2 + (ranks === 2 ? Math.PI / 2 : 0);
    return { x: MIDDLE + radius * Math.cos(angle), y: MIDDLE + radius * Math.sin(angle) };
  };
  return [...Array(ranks).keys()].map(at);
}

// From one rank to another, bent to the right, so that both directions are seen.
function arc(a, b, bend) {
  const [mx, my, dx, dy] = [(a.x + b.x) / 2, (a.y + b.y) / 2, b.x - a.x, b.y - a.y];
  const long = Math.hypot(dx, dy) || 1;
  return `M${a.x.toFixed(1)} ${a.y.toFixed(1)}Q${(mx - (dy / long) * bend).toFixed(1)} ${(my + (dx / long) * bend).toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
}

export function drawRanks(model, live) {
  const picture = $("ranks");
  picture.setAttribute("viewBox", `0 0 ${SIZE} ${model.ranks > 1 ? SIZE : 120}`);
  const spots = model.ranks > 1 ? places(model.ranks) : [{ x: MIDDLE, y: 60 }];
  const radius = Math.max(9, Math.min(26, 150 / Math.max(model.ranks, 1)));
  const rates = live.traffic_per_s;
  const moving = live.running + live.waiting > 0;
  const most = Math.max(1, ...rates.flat());
  const lines = [];
  let busiest = null;
  for (let from = 0; from < model.ranks; from += 1) {
    for (let to = 0; to < model.ranks; to += 1) {
      if (from === to) continue;
      const rate = moving ? rates[from][to] : 0;
      if (rate && (!busiest || rate > busiest.rate)) busiest = { from, to, rate };
      const line = svg("path", {
        d: arc(spots[from], spots[to], 14), fill: "none", stroke: rate ? rankColour(from) : "var(--line)",
        "stroke-width": rate ? (1 + (6 * Math.sqrt(rate / most))).toFixed(1) : 1, "stroke-opacity": rate ? 0.75 : 1,
      });
      line.append(svg("title", {}, `rank ${from} to rank ${to}: ${bytes(rate)}/s now, ${bytes(live.traffic[from][to])} in all`));
      lines.push(line);
    }
  }
  const circles = spots.flatMap(({ x, y }, rank) => {
    const disc = svg("circle", { cx: x, cy: y, r: radius, fill: "var(--card)", stroke: rankColour(rank), "stroke-width": 3 });
    const own = live.ranks[rank];
    disc.append(svg("title", {}, `rank ${rank}: ${model.adapters[rank]}`));
    const used = own.kv_blocks ? own.kv_blocks_used / own.kv_blocks : 0;
    const fill = svg("circle", { cx: x, cy: y, r: (radius * Math.sqrt(used)).toFixed(1), fill: rankColour(rank), "fill-opacity": 0.45 });
    const name = svg("text", { x, y: y + 4, "text-anchor": "middle", "font-weight": 600 }, String(rank));
    return [disc, fill, name];
  });
  picture.replaceChildren(...lines, ...circles, ...hostNames(model, spots));
  $("links-note").textContent = note(model, busiest);
  table(model, live);
}

function hostNames(model, spots) {
  const hosts = [...new Set(model.hosts || [])];
  if (hosts.length < 2) return [];
  return hosts.map((host) => {
    const own = spots.filter((_, rank) => model.hosts[rank] === host);
    const [x, y] = ["x", "y"].map((axis) => own.reduce((sum, spot) => sum + spot[axis], 0) / own.length);
    const out = 1.42;
    return svg("text", {
      x: (MIDDLE + (x - MIDDLE) * out).toFixed(1), y: (MIDDLE + (y - MIDDLE) * out).toFixed(1), class: "soft", "text-anchor": "middle",
    }, host);
  });
}

function note(model, busiest) {
  if (model.ranks === 1) return "One rank: nothing travels.";
  const kv = "A circle fills with its K/V cache.";
  if (!busiest) return `No request runs, so no row travels. ${kv}`;
  return `Busiest link: rank ${busiest.from} to rank ${busiest.to}, ${bytes(busiest.rate)}/s. ${kv}`;
}

function table(model, live) {
  const pairs = live.ranks.reduce((sum, rank) => sum + rank.pairs, 0);
  const row = (own, rank) => {
    const used = own.kv_blocks ? own.kv_blocks_used / own.kv_blocks : 0;
    const meter = html("meter", { min: 0, max: 1, value: used });
    meter.setAttribute("aria-label", `K/V cache of rank ${rank}`);
    return html("tr", {},
      html("th", { scope: "row" }, swatch(rankColour(rank)), String(rank)),
      html("td", { title: `${count(own.kv_blocks_used)} of ${count(own.kv_blocks)} blocks` }, meter, ` ${percent(used)}`),
      html("td", { textContent: own.memory_bytes === null ? "not told" : bytes(own.memory_bytes) }),
      html("td", { textContent: pairs ? percent(own.pairs / pairs) : "–" }));
  };
  $("rank-table").tBodies[0].replaceChildren(...live.ranks.map(row));
  const names = [...new Set(model.adapters)];
  const ranksOf = (name) => live.ranks.map((_, rank) => rank).filter((rank) => model.adapters[rank] === name).join(", ");
  $("adapters").textContent = names.map((name) => (names.length > 1 ? `${ranksOf(name)}: ${name}` : name)).join("; ");
}
