// Elements of the document, and figures as text.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "g", "rect", "text", "title"]);

export const byId = (id) => document.getElementById(id);
export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
export const count = (number, one) => `${number} ${one}${number === 1 ? "" : "s"}`;

export function figure(number) {
  if (Number.isInteger(number)) return String(number);
  return Math.abs(number) < 1 ? number.toPrecision(2) : number.toFixed(2);
}

// What begins with "on" listens; children that are words become text.
export function make(tag, attributes = {}, ...children) {
  const node = SHAPES.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// New children; the button in focus stays so, or else the one in its place.
export function redraw(node, ...children) {
  const buttons = () => [...node.querySelectorAll("button:enabled")];
  const place = buttons().indexOf(document.activeElement);
  const key = document.activeElement.dataset.key;
  node.replaceChildren(...children);
  if (place < 0) return;
  const again = buttons();
  const same = again.find((button) => button.dataset.key === key) ?? again[Math.min(place, again.length - 1)];
  same?.focus({ preventScroll: true });
}
