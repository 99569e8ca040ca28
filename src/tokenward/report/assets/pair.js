// The open comparison: its two texts, with running sums and other scores below them.

const limits = new Map();

/** The limit of the run's scale for the current unit. */
function limitOf(channel) {
  if (!isSum()) return channel.limit;
  const key = `${state.unit} ${channel.name}`;
  if (!limits.has(key)) limits.set(key, limitOfSums(pairs, channel, state.unit));
  return limits.get(key);
}

/** Whether sums are shown, which have their own scale. */
function isSum() {
  return state.unit !== "token" && state.pool === "sum";
}

/** The numbers at the ends of a channel's colours. */
function endsOf(channel) {
  if (state.scale !== "run") return ["lowest", "highest"];
  const middle = isSum() ? 0 : channel.zero, limit = limitOf(channel);
  return [middle - limit, middle + limit].map((x) => shown(x, 2, channel.name));
}

/** How the scores of a word or a sentence are computed, in words. */
function pooledHow() {
  return state.unit === "token" ? "" : `the ${state.pool} over the tokens of a ${state.unit}`;
}

function showPair() {
  open = pairs.find((pair) => pair.key === state.row);
  const { margin } = measures(open);
  const verdict = margin > 0 ? `favours the preferred reply by ${shown(margin).slice(1)}` : margin < 0 ? `favours the rejected reply by ${shown(margin).slice(1)}` : "favours neither reply";
  // Surprisal and random numbers are controls, which favour no reply.
  byId("heading").textContent = ["surprisal", "random"].includes(state.scorer) ? "" : `Summed over the replies, the score (${state.scorer}) ${verdict}.`;
  byId("about").textContent = `Pair ${open.number} of ${data.total}, ${byId("part").querySelector(`[value="${open.part}"]`).textContent} pairs; ${open.source}; ${open.key === START.row ? "the page opens with it because its scores agree well with its order" : open.reasons.map((name) => byId(`is-${name}`).textContent).join(", ")}.`;
  byId("prompt").replaceChildren(...open.prompt.map((message) => {
    const text = visible(element("span", { dir: "auto", className: "text" }), message.content);
    return element("p", {}, element("b", { textContent: `${message.role} ` }), text);
  }));
  byId("has-context").hidden = !open.responses.some((response) => response.starts);
  SIDES.forEach(showSide);
  showSums();
  showStack();
  showTable();
  showKept();
}

/** The units of one response and the shade of each, by a score. */
function shaded(number, name) {
  const units = open.responses.map((response) => pooledUnits(response, channels[name], state.unit, state.pool));
  const shade = shadeOf(state.scale, limitOf(channels[name]), units.flat());
  return units[number].map((unit) => ({ ...unit, shade: shade(unit.apart) }));
}

function showSide(side, number) {
  const response = open.responses[number], values = response.values[state.scorer];
  const units = shaded(number, state.scorer);
  fillText(byId(side), number, state.scorer, units);
  const given = open.given ? `, rated ${Number(open.given[number].toPrecision(3))} in the data`.replace("-", "−") : "";
  const sum = element("small", { textContent: `total score ${shown(total(values))}, ${values.length} tokens${given}` });
  byId(`${side}-head`).replaceChildren(number ? "Rejected " : "Preferred ", sum);
  const shades = [];
  for (const { places, shade } of units) for (const i of places) shades[i] = shade;
  byId(`${side}-strip`).setAttribute("viewBox", `0 0 ${response.ids.length || 1} 20`);
  byId(`${side}-strip`).replaceChildren(...strip(shades));
}

/** Fill a box with the text of a response: one shaded span per token, with marks for known spans and shared words. */
function fillText(box, number, name, units) {
  const response = open.responses[number], values = response.values[name];
  const spans = tokenSpans(response, data.names, state.dots);
  units.forEach(({ groups, shade }, unit) => groups.forEach((group) => {
    spans[group].className += shadeClasses(shade).map((name) => ` ${name}`).join("");
    spans[group].dataset.unit = unit;
  }));
  response.groups.forEach((group, place) => {
    const known = "known" in channels ? total(group.map((i) => response.values.known[i])) : 0;
    if (known) spans[place].classList.add(known > 0 ? "known-up" : "known-down");
    if (response.twins.has(response.wordOf[group[0]])) spans[place].classList.add("shared");
  });
  const rest = response.text.slice(response.ends[response.ends.length - 1] || 0);
  box.replaceChildren(...inParagraphs([...withContext(response, spans), element("span", { className: "cut", title: "cut off because it is too long", textContent: rest })]));
  box.setAttribute("aria-label",
    `${SIDES[number]} response by ${name}, ${values.length} tokens, sum ${shown(total(values), 2, name)}; use the arrow keys to move through them`);
}

/** A small chart of the whole response with one bar per token; all bars of a sign are one path. */
function strip(shades) {
  const bars = { up: "", down: "" };
  shades.forEach((shade, i) => {
    const size = Math.max(-1, Math.min(shade, 1)) * 10;
    if (size) bars[shade > 0 ? "up" : "down"] += `M${i},10v${(-size).toFixed(2)}h.9V10z`;
  });
  return [...Object.entries(bars), ["zero", `M0,10H${shades.length}`]].map(([name, d]) => drawing("path", { d, class: name }));
}

// ---- running sums

function runningSum(values) {
  let sum = 0;
  return Array.from(values, (x) => (sum += Number.isNaN(x) ? 0 : x));
}

/** The sum of the scores up to each token, both responses on one scale. */
function showSums() {
  const sums = open.responses.map((response) => runningSum(response.values[state.scorer]));
  const every = [0, ...sums[0], ...sums[1]], low = Math.min(...every), high = Math.max(...every);
  const down = (sum) => (74 - (68 * (sum - low)) / (high - low || 1)).toFixed(1);
  const points = (mine) => [0, ...mine].map((sum, i) => `${((1000 * i) / (mine.length || 1)).toFixed(1)},${down(sum)}`).join(" ");
  SIDES.forEach((side, number) => {
    const mine = sums[number], last = mine.length ? mine[mine.length - 1] : 0;
    byId(`${side}-sums`).hidden = !state.sums;
    byId(`${side}-line`).replaceChildren(
      drawing("path", { d: `M0,${down(0)}H1000`, class: "zero" }),
      drawing("polyline", { points: points(sums[1 - number]), class: "other" }),
      drawing("polyline", { points: points(mine), class: "mine" }));
    const after = (sum) => `${shown(sum)} after token ${mine.indexOf(sum) + 1}`;
    byId(`${side}-sum`).textContent = mine.length
      ? `Running sum over ${mine.length} tokens: ends at ${shown(last)}; highest ${after(Math.max(...mine))}, lowest ${after(Math.min(...mine))}.` : "";
  });
}

/** The token at the position of a click on a line. */
function tokenOfLine(event, side) {
  const response = open.responses[SIDES.indexOf(side)], box = event.currentTarget.getBoundingClientRect();
  const place = Math.floor(((event.clientX - box.left) / box.width) * response.ids.length);
  const group = response.groups.findIndex((places) => places.includes(place));
  return byId(side).querySelector(`[data-group="${group}"]`);
}

// ---- several scores of the same text

const agreements = new Map();

/** Correlation of two scores over all pairs of the page, computed once. */
function agreementOfPage(first, second) {
  const key = `${first} ${second}`;
  if (!agreements.has(key)) agreements.set(key, correlation(pairs, first, second));
  return agreements.get(key);
}

function showStack() {
  const others = state.stacked ? scorers.filter((name) => name !== state.scorer) : [];
  SIDES.forEach((side, number) => {
    byId(`${side}-stack`).replaceChildren(...others.flatMap((name) => {
      const box = element("div", { className: "text", tabIndex: 0, dir: "auto" });
      box.dataset.side = side;
      box.setAttribute("role", "group");
      fillText(box, number, name, shaded(number, name));
      const sum = shown(total(open.responses[number].values[name]), 2, name), ends = endsOf(channels[name]).join(" to ");
      return [element("h4", {}, `${name}: ${sum} `, element("small", { textContent: `colours from ${ends}` })), box];
    }));
  });
  byId("agreement").hidden = !state.stacked;
  const combinations = state.stacked ? scorers.flatMap((first, i) => scorers.slice(i + 1).map((second) => [first, second])) : [];
  byId("agreements").replaceChildren(...combinations.map(([first, second]) => {
    const found = [correlation([open], first, second), agreementOfPage(first, second)];
    const cells = found.flatMap((one) => [one.pearson, one.spearman].map((x) => shown(x, 2, "")).concat(String(one.n)));
    return element("tr", {}, element("th", { scope: "row", textContent: `${first}, ${second}` }), ...cells.map((text) => element("td", { textContent: text })));
  }));
}
