// The attention as a picture: a line for each head, a column for each event.

import { byId, cut, make, percent } from "./elements.js";

const [NAMES, TOP, HIGH, LAST] = [46, 100, 21, 64]; // pixels: the lines' names, the titles, a line, the last title's lean
const HINT = "Share of attention by layer (L) and head (H); the stronger the colour, the more. Point at a cell to read it.";

export function drawAttention(read) {
  const lines = linesOf(read);
  const said = make("p", { class: "quiet said" }, HINT);
  const names = lines.map((line, place) => make("text", { x: 0, y: placed(place) + 14 }, line.name));
  const beside = make("svg", { width: NAMES, height: placed(lines.length), "aria-hidden": "true" }, ...names);
  const map = drawMap(read, lines, (words) => (said.textContent = words));
  const about = { class: "scroll", tabindex: "0", role: "group", "aria-label": "Attention by head and event" };
  const scroll = make("div", about, map);
  requestAnimationFrame(() => (scroll.scrollLeft = scroll.scrollWidth));
  return make("div", { class: "attention" },
    make("h3", {}, "What the model looked at"), make("div", { class: "map" }, beside, scroll), said);
}

function linesOf(read) {
  const all = { name: "all", words: "all heads", shares: read.map((event) => event.share) };
  const heads = read[0].layers.flatMap((shares, layer) => shares.map((_, head) => ({
    name: `L${layer + 1} H${head + 1}`,
    words: `layer ${layer + 1}, head ${head + 1}`,
    shares: read.map((event) => event.layers[layer][head]),
  })));
  return [all, ...heads];
}

const placed = (line) => TOP + HIGH * line + (line ? 4 : 0);

function drawMap(read, lines, say) {
  const lists = byId("lists");
  const column = parseFloat(getComputedStyle(lists).gridTemplateColumns) || lists.clientWidth; // none before the first list
  const wide = Math.max(17, Math.min(64, Math.floor((column - NAMES - LAST - 38) / read.length)));
  const most = Math.max(...lines.flatMap((line) => line.shares)) || 1;
  const columns = read.map((event, place) => {
    const cells = lines.map((line, down) => {
      const words = `${event.title} · ${line.words} · ${percent(line.shares[place])}`;
      return make("rect", {
        x: wide * place + 1, y: placed(down), width: wide - 2, height: HIGH - 2, rx: 3,
        "fill-opacity": 0.06 + 0.94 * Math.sqrt(line.shares[place] / most), // else the few large ones are all that is seen
        onpointerenter: () => say(words),
      }, make("title", {}, words));
    });
    const turned = `translate(${wide * (place + 0.5) + 3} ${TOP - 6}) rotate(-55)`;
    return make("g", { "data-event": event.event }, make("text", { transform: turned }, cut(event.title, 16)), ...cells);
  });
  const [width, height] = [wide * read.length + LAST, placed(lines.length)];
  const all = `Attention: ${read.map((event) => `${event.title} ${percent(event.share)}`).join(", ")}`;
  return make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": all }, ...columns);
}
