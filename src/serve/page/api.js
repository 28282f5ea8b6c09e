// Talking to the server: JSON, and server-sent events over fetch, which can carry the key.

let key = sessionStorage.getItem("exflow-key") || "";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(text) {
  key = text;
  sessionStorage.setItem("exflow-key", text);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not JSON: the status says enough */ }
  throw new Refused(response.status, message);
}

export async function json(path) {
  return (await request(path)).json();
}

// Calls `each` with the data of every event until the server ends the stream.
export async function events(path, options, each) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length && data[0] !== "[DONE]") each(JSON.parse(data.join("\n")));
    }
  }
}

export function post(body, signal) {
  return {
    method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  };
}
