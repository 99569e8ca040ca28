// The pairs of the page, the reader's choices (kept in the address), and the numbers of a pair.

const data = JSON.parse(document.getElementById("data").textContent);
const pairs = data.comparisons.map((row) => withTwins({ ...row, responses: row.responses.map(unpacked) }));
const channels = Object.fromEntries(data.channels.map((channel) => [channel.name, channel]));
const scorers = data.channels.filter((channel) => channel.kind === "score").map((channel) => channel.name);
const SIDES = ["chosen", "rejected"];
const NAMES = ["preferred", "rejected"]; // the sides in words
const byId = (id) => document.getElementById(id);
const rates = { chosen: String(data.selection.chosen.fraction), rejected: String(data.selection.rejected.fraction) };
const weightings = data.channels.filter(({ kind }) => kind === "weight").map(({ name }) => name);
const CHOICES = { scale: ["run", "pair", "rank"], unit: ["token", "word", "sentence"], pool: ["mean", "sum"] };
const SWITCHES = ["lines", "dots", "dim", "sums", "stacked"];

/** The pair that the page opens with: a short one, of the eval pairs if possible, whose scores agree best with its order. */
function opening() {
  const fits = ({ responses }) => responses.every(({ ids }) => ids.length >= 12 && ids.length <= 48);
  const wanted = [(pair) => pair.part === "eval" && fits(pair), fits, () => true];
  const found = wanted.map((kind) => pairs.filter(kind)).find((some) => some.length);
  const against = new Map(found.map((pair) => [pair, measuresBy(pair, scorers[0]).disagreement]));
  return found.reduce((best, pair) => (against.get(pair) < against.get(best) ? pair : best));
}

const START = {
  row: opening().key, scorer: scorers[0], scale: "run", unit: "token", pool: "mean", show: "all", part: "all", sort: "drawn",
  q: "", token: "", weights: weightings[0] || "", ...rates, theme: "auto", lines: "", dots: "", dim: "", sums: "", stacked: "", table: "", moved: "",
};
let state = { ...START };
let open = null;

function readAddress() {
  state = { ...START, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  if (!scorers.includes(state.scorer)) state.scorer = START.scorer;
  if (!weightings.includes(state.weights)) state.weights = START.weights;
  for (const key in CHOICES) if (!CHOICES[key].includes(state[key])) state[key] = START[key];
  for (const id of ["show", "part", "sort"]) if (![...byId(id).options].some(({ value }) => value === state[id])) state[id] = START[id];
  for (const side of SIDES) if (!(Number(state[side]) > 0 && Number(state[side]) <= 1)) state[side] = START[side];
  if (!pairs.some((pair) => pair.key === state.row)) state.row = START.row;
}

function remember(changes) {
  Object.assign(state, changes);
  const changed = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
}

function change(changes) {
  remember(changes);
  show();
}

// ---- numbers of a pair

/** Further digits for the numbers of a channel, so that its limit has two significant digits. */
function more(name) {
  const limit = name in channels ? channels[name].limit : 1;
  return limit > 0 && limit < 0.1 ? Math.min(-1 - Math.floor(Math.log10(limit)), 12) : 0;
}

/** A number with its sign (none if it rounds to 0) and the digits of its channel. */
function shown(x, digits = 2, name = state.scorer) {
  if (Number.isNaN(x)) return "none";
  const size = Math.abs(x).toFixed(digits + more(name));
  return Number(size) ? `${x > 0 ? "+" : "−"}${size}` : size;
}

const percent = (x) => `${(100 * x).toFixed(1)} %`;
const measured = new Map();

/** The numbers of a pair in the list, computed once per score. */
function measures(pair) {
  if (!measured.has(state.scorer)) measured.set(state.scorer, new Map());
  const known = measured.get(state.scorer);
  if (!known.has(pair)) known.set(pair, measuresBy(pair, state.scorer));
  return known.get(pair);
}

/** `disagreement`: share of the total absolute score that contradicts the pair's order. `peaks`: share on the largest 10 %. */
function measuresBy(pair, scorer) {
  const parts = contributions(pair, scorer), sizes = parts.map(Math.abs).sort((a, b) => b - a), all = total(sizes) || 1;
  return {
    margin: total(parts),
    disagreement: total(parts.map((x) => Math.max(-x, 0))) / all,
    peaks: total(sizes.slice(0, Math.ceil(sizes.length / 10))) / all,
    length: parts.length,
    curve: curveOf(pair, scorer),
  };
}

function rules() {
  const chosen = { ...data.selection.chosen, fraction: Number(state.chosen) };
  const rejected = { ...data.selection.rejected, fraction: Number(state.rejected) };
  return { ...data.selection, denominator: data.denominator, chosen, rejected };
}

/** Whether nothing is marked, because the recipe's selection cannot be shown and no slider was moved. */
const isSilent = () => !state.weights && data.selection.silent && !state.moved;

/** Whether the marks are the recipe's own: no slider was moved, and no other score is shown. */
const isRecipes = () => Boolean(state.weights) && !state.moved && state.scorer === scorers[0];

/** Whether the recipe trains on every token, so that marks would say nothing. */
const isWhole = () => isRecipes() && state.weights === "weight" && Boolean(data.selection.whole);

/** Weight of each token of both sides: from the recipe, until a slider or the score is changed. */
function keptOf(pair) {
  const own = isRecipes();
  return pair.responses.map((response, side) => isSilent() ? new Uint8Array(response.ids.length)
    : own ? response.values[state.weights] : select(response, response.values[state.scorer], SIDES[side], rules()));
}
