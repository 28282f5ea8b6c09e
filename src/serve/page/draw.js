// What all drawings share: elements, colours, numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function svg(name, attributes = {}, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function html(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const HUES = [215, 28, 152, 340, 265, 48, 185, 0];

// A rank's colour, readable on light and dark; further ranks repeat the hues in other lightness.
export function rankColour(rank) {
  const round = Math.floor(rank / HUES.length);
  return `hsl(${HUES[rank % HUES.length]} ${round % 2 ? 45 : 68}% ${[52, 66, 40][round % 3]}%)`;
}

export function swatch(colour) {
  const mark = html("i", { className: "swatch" });
  mark.style.background = colour;
  return mark;
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit && n < 100 ? n.toPrecision(3) : Math.round(n)} ${units[unit]}`;
}

export const count = (n) => Math.round(n).toLocaleString("en");
export const percent = (x) => `${(100 * x).toFixed(1)} %`;

// A canvas as sharp as the screen; returns its context and its size in CSS pixels.
export function surface(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

export const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
