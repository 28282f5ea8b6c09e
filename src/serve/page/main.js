// Starts the page: the model once, then its figures as they come.

import { Refused, events, json, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { $, bytes, count, html, percent, svg } from "./draw.js";
import { startMaps } from "./maps.js";
import { drawPath } from "./path.js";
import { drawRanks } from "./ranks.js";

const history = []; // tokens/s, one for each half second
const HISTORY = 120;

function tile(list, id, title, value, unit) {
  let cell = $(id);
  if (!cell) {
    cell = html("dd", { id });
    list.append(html("div", {}, html("dt", { textContent: title }), cell));
  }
  cell.replaceChildren(value, ...(unit ? [" ", html("small", { textContent: unit })] : []));
  return cell;
}

function spark(cell) {
  const top = Math.max(...history, 1);
  const from = HISTORY - history.length; // the newest at the right
  const point = (value, i) => `${((100 * (from + i)) / (HISTORY - 1)).toFixed(1)},${(21 - (20 * value) / top).toFixed(1)}`;
  const line = svg("svg", { viewBox: "0 0 100 22", preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" });
  line.append(svg("path", { d: `M${history.map(point).join("L")}`, "vector-effect": "non-scaling-stroke" }));
  cell.append(line);
}

const mean = (sum, n) => (n ? (sum / n).toFixed(1) : "–");

function figures(live) {
  const list = $("tiles");
  const moving = live.running + live.waiting > 0;
  history.push(moving ? live.tokens_per_s : 0);
  if (history.length > HISTORY) history.shift();
  spark(tile(list, "tokens-per-s", "Tokens/s", moving ? live.tokens_per_s.toFixed(1) : "0", ""));
  tile(list, "requests", "Run, wait", `${live.running}, ${live.waiting}`, "requests");
  tile(list, "batch", "Batch", live.batch.toFixed(1), "tokens");
  tile(list, "ttft", "First token", mean(live.ttft_ms_sum, live.ttft_count), "ms");
  tile(list, "tpot", "Each further", mean(live.tpot_ms_sum, live.tpot_count), "ms");
  tile(list, "tokens", "Tokens made", count(live.output_tokens), "");
  tile(list, "finished", "Requests done", count(live.requests.finished), live.requests.refused ? `${live.requests.refused} refused` : "");
}

const CLASSES = [["dispatch", 215], ["combine", 28], ["kv", 152], ["ids", 265], ["control", 340]];

function plan(model, live) {
  const list = $("plan");
  tile(list, "strategy", "Strategy", model.strategy, `in ${model.schedule === "flow" ? "flow" : "rounds"}`);
  tile(list, "placement-name", "Placement", model.placement, "");
  tile(list, "exchanges", "Exchanges per MoE layer", model.ranks > 1 ? live.exchanges_per_layer.toFixed(2) : "none", "");
  tile(list, "stay", "Transitions that stay", model.ranks > 1 ? percent(live.stay_rate) : "all", "");
  if (model.predicted_ms_per_token) {
    tile(list, "predicted", "Predicted", model.predicted_ms_per_token.toFixed(2), "ms a token");
    tile(list, "measured", "Measured", mean(live.tpot_ms_sum, live.tpot_count), "ms a token");
  }
  const all = CLASSES.reduce((sum, [name]) => sum + live.bytes[name], 0);
  const part = ([name, hue]) => {
    const piece = html("i", { title: `${name}: ${bytes(live.bytes[name])}` });
    piece.style.cssText = `width:${all ? (100 * live.bytes[name]) / all : 0}%;background:hsl(${hue} 60% 52%)`;
    return piece;
  };
  $("classes").replaceChildren(...CLASSES.map(part));
  const words = ([name, hue]) => {
    const mark = html("i", { className: "swatch" });
    mark.style.background = `hsl(${hue} 60% 52%)`;
    return html("span", {}, mark, `${name} ${bytes(live.bytes[name])}`);
  };
  $("classes-legend").replaceChildren(...(all ? CLASSES.map(words) : ["Nothing has travelled between ranks yet."]));
}

function say(text, state) {
  $("state").textContent = text;
  $("state").className = state;
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function watch(model, maps) {
  let made = 0;
  for (;;) {
    try {
      await events("/api/live", {}, (live) => {
        // An answer may begin and end between two pictures.
        const busy = live.running + live.waiting > 0 || (made > 0 && live.output_tokens > made);
        made = live.output_tokens;
        say(busy ? "at work" : "ready", "live");
        figures(live);
        plan(model, live);
        drawRanks(model, live);
        maps.changed(live);
      });
      say("the server has ended", "lost");
    } catch (error) {
      say(error instanceof Refused ? error.message : "no connection; trying again", "lost");
    }
    await pause(2000);
  }
}

function describe(model) {
  $("model-name").textContent = model.name;
  document.title = `exflow: ${model.name}`;
  const experts = model.experts ? `${model.moe_layers} MoE layers × ${model.experts} experts, top-${model.top_k}` : `${model.layers} layers`;
  $("model-facts").textContent = `${experts}, ${model.ranks} ${model.ranks === 1 ? "rank" : "ranks"} (${model.transport})`;
}

async function start() {
  const model = await json("/api/model");
  $("key-form").hidden = true;
  describe(model);
  drawPath(model, null);
  startChat(model, (token) => drawPath(model, token));
  watch(model, startMaps(model));
}

async function begin() {
  try {
    await start();
  } catch (error) {
    say(error.message, "lost");
    if (error instanceof Refused && error.status === 401) {
      $("key-form").hidden = false;
      $("key").focus();
    } else {
      await pause(2000);
      begin();
    }
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  begin();
});
begin();
