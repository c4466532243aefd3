// A history in, lists with their reasons out. What the API tells goes into the document as text alone, never as markup.

import { byId, count, figure, make, redraw } from "./elements.js";
import { drawAttention } from "./map.js";

const WAIT_MS = 120; // of rest before a change is asked about
const HOUR = 3600;
let events = []; // oldest first: {key, item_id, title, time}
let stored = null; // the user whose events these are, until one is changed
let arms = [];
let filters = {};
let where = {};
let chosen = {}; // diversity and popularity, once they were touched
let keys = 0;
let latest = 0;
let timer = 0;
let running = Promise.resolve();

// The API

// Whole numbers that a double cannot hold are ids; as text they stay what they are.
function exact(_, value, context) {
  return Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source) ? context.source : value;
}

async function call(path, question) {
  const headers = question ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem("key");
  if (key) headers["x-api-key"] = key;
  let response, found;
  try {
    response = await fetch(path, { method: question ? "POST" : "GET", headers, body: question && JSON.stringify(question) });
    found = JSON.parse(await response.text(), exact);
  } catch {
    throw new Error(response ? `The server answered ${response.status}, not in JSON.` : "The server does not answer.");
  }
  if (response.status === 401) byId("key-form").hidden = false;
  if (!response.ok) throw new Error(found.detail);
  return found;
}

function problem(line) {
  byId("problem").textContent = line;
  byId("problem").hidden = !line;
}

const telling = (act) => (...given) => act(...given).catch((error) => problem(error.message));

function useKey(submitted) {
  submitted.preventDefault();
  sessionStorage.setItem("key", byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  begin();
}

// History

const entry = ({ item_id, title, time }) => ({ key: ++keys, item_id, title: title ?? "An item of another bundle", time });

function change(next, user = null) {
  [events, stored] = [next, user];
  drawHistory();
  ask();
}

function add(item) {
  change([...events, entry(item)]);
  byId("history").scrollTop = byId("history").scrollHeight;
}

function move(place, by) {
  const next = [...events];
  [next[place], next[place + by]] = [next[place + by], next[place]];
  change(next);
}

function drawHistory() {
  byId("clear").hidden = events.length === 0;
  byId("times").textContent = timesTold();
  redraw(byId("history"), ...events.map(drawEvent));
}

function timesTold() {
  if (!events.length) return stored ? `Nothing is kept of user ${stored}.` : "";
  if (stored) return `The events of user ${stored}, with the times that are kept.`;
  return "Where the model reads times: the last event an hour ago, an hour between two.";
}

function drawEvent(event, place) {
  const button = (name, sign, disabled, onclick) => make("button", {
    type: "button", class: "small", title: name, "aria-label": `${name}: ${event.title}`, "data-key": `${name} ${event.key}`,
    disabled, onclick,
  }, sign);
  return make("li", { "data-key": event.key },
    make("span", { class: "number" }, String(place + 1)),
    make("span", { class: "title", title: event.title }, event.title, " ", make("small", {}, String(event.item_id))),
    button("Move up", "↑", place === 0, () => move(place, -1)),
    button("Move down", "↓", place === events.length - 1, () => move(place, 1)),
    button("Remove", "×", false, () => change(events.filter((other) => other !== event))));
}

const loadUser = telling(async (submitted) => {
  submitted.preventDefault();
  const id = byId("user").value.trim();
  change((await call(`/v1/users/${encodeURIComponent(id)}`)).events.map(entry), id);
  byId("history").scrollTop = byId("history").scrollHeight;
});

// Search

let hits = [];
let active = -1;
let searches = 0;

const search = telling(async () => {
  const turn = ++searches;
  hits = []; // those still shown are of other words
  await new Promise((resume) => setTimeout(resume, WAIT_MS));
  if (turn !== searches) return;
  const found = await call(`/v1/items?limit=12&q=${encodeURIComponent(byId("search").value.trim())}`);
  if (turn === searches) drawHits(found.items);
});

function drawHits(items) {
  hits = items;
  const options = items.map((item, place) => make("li", {
    role: "option", id: `hit-${place}`, onpointerdown: (down) => down.preventDefault(), onclick: () => choose(place),
  }, item.title, " ", make("small", {}, String(item.item_id))));
  const none = make("li", { class: "quiet", role: "option", "aria-disabled": "true" }, "No title holds this.");
  byId("hits").replaceChildren(...(options.length ? options : [none]));
  byId("hits").hidden = false;
  byId("search").setAttribute("aria-expanded", "true");
  point(items.length && byId("search").value.trim() ? 0 : -1);
}

function point(place) {
  active = place;
  [...byId("hits").children].forEach((option, number) => option.setAttribute("aria-selected", String(number === place)));
  const option = byId(`hit-${place}`);
  option?.scrollIntoView({ block: "nearest" });
  byId("search").setAttribute("aria-activedescendant", option?.id ?? "");
}

function choose(place) {
  if (!hits[place]) return;
  add(hits[place]);
  byId("search").value = "";
  closeHits();
}

function closeHits() {
  searches++;
  [hits, active] = [[], -1];
  byId("hits").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
  byId("search").setAttribute("aria-activedescendant", "");
}

function searchKey(pressed) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[pressed.key];
  if (step && !hits.length) search();
  else if (step) point((Math.max(active, step > 0 ? -1 : 0) + step + hits.length) % hits.length);
  else if (pressed.key === "Enter") choose(active);
  else if (pressed.key === "Escape") closeHits();
  if (step || pressed.key === "Enter") pressed.preventDefault();
}

// Options and filters

function condition(name, value) {
  if (value === undefined) delete where[name];
  else where[name] = value;
  settled();
}

function settled() {
  for (const name of ["diversity", "popularity"]) byId(`${name}-told`).textContent = chosen[name] ?? "as the bundle";
  byId("k-told").textContent = byId("k").value;
  byId("reset").hidden = Object.keys(where).length + Object.keys(chosen).length === 0;
  ask();
}

function reset() {
  [where, chosen] = [{}, {}];
  for (const name of ["diversity", "popularity"]) byId(name).value = 0;
  drawFilters();
  settled();
}

function drawFilters() {
  const kinds = { boolean: booleanFilter, number: numberFilter, text: textFilter };
  const shown = Object.entries(filters).filter(([, filter]) => filter.kind in kinds && filter.values?.length !== 0);
  const none = make("p", { class: "quiet" }, "Items of this bundle have nothing to filter by.");
  byId("filters").replaceChildren(...(shown.length ? shown.map(([name, filter]) => kinds[filter.kind](name, filter)) : [none]));
}

function booleanFilter(name) {
  const values = { any: undefined, yes: true, no: false };
  const choices = Object.keys(values).map((word) => make("option", {}, word));
  const select = make("select", { onchange: () => condition(name, values[select.value]) }, ...choices);
  return make("label", { class: "filter line" }, make("span", {}, name), select);
}

function numberFilter(name, filter) {
  const ends = ["min", "max"].map((end) => make("input", {
    type: "number", step: "any", placeholder: filter[end] ?? end, "aria-label": `${name}, ${end}`, oninput: read,
  }));
  function read() {
    const given = ["min", "max"].map((end, place) => [end, ends[place].value]).filter(([, value]) => value !== "");
    condition(name, given.length ? Object.fromEntries(given.map(([end, value]) => [end, Number(value)])) : undefined);
  }
  const range = make("span", { class: "range" }, ends[0], "to", ends[1]);
  return make("div", { class: "filter line" }, make("span", {}, name), range);
}

function textFilter(name, filter) {
  const picked = new Set();
  const said = make("span", { class: "picked" });
  const options = make("div", { class: "options" }, ...filter.values.map((value) => option(value)));
  const find = make("input", {
    type: "search", placeholder: "Find a value", "aria-label": `Find a value of ${name}`, oninput: narrow, onkeydown: take,
  });
  function option(value, checked = false) {
    const box = make("input", { type: "checkbox", checked, onchange: () => pick(value, box.checked) });
    return make("label", {}, box, value);
  }
  function pick(value, on) {
    picked[on ? "add" : "delete"](value);
    said.textContent = [...picked].join(", ");
    condition(name, picked.size ? [...picked] : undefined);
  }
  function narrow() {
    const part = find.value.trim().toLowerCase();
    for (const label of options.children) label.hidden = !label.textContent.toLowerCase().includes(part);
  }
  function take(pressed) {
    const value = find.value.trim();
    if (pressed.key !== "Enter" || !value) return;
    const known = [...options.children].find((label) => label.textContent === value);
    if (known) known.firstChild.checked = true;
    else options.prepend(option(value, true));
    pick(value, true);
  }
  return make("details", { class: "filter" }, make("summary", {}, make("span", {}, name), said), find, options);
}

// Answers

// One question at a time, so that the server has no queue of old ones.
function ask() {
  const turn = ++latest;
  byId("lists").setAttribute("aria-busy", "true");
  clearTimeout(timer);
  timer = setTimeout(() => (running = running.then(() => answer(turn))), WAIT_MS);
}

async function answer(turn) {
  if (turn !== latest) return;
  const side = document.querySelector("input[name=side]:checked").value;
  const asked = side === "both" ? arms.map((arm) => arm.name) : [side];
  try {
    const answers = [];
    for (const arm of asked) answers.push(await recommend(arm));
    if (turn !== latest) return;
    drawAnswers(answers);
    problem("");
  } catch (error) {
    if (turn === latest) problem(error.message);
  }
}

async function recommend(arm) {
  const now = Math.floor(Date.now() / 1000);
  const times = events.map((event, place) => (stored ? event.time : now - HOUR * (events.length - place)));
  const started = performance.now();
  const answer = await call("/v1/recommend", {
    history: events.map((event) => event.item_id), times, arm, where, ...chosen,
    k: Number(byId("k").value), filter_seen: byId("seen").checked, ignore_unknown: true, explain: true,
  });
  return { ...answer, milliseconds: performance.now() - started };
}

function drawAnswers(answers) {
  byId("summary").textContent = summary(answers);
  byId("lists").classList.toggle("two", answers.length > 1);
  byId("lists").setAttribute("aria-busy", "false");
  redraw(byId("lists"), ...answers.map((each, place) => drawAnswer(each, answers[1 - place], place)));
}

function summary([first, second]) {
  if (!first.items.length) return "No item is left; loosen the filters.";
  const ids = new Set(first.items.map((item) => item.item_id));
  const both = second?.items.filter((item) => ids.has(item.item_id)).length;
  const from = events.length ? `from ${count(events.length, "event")}` : "for anyone: search for items to begin a history";
  const left = first.unknown.length ? `; ${first.unknown.length} of no known item left out` : "";
  const shared = second ? ` · ${both} of ${first.items.length} in both lists` : "";
  return `${count(first.items.length, "item")} ${from}${left}${shared}`;
}

function drawAnswer(answer, other, place) {
  const section = make("section", { class: "card answer", "aria-label": `List of the ${answer.arm}` });
  const badges = [make("span", { class: "badge" }, answer.source)];
  if (answer.fallback) badges.push(make("span", { class: "badge warn" }, `fallback: ${answer.fallback}`));
  const took = make("span", { title: "There and back, with the reasons" }, `${Math.round(answer.milliseconds)} ms`);
  const about = make("p", { class: "quiet" }, make("code", { title: "The bundle that answered" }, answer.bundle), took);
  const nothing = make("p", { class: "quiet nothing" }, "The most popular items: there is no history to read.");
  const items = answer.items.map((item) => drawItem(item, answer, mark(item, other, place), section));
  section.append(
    make("div", { class: "head" }, make("h2", {}, answer.arm), ...badges, about),
    answer.attention.length ? drawAttention(answer.attention) : nothing,
    make("ol", { class: "list" }, ...items));
  return section;
}

// How an item stands in this list, seen from the other: a class, a sign and words. The second list is the one that moved.
function mark(item, other, place) {
  if (!other) return [];
  const there = other.items.find((each) => each.item_id === item.item_id);
  if (!there) return place ? ["new", "new", "Not in the first list"] : ["out", "gone", "Not in the second list"];
  const by = there.rank - item.rank;
  if (!by || !place) return [];
  const places = count(Math.abs(by), "place");
  return by > 0 ? ["up", `▲${by}`, `Up ${places}`] : ["down", `▼${-by}`, `Down ${places}`];
}

function drawItem(item, answer, [kind, sign, words], section) {
  const title = make("div", { class: "title" }, item.title, make("small", {}, String(item.item_id)));
  if (sign) title.append(make("span", { class: `mark ${kind}`, title: words, "aria-label": words, role: "img" }, sign));
  title.append(make("span", { class: "tags" }, ...item.categories.map((name) => make("span", {}, name))));
  const bar = make("span", { class: "bar" }, make("span"));
  bar.firstChild.style.width = `${width(item.score, answer.items.map((each) => each.score))}%`;
  const row = make("li", { tabindex: "-1", "data-item": item.item_id },
    make("span", { class: "number" }, String(item.rank)),
    make("div", { class: "what" }, title, ...drawReasons(item.reasons, answer)),
    make("div", { class: "score", title: "Scores compare within one list alone" }, make("span", {}, figure(item.score)), bar),
    make("button", {
      type: "button", class: "small", title: "Add to the history", "aria-label": `Add to the history: ${item.title}`,
      "data-key": `add ${answer.arm} ${item.item_id}`, onclick: () => add(item),
    }, "+"));
  const on = () => light(item.reasons, answer, section);
  const out = () => light([], answer, section);
  const off = () => row.contains(document.activeElement) || out();
  const acts = { pointerenter: on, focusin: on, pointerleave: off, focusout: out };
  for (const [name, act] of Object.entries(acts)) row.addEventListener(name, act);
  return row;
}

// In percent; from 0 where no score is below, else from a little under the lowest.
function width(score, scores) {
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const base = low >= 0 ? 0 : low - 0.1 * (high - low);
  return high > base ? (100 * (score - base)) / (high - base) : 100;
}

function drawReasons(reasons, answer) {
  if (!answer.attention.length) return [];
  if (!reasons.length) return [make("p", { class: "reasons" }, "no event alone carries it")];
  const named = reasons.flatMap((reason, place) => {
    const [drop, lead] = [figure(reason.drop), place ? ", " : "because of "];
    const words = { class: "reason", title: `Without it the score falls by ${drop}` };
    return [lead, make("span", words, reason.title, " ", make("small", {}, `−${drop}`))];
  });
  return [make("p", { class: "reasons" }, ...named)];
}

// Shows which events carried an item. The API numbers those of known items alone.
function light(reasons, answer, section) {
  const numbers = new Set(reasons.map((reason) => reason.event));
  const missing = new Set(answer.unknown.map(String));
  const known = events.filter((event) => !missing.has(String(event.item_id)));
  const carried = new Set(known.filter((_, place) => numbers.has(place + 1)).map((event) => String(event.key)));
  for (const column of section.querySelectorAll("[data-event]")) {
    column.classList.toggle("lit", numbers.has(Number(column.dataset.event)));
  }
  section.querySelector(".scroll svg")?.classList.toggle("dim", numbers.size > 0);
  for (const row of byId("history").children) row.classList.toggle("lit", carried.has(row.dataset.key));
}

// Start

const begin = telling(async () => {
  arms = (await call("/v1/bundle")).arms;
  filters = (await call("/v1/filters")).filters;
  byId("about").textContent = `${arms[0].items.toLocaleString("en")} items`;
  byId("sides").hidden = arms.length < 2;
  drawFilters();
  settled();
});

function touched({ target }) {
  chosen[target.id] = Number(target.value);
  settled();
}

function listen() {
  byId("key-form").addEventListener("submit", useKey);
  byId("user-form").addEventListener("submit", loadUser);
  byId("clear").addEventListener("click", () => change([]));
  byId("reset").addEventListener("click", reset);
  const searching = { input: search, focus: search, keydown: searchKey, blur: closeHits };
  for (const [name, act] of Object.entries(searching)) byId("search").addEventListener(name, act);
  for (const name of ["diversity", "popularity"]) byId(name).addEventListener("input", touched);
  byId("k").addEventListener("input", settled);
  for (const input of [byId("seen"), ...document.querySelectorAll("[name=side]")]) input.addEventListener("change", ask);
}

byId("settings").open = matchMedia("(min-width: 60rem)").matches;
listen();
begin();
