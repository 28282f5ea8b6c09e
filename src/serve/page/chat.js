// The chat box: streams an answer, each token of it a button that shows its way.

import { events, post } from "./api.js";
import { $, html } from "./draw.js";

const said = []; // the conversation so far, as the server wants it
let running = null;

export function startChat(model, show) {
  const chat = model.chat && model.text;
  if (!chat) {
    $("chat-title").textContent = "Continue a text";
    $("prompt-label").textContent = "A beginning, which the model goes on from (it has no chat template)";
  }
  if (!model.text) {
    $("prompt-label").textContent = "Token ids, as in 1, 2, 3 (the model has no tokenizer)";
  }
  $("ask").onsubmit = (event) => {
    event.preventDefault();
    if (!running) send(model, chat, show);
  };
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  };
  $("stop").onclick = () => running?.abort();
  $("clear").onclick = () => {
    running?.abort();
    said.length = 0;
    $("log").replaceChildren();
    show(null);
    $("prompt").focus();
  };
  $("log").addEventListener("keydown", (event) => walk(event));
}

// Arrow keys move over the tokens of an answer.
function walk(event) {
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  const at = tokens.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -at, End: tokens.length - 1 - at }[event.key];
  const next = tokens[at + step];
  if (at < 0 || step === undefined || !next) return;
  event.preventDefault();
  next.focus();
  next.click();
}

function body(model, chat, text) {
  const common = {
    model: model.name, stream: true, exflow: { path: true },
    max_tokens: Number($("max-tokens").value) || 80,
    temperature: Number($("temperature").value),
  };
  if (chat) return { ...common, messages: said };
  return { ...common, prompt: model.text ? text : text.split(",").map(Number) };
}

async function send(model, chat, show) {
  const text = $("prompt").value;
  $("prompt").value = "";
  $("log").querySelector(".hint")?.remove();
  said.push({ role: "user", content: text });
  $("log").append(html("p", { className: "said user", textContent: text }));
  const answer = html("p", { className: "said assistant" });
  $("log").append(answer);
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  let whole = "";
  try {
    const address = chat ? "/v1/chat/completions" : "/v1/completions";
    await events(address, post(body(model, chat, text), running.signal), (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      whole += (choice?.delta ? choice.delta.content : choice?.text) || "";
      for (const token of choice?.exflow?.tokens || []) add(answer, token, show);
    });
    said.push({ role: "assistant", content: whole });
  } catch (error) {
    if (error.name !== "AbortError") {
      $("log").append(html("p", { className: "said failed", textContent: error.message }));
    }
    said.push({ role: "assistant", content: whole });
  }
  running = null;
  answer.dataset.done = "true";
  $("send").disabled = false;
  $("stop").disabled = true;
}

function add(answer, token, show) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const first = !log.querySelector(".token");
  const button = html("button", { type: "button", className: "token", textContent: token.text, tabIndex: first ? 0 : -1 });
  button.setAttribute("aria-pressed", "false");
  if (!token.text) button.setAttribute("aria-label", `token ${token.token}`);
  button.onclick = () => {
    for (const other of log.querySelectorAll(".token[aria-pressed='true'], .token[tabindex='0']")) {
      other.setAttribute("aria-pressed", "false");
      other.tabIndex = -1;
    }
    button.setAttribute("aria-pressed", "true");
    button.tabIndex = 0;
    show(token);
  };
  answer.append(button);
  if (follows) log.scrollTop = log.scrollHeight;
}
