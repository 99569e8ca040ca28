// The card of a token, or of its word or sentence.

let pinned = false;

/** 0 for a span of a chosen response, 1 for one of a rejected one. */
function sideOf(span) {
  return SIDES.indexOf(span.closest("[data-side]").dataset.side);
}

function quoted(response, groups) {
  const text = groups.map((group) => response.groups[group].map((i) => pieceOf(response, i)).join("")).join("");
  return JSON.stringify(text.length > 200 ? `${text.slice(0, 200)} …` : text);
}

function tokenRows(side, number) {
  const response = open.responses[side], group = response.groups[number];
  const kept = keptOf(open)[side];
  return group.flatMap((i, part) => {
    const scores = response.values[state.scorer], place = `${response.ids[i]}, ${i + 1} of ${scores.length}`;
    const values = data.channels.filter((channel) => !["noise", "weight"].includes(channel.kind));
    if (part) return [["and", `${place}: ${shown(scores[i], 4)}`]];
    return [
      ["token", isClosing(response, i) ? data.names[response.ids[i]] || "eos" : quoted(response, [number])],
      ...(group.length > 1 ? [["", `${group.length} tokens share a character`]] : []),
      ["id, position", place],
      ...values.map(({ name }) => [name, shown(response.values[name][i], 4, name)]),
      [`rank by ${state.scorer}`, `${1 + scores.filter((x) => x > scores[i]).length} of ${scores.length}`],
      ...weightings.map((name) => [name, String(Number(response.values[name][i].toPrecision(4)))]),
      ["selected", kept[i] ? "yes" : "no"],
    ];
  });
}

/** A word or a sentence: its combined scores, and the raw scores of its tokens. */
function unitRows(side, number) {
  const response = open.responses[side], kept = keptOf(open)[side];
  const units = scorers.map((name) => pooledUnits(response, channels[name], state.unit, state.pool)[number]);
  const { groups, places } = units[0], scores = response.values[state.scorer];
  const listed = groups.slice(0, 12).map((group) =>
    `${quoted(response, [group])} ${response.groups[group].map((i) => shown(scores[i])).join(", ")}`);
  return [
    [state.unit, quoted(response, groups)],
    ["tokens", `${places.length}, ${places.filter((i) => kept[i]).length} selected`],
    ["scores are", pooledHow()],
    ...scorers.map((name, k) => [name, shown(units[k].value, 4, name)]),
    ...[...listed, ...(groups.length > 12 ? [`and ${groups.length - 12} more`] : [])].map((text, k) => [k ? "" : `${state.scorer} of each`, text]),
  ];
}

/** A shared word's score in both responses; empty unless shared words are dimmed. */
function twinRows(side, group) {
  const here = open.responses[side], there = open.responses[1 - side], word = here.wordOf[here.groups[group][0]];
  if (!state.dim || !here.twins.has(word)) return [];
  const of = (response, number) => shown(pool(wordPlaces(response, number).map((i) => response.values[state.scorer][i]), "mean"));
  return [["shared word", `${of(here, word)} here, ${of(there, here.twins.get(word))} in the ${SIDES[1 - side]} response`]];
}

/** Mark the other tokens of a span's unit, and the same word in the other response. */
function markRelated(span) {
  const box = span.closest("[data-side]"), side = sideOf(span), { unit, group } = span.dataset;
  if (state.unit !== "token") for (const other of box.querySelectorAll(`[data-unit="${unit}"]`)) other.classList.add("same-unit");
  const here = open.responses[side], there = open.responses[1 - side], word = here.twins.get(here.wordOf[here.groups[group][0]]);
  if (!state.dim || word === undefined) return;
  there.groups.forEach((places, number) => {
    if (places.some((i) => there.wordOf[i] === word)) byId(SIDES[1 - side]).querySelector(`[data-group="${number}"]`).classList.add("twin");
  });
}

function showCard(span) {
  const side = sideOf(span), group = Number(span.dataset.group);
  const response = open.responses[side], place = response.groups[group][0];
  const alone = state.unit === "token" || isClosing(response, place);
  const rows = [
    ...(alone ? tokenRows(side, group) : unitRows(side, Number(span.dataset.unit))),
    ...(state.sums ? [["running sum", shown(runningSum(response.values[state.scorer])[place])]] : []),
    ...twinRows(side, group),
  ];
  hideCard();
  markRelated(span);
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
  for (const name of ["pinned", "same-unit", "twin"]) {
    for (const span of document.querySelectorAll(`.${name}`)) span.classList.remove(name);
  }
}

function pin(span) {
  showCard(span);
  pinned = true;
  span.classList.add("pinned");
}

/** Pin a token's card and store the token in the address. */
function choose(span) {
  pin(span);
  remember({ token: `${SIDES[sideOf(span)]}.${span.dataset.group}` });
}

function restoreToken() {
  const [side, group] = state.token.split(".");
  const span = SIDES.includes(side) && byId(side).querySelector(`[data-group="${Number(group)}"]`);
  if (span) pin(span);
}
