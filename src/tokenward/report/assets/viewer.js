// The list of comparisons, the one that is open, and what the reader has chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const pairs = data.comparisons.map((row) => ({ ...row, responses: row.responses.map(unpacked) }));
const channels = Object.fromEntries(data.channels.map((channel) => [channel.name, channel]));
const scorers = data.channels.filter((channel) => channel.kind === "score").map((channel) => channel.name);
const SIDES = ["chosen", "rejected"];
const byId = (id) => document.getElementById(id);
const rates = { chosen: String(data.selection.chosen.fraction), rejected: String(data.selection.rejected.fraction) };
const weighed = "weight" in channels;
const START = {
  row: pairs[0].key, scorer: scorers[0], scale: "run", show: "all", part: "all", sort: "drawn", q: "", token: "",
  ...rates, theme: "auto", lines: "1", dots: "", moved: "",
};
let state = { ...START };
let listed = [];
let open = null;
let pinned = false;

// ---- the state lives in the address

function readAddress() {
  state = { ...START, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  if (!scorers.includes(state.scorer)) state.scorer = START.scorer;
  for (const side of SIDES) if (!(Number(state[side]) > 0 && Number(state[side]) <= 1)) state[side] = START[side];
  if (!pairs.some((pair) => pair.key === state.row)) state.row = START.row;
}

function remember(changes) {
  Object.assign(state, changes);
  const said = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", `#${new URLSearchParams(said)}`);
}

function change(changes) {
  remember(changes);
  show();
}

// ---- numbers of a pair

const total = (values) => values.reduce((sum, x) => sum + (Number.isNaN(x) ? 0 : x), 0);
const margin = (pair) => total(contributions(pair, state.scorer));
const length = (pair) => contributions(pair, state.scorer).length;
const shown = (x, digits = 2) => (Number.isNaN(x) ? "none" : `${x > 0 ? "+" : x < 0 ? "−" : ""}${Math.abs(x).toFixed(digits)}`);
const percent = (x) => `${(100 * x).toFixed(1)} %`;

/** The part of a pair's credit that speaks against its order: 0 none, 1 all of it. */
function disagreement(pair) {
  const parts = contributions(pair, state.scorer);
  const against = total(parts.map((x) => Math.max(-x, 0)));
  return against / (total(parts.map(Math.abs)) || 1);
}

function rules() {
  const chosen = { ...data.selection.chosen, fraction: Number(state.chosen) };
  const rejected = { ...data.selection.rejected, fraction: Number(state.rejected) };
  return { ...data.selection, denominator: data.denominator, chosen, rejected };
}

/** Kept tokens of both sides: what the recipe gave weight until a slider or the score is changed. */
function keptOf(pair) {
  const own = weighed && !state.moved && state.scorer === scorers[0];
  return pair.responses.map((response, side) =>
    own ? response.values.weight : select(response, response.values[state.scorer], SIDES[side], rules()));
}

// ---- the list

const MEASURES = { margin, disagreement, length };

function textOf(pair) {
  return [...pair.prompt.map((message) => message.content), ...pair.responses.map((response) => response.text)].join("\n");
}

function showList() {
  const wanted = state.q.toLowerCase();
  listed = pairs.filter((pair) =>
    (state.show === "all" || pair.reasons.includes(state.show)) &&
    (state.part === "all" || pair.part === state.part) &&
    (!wanted || textOf(pair).toLowerCase().includes(wanted)));
  const [by, way] = state.sort.split(" "), measure = MEASURES[by];
  if (measure) listed.sort((a, b) => (way === "up" ? 1 : -1) * (measure(a) - measure(b)));
  byId("count").textContent = `${listed.length} of ${pairs.length} on this page, of ${data.total} in the run`;
  byId("list").replaceChildren(...listed.map((pair) => {
    const prompt = pair.prompt.length ? pair.prompt[pair.prompt.length - 1].content : "";
    const link = element("button", { type: "button", textContent: prompt.slice(0, 90) || "(no prompt)", title: prompt, dir: "auto" });
    const cells = [shown(margin(pair), 1), percent(disagreement(pair)), String(length(pair)), pair.part];
    const row = element("tr", {}, element("td", {}, link), ...cells.map((text) => element("td", { textContent: text })));
    row.dataset.key = pair.key;
    if (pair.key === state.row) link.setAttribute("aria-current", "true");
    if (margin(pair) < 0) row.classList.add("wrong");
    return row;
  }));
}

function step(by) {
  const place = listed.findIndex((pair) => pair.key === state.row);
  const next = listed[Math.min(Math.max(place + by, 0), listed.length - 1)];
  if (!next) return;
  change({ row: next.key, token: "" });
  const link = byId("list").querySelector("[aria-current]");
  if (link) link.scrollIntoView({ block: "nearest" });
}

// ---- the open comparison

function showPair() {
  open = pairs.find((pair) => pair.key === state.row);
  byId("heading").textContent = `${state.scorer}: margin ${shown(margin(open))}`;
  byId("about").textContent = `pair ${open.number} of ${data.total} · ${open.source} · ${open.part} · ${open.reasons.map((name) => byId(`is-${name}`).textContent).join(", ")}`;
  byId("prompt").replaceChildren(...open.prompt.map((message) => {
    const text = visible(element("span", { dir: "auto", className: "text" }), message.content);
    return element("p", {}, element("b", { textContent: `${message.role} ` }), text);
  }));
  SIDES.forEach(showSide);
  showKept();
}

function showSide(side, number) {
  const response = open.responses[number], values = response.values[state.scorer];
  const shade = shadeOf(channels[state.scorer], state.scale, open);
  const spans = tokenSpans(response, data.names, state.dots);
  spans.forEach((span, group) => {
    const value = mean(response.groups[group].map((i) => values[i]));
    span.classList.add(...shadeClasses(shade(value)));
    const known = "known" in channels ? total(response.groups[group].map((i) => response.values.known[i])) : 0;
    if (known) span.classList.add(known > 0 ? "known-up" : "known-down");
  });
  const rest = response.text.slice(response.ends[response.ends.length - 1] || 0);
  byId(side).replaceChildren(...spans, element("span", { className: "cut", title: "cut off: too long", textContent: rest }));
  byId(side).setAttribute("aria-label",
    `${side} response, ${values.length} tokens, sum ${shown(total(values))}; arrows go through them`);
  const given = open.given ? `, given score ${open.given[number]}` : "";
  byId(`${side}-head`).textContent = `${side}: ${shown(total(values))} over ${values.length} tokens${given}`;
  byId(`${side}-strip`).replaceChildren(...strip(Array.from(values, shade)));
}

/** One bar per token: a picture of the whole response. */
function strip(shades) {
  return shades.map((shade, i) => {
    const size = Math.min(Math.abs(shade) || 0, 1) * 10;
    const place = { x: i, width: 0.9, y: shade > 0 ? 10 - size : 10, height: size };
    return drawing("rect", { ...place, class: shade > 0 ? "up" : "down" });
  }).concat(drawing("path", { d: `M0,10H${shades.length}`, class: "zero" }));
}

function showKept() {
  const kept = keptOf(open);
  SIDES.forEach((side, number) => {
    const { groups } = open.responses[number];
    for (const span of byId(side).querySelectorAll(".token")) {
      span.classList.toggle("kept", groups[span.dataset.group].some((i) => kept[number][i] > 0));
    }
    byId(`${side}-strip`).setAttribute("viewBox", `0 0 ${open.responses[number].ids.length || 1} 20`);
  });
  showCurve(kept);
}

/** Share of tokens kept, and of the reward difference that they carry, over some pairs. */
function carried(chosenPairs) {
  const found = { tokens: 0, kept: [0, 0], sizes: [0, 0], part: 0, whole: 0 };
  for (const pair of chosenPairs) {
    const kept = keptOf(pair), flags = kept.flatMap((side) => [...side]);
    found.part += total(contributions(pair, state.scorer).filter((_, i) => flags[i] > 0));
    found.whole += margin(pair);
    kept.forEach((side, number) => {
      found.kept[number] += side.filter((x) => x > 0).length;
      found.sizes[number] += side.length;
    });
  }
  return found;
}

function inWords(found) {
  const sides = SIDES.map((side, i) => `${side} ${percent(found.kept[i] / found.sizes[i])}`).join(", ");
  const part = found.whole > 0 ? `; they carry ${percent(found.part / found.whole)} of the reward difference` : "";
  return `kept tokens: ${sides}${part}`;
}

function showCurve() {
  const mine = curveOf(open, state.scorer), others = pairs.map((pair) => curveOf(pair, state.scorer));
  const here = carried([open]), all = carried(pairs);
  byId("kept").textContent = `This pair, ${inWords(here)}.`;
  byId("kept-all").textContent = `All ${pairs.length} pairs of the page, ${inWords(all)}.`;
  const shares = others.map((curve) => shareCarrying(curve, 0.8)).filter((x) => x !== null).sort((a, b) => a - b);
  const own = shareCarrying(mine, 0.8);
  byId("carries").textContent =
    (own === null ? "The scores of this pair give no difference in its order. " : `80 % of this pair's difference lies on ${percent(own)} of its tokens. `) +
    (shares.length ? `The median of the ${shares.length} pairs with a positive margin is ${percent(shares[shares.length >> 1])}.` : "");
  const plot = byId("curve");
  const curves = { "series-1": relative(others), ...(mine[mine.length - 1] > 0 ? { "series-0": relative([mine]) } : {}) };
  const top = Math.max(1.1, ...Object.values(curves).flat().map(([, y]) => y));
  const down = (y) => (150 - (140 * Math.max(y, 0)) / top).toFixed(1);
  const point = ([x, y]) => `${46 + 240 * x},${down(y)}`;
  const lines = [drawing("path", { d: "M46,10V150H286", class: "axis" }), drawing("path", { d: `M46,${down(0.8)}H286`, class: "zero" })];
  for (const name in curves) lines.push(drawing("polyline", { points: curves[name].map(point).join(" "), class: name }));
  if (here.whole > 0) {
    const [x, y] = point([(here.kept[0] + here.kept[1]) / (here.sizes[0] + here.sizes[1]), here.part / here.whole]).split(",");
    lines.push(drawing("circle", { cx: x, cy: y, r: 5, class: "here" }));
  }
  const labels = [...(top < 3 ? [0, 0.8, 1] : [0, 1]).map((y) => [42, Number(down(y)) + 4, `${100 * y} %`, "end"]), [286, 166, "100 % of tokens", "end"]];
  plot.replaceChildren(...lines, ...labels.map(([x, y, text, anchor]) => drawing("text", { x, y, "text-anchor": anchor }, text)));
}

/** A curve, or the sum of several, at fifty shares of tokens, as a part of its end. */
function relative(curves) {
  const end = total(curves.map((curve) => curve[curve.length - 1]));
  return Array.from({ length: 51 }, (_, k) => {
    const part = total(curves.map((curve) => curve[Math.round((k / 50) * curve.length) - 1] || 0));
    return [k / 50, end > 0 ? part / end : 0];
  });
}

// ---- the card of a token

function showCard(span) {
  const side = SIDES.indexOf(span.parentElement.id);
  const response = open.responses[side], group = response.groups[span.dataset.group];
  const kept = keptOf(open)[side];
  const rows = group.flatMap((i, part) => {
    const scores = response.values[state.scorer], place = `${response.ids[i]}, ${i + 1} of ${scores.length}`;
    const values = data.channels.filter((channel) => !["noise", "weight"].includes(channel.kind));
    if (part) return [["and", `${place}: ${shown(scores[i], 4)}`]];
    return [
      ["token", isClosing(response, i) ? data.names[response.ids[i]] || "end" : JSON.stringify(group.map((j) => pieceOf(response, j)).join(""))],
      ...(group.length > 1 ? [["", `${group.length} tokens share a character`]] : []),
      ["id, position", place],
      ...values.map(({ name }) => [name, shown(response.values[name][i], 4)]),
      [`rank by ${state.scorer}`, `${1 + scores.filter((x) => x > scores[i]).length} of ${scores.length}`],
      ...(weighed ? [["weight in the recipe", String(response.values.weight[i])]] : []),
      ["kept now", kept[i] > 0 ? "yes" : "no"],
    ];
  });
  const card = byId("card");
  card.replaceChildren(element("dl", {}, ...rows.flatMap(([name, text]) =>
    [element("dt", { textContent: name }), visible(element("dd", { dir: "auto" }), text)])));
  card.hidden = false;
  const box = span.getBoundingClientRect();
  card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8)) + scrollX}px`;
  const below = box.bottom + card.offsetHeight + 8 < innerHeight;
  card.style.top = `${(below ? box.bottom + 6 : Math.max(box.top - card.offsetHeight - 6, 0)) + scrollY}px`;
}

function hideCard() {
  byId("card").hidden = true;
  pinned = false;
  for (const span of document.querySelectorAll(".pinned")) span.classList.remove("pinned");
}

function pin(span) {
  hideCard();
  showCard(span);
  pinned = true;
  span.classList.add("pinned");
}

// ---- everything together

function showControls() {
  document.documentElement.dataset.theme = state.theme;
  document.body.classList.toggle("lines", state.lines === "1");
  for (const id of ["scorer", "scale", "show", "part", "sort", "q", "chosen-rate", "rejected-rate"]) {
    byId(id).value = state[id.replace("-rate", "")];
  }
  for (const id of ["lines", "dots"]) byId(id).checked = state[id] === "1";
  for (const side of SIDES) byId(`${side}-shown`).textContent = percent(Number(state[side]));
  const { zero, limit, centred } = channels[state.scorer];
  const ends = state.scale === "run" ? [zero - limit, zero + limit].map((x) => shown(x)) : ["lowest", "highest"];
  [byId("low").textContent, byId("high").textContent] = ends;
  byId("zero").textContent = shown(zero);
  byId("signed").hidden = centred;
  byId("centred").hidden = !centred;
}

function show() {
  if (!pinned) hideCard();
  showControls();
  showList();
  showPair();
}

function listen(id, event, act) {
  byId(id).addEventListener(event, act);
}

function setUp() {
  byId("scorer").replaceChildren(...scorers.map((name) => element("option", { value: name, textContent: name })));
  for (const id of ["scorer", "scale", "show", "part", "sort"]) listen(id, "change", (event) => { hideCard(); change({ [id]: event.target.value }); });
  for (const id of ["lines", "dots"]) listen(id, "change", (event) => change({ [id]: event.target.checked ? "1" : "0" }));
  listen("q", "input", (event) => change({ q: event.target.value }));
  for (const side of SIDES) listen(`${side}-rate`, "input", (event) => change({ [side]: event.target.value, moved: "1" }));
  listen("reset", "click", () => change({ ...rates, moved: "" }));
  const themes = ["auto", "light", "dark"];
  listen("theme", "click", () => change({ theme: themes[(themes.indexOf(state.theme) + 1) % 3] }));
  listen("help-button", "click", () => byId("help").showModal());
  listen("list", "click", (event) => {
    const row = event.target.closest("tr");
    if (row) { hideCard(); change({ row: row.dataset.key, token: "" }); }
  });
  for (const side of SIDES) {
    listen(side, "mouseover", (event) => { const span = event.target.closest(".token"); if (span && !pinned) showCard(span); });
    listen(side, "mouseleave", () => { if (!pinned) hideCard(); });
    listen(side, "click", (event) => { const span = event.target.closest(".token"); if (span) choose(span); });
    listen(side, "focusin", (event) => { if (event.target.matches(".token")) { hideCard(); showCard(event.target); } });
    listen(side, "focusout", () => { if (!pinned) hideCard(); });
    listen(side, "keydown", moveInResponse);
  }
  document.addEventListener("keydown", shortcuts);
  addEventListener("hashchange", () => { readAddress(); show(); restoreToken(); });
}

/** Pin a token's card and name the token in the address. */
function choose(span) {
  pin(span);
  remember({ token: `${span.parentElement.id}.${span.dataset.group}` });
}

function restoreToken() {
  const [side, group] = state.token.split(".");
  const span = SIDES.includes(side) && byId(side).querySelector(`[data-group="${Number(group)}"]`);
  if (span) pin(span);
}

function moveInResponse(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const spans = [...event.currentTarget.querySelectorAll(".token")];
  const place = spans.indexOf(document.activeElement);
  if (by) spans[Math.min(Math.max(place + by, 0), spans.length - 1)].focus();
  else if (event.key === "Home") spans[0].focus();
  else if (event.key === "End") spans[spans.length - 1].focus();
  else if (event.key === "Enter" && place >= 0) choose(spans[place]);
  else return;
  event.preventDefault();
}

function shortcuts(event) {
  if (event.key === "Escape") { hideCard(); document.activeElement.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, summary")) return;
  const acts = { j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
    "/": () => byId("q").focus(), "?": () => byId("help").showModal() };
  if (!(event.key in acts) || byId("help").open) return;
  if (event.key.startsWith("Arrow") && !event.target.closest("#comparisons")) return;
  event.preventDefault();
  acts[event.key]();
}

readAddress();
setUp();
show();
restoreToken();
