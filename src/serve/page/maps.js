// The two maps: which expert follows which between two layers, and which rank holds which expert.

import { json } from "./api.js";
import { $, count, html, percent, rankColour, style, surface, swatch } from "./draw.js";

let moved = 0; // moves of experts that the placement is drawn after
let seen = -1; // requests done when the affinity was last asked for
let counts = null;
let asked = 0; // requests for counts; only the last one's answer is drawn

export function startMaps(model) {
  const pairs = Math.max(model.moe_layers - 1, 0);
  $("pair").replaceChildren(...[...Array(pairs).keys()].map((l) => html("option", { value: l, textContent: `${l} → ${l + 1}` })));
  const load = async () => {
    if (!pairs) return;
    asked += 1;
    const mine = asked;
    const answer = await json(`/api/affinity?layer=${$("pair").value || 0}`);
    if (mine !== asked) return; // another pair was chosen meanwhile
    counts = answer;
    drawAffinity(model);
  };
  $("pair").onchange = load;
  $("affinity").onmousemove = (event) => tellAffinity(event);
  $("placement").onmousemove = (event) => tellPlacement(model, event);
  const redraw = () => {
    drawAffinity(model);
    drawPlacement(model);
  };
  window.addEventListener("resize", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
  return {
    changed(live) {
      if (live.moves.done !== moved) {
        moved = live.moves.done;
        json("/api/model").then((now) => {
          model.assignment = now.assignment;
          drawPlacement(model);
        }).catch(() => { moved = -1; });
      }
      if (live.requests.finished + live.requests.cancelled !== seen) {
        seen = live.requests.finished + live.requests.cancelled;
        load().catch(() => { seen = -1; });
      }
    },
  };
}

function drawAffinity(model) {
  const experts = model.experts;
  const side = Math.min($("affinity").parentElement.clientWidth, 330);
  const { context } = surface($("affinity"), side);
  const hot = style("--hot");
  const cell = side / Math.max(experts, 1);
  context.fillStyle = style("--ground");
  context.fillRect(0, 0, side, side);
  if (!counts || !counts.tokens) {
    $("affinity-note").textContent = model.moe_layers > 1 ? "No routes counted yet: send a message." : "One MoE layer: nothing follows.";
    return;
  }
  counts.counts.forEach((row, i) => {
    const sum = row.reduce((a, b) => a + b, 0);
    row.forEach((n, j) => {
      if (!n) return;
      context.fillStyle = `rgba(${hot}, ${(0.08 + 0.92 * (n / sum)).toFixed(3)})`;
      context.fillRect(j * cell, i * cell, Math.max(cell - (cell > 6 ? 1 : 0), 0.5), Math.max(cell - (cell > 6 ? 1 : 0), 0.5));
    });
  });
  $("affinity-note").textContent = `Rows: expert of layer ${counts.layer}; columns: expert of layer ${counts.layer + 1}; darker: follows more often. ${count(counts.tokens)} tokens counted.`;
}

function tellAffinity(event) {
  if (!counts?.tokens) return;
  const side = event.target.clientHeight;
  const [i, j] = [event.offsetY, event.offsetX].map((at) => Math.floor((at / side) * counts.experts));
  const row = counts.counts[i];
  if (!row || row[j] === undefined) return;
  const sum = row.reduce((a, b) => a + b, 0);
  const share = sum ? percent(row[j] / sum) : "never seen";
  $("affinity-note").textContent = `Expert ${j} of layer ${counts.layer + 1} follows expert ${i} of layer ${counts.layer}: ${share} of ${count(sum)}.`;
}

const ROW = 18;

function drawPlacement(model) {
  const rows = model.assignment;
  const high = Math.max(4, Math.min(ROW, 330 / Math.max(rows.length, 1)));
  const { context, width } = surface($("placement"), Math.max(high * rows.length, 1));
  rows.forEach((row, l) => row.forEach((ranks, e) => {
    const [x, wide] = [(e * width) / row.length, width / row.length];
    ranks.forEach((rank, copy) => {
      context.fillStyle = rankColour(rank);
      const part = (high - 1) / ranks.length;
      context.fillRect(x, l * high + copy * part, Math.max(wide - (wide > 4 ? 1 : 0), 0.5), part);
    });
  }));
  $("placement-note").textContent = "Rows: MoE layers, the first on top; columns: experts; colour: the rank that holds it.";
  const held = [...Array(model.ranks).keys()].map((rank) => html("span", {}, swatch(rankColour(rank)), `rank ${rank}`));
  $("placement-legend").replaceChildren(...held);
}

function tellPlacement(model, event) {
  const rows = model.assignment;
  const l = Math.floor((event.offsetY / event.target.clientHeight) * rows.length);
  const e = Math.floor((event.offsetX / event.target.clientWidth) * (rows[l]?.length || 0));
  const ranks = rows[l]?.[e];
  if (ranks) $("placement-note").textContent = `Layer ${l}, expert ${e}: rank ${ranks.join(" and ")}.`;
}
