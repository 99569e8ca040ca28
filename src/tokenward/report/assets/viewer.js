// The controls and the keyboard; starts the page.

const themes = ["auto", "light", "dark"];

function showControls() {
  document.documentElement.dataset.theme = state.theme;
  document.body.classList.toggle("lines", state.lines === "1");
  document.body.classList.toggle("dim", state.dim === "1");
  for (const id of ["scorer", "scale", "unit", "pool", "show", "part", "sort", "q", "weights", "chosen-rate", "rejected-rate"]) {
    byId(id).value = state[id.replace("-rate", "")];
  }
  for (const id of SWITCHES) byId(id).checked = state[id] === "1";
  byId("pool").disabled = state.unit === "token";
  for (const side of SIDES) byId(`${side}-shown`).textContent = percent(Number(state[side]));
  showLegend();
}

function showLegend() {
  const { zero, centred } = channels[state.scorer];
  [byId("low").textContent, byId("high").textContent] = endsOf(channels[state.scorer]);
  byId("zero").textContent = isSum() && centred ? `${shown(zero)} per token; the numbers at the ends are distances from it` : shown(zero);
  byId("signed").hidden = centred;
  byId("centred").hidden = !centred;
  byId("of-tokens").hidden = isSum() || state.scale !== "run";
  byId("of-sums").hidden = !isSum() || state.scale !== "run";
  byId("of-pair").hidden = state.scale !== "pair";
  byId("of-ranks").hidden = state.scale !== "rank";
  byId("is-marked").hidden = isSilent() || isWhole();
  const how = !data.selection.name ? "a selection might keep it" : !isRecipes() ? "selected by the current settings"
    : pairs.find((pair) => pair.key === state.row).part === "train" ? "the policy trains on it" : "what training would select; this pair is held out";
  byId("framed").textContent = how;
  byId("pooled").textContent = pooledHow() && `Shades and cards show ${pooledHow()}. Frames mark single tokens.`;
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

function nextOf(values, value) {
  return values[(values.indexOf(value) + 1) % values.length];
}

function flip(key) {
  hideCard();
  change({ [key]: state[key] === "1" ? "" : "1" });
}

function setUp() {
  byId("scorer").replaceChildren(...scorers.map((name) => element("option", { value: name, textContent: name })));
  byId("weights").replaceChildren(...weightings.map((name) => element("option", { value: name, textContent: name })));
  byId("weightings").hidden = weightings.length < 2;
  listen("weights", "change", (event) => change({ weights: event.target.value, moved: "", scorer: scorers[0] }));
  for (const id of ["scorer", "scale", "unit", "pool", "show", "part", "sort"]) listen(id, "change", (event) => { hideCard(); change({ [id]: event.target.value }); });
  for (const id of SWITCHES) listen(id, "change", () => flip(id));
  listen("q", "keydown", (event) => { if (event.key === "Enter" && listed.length) openPair(listed[0].key); });
  listen("q", "input", (event) => change({ q: event.target.value }));
  for (const side of SIDES) listen(`${side}-rate`, "input", (event) => change({ [side]: event.target.value, moved: "1" }));
  listen("reset", "click", () => change({ ...rates, moved: "" }));
  listen("theme", "click", () => change({ theme: nextOf(themes, state.theme) }));
  listen("previous", "click", () => step(-1));
  listen("next", "click", () => step(1));
  listen("help-button", "click", () => byId("help").showModal());
  listen("list", "click", (event) => {
    const row = event.target.closest("tr");
    if (row) openPair(row.dataset.key);
  });
  setUpTexts();
  listen("table", "toggle", () => {
    if (byId("table").open === (state.table === "1")) return;
    remember({ table: byId("table").open ? "1" : "" });
    showTable();
  });
  listen("tsv", "click", () => copy("TSV", asTsv()));
  listen("latex", "click", () => copy("LaTeX", asLatex()));
  document.addEventListener("keydown", shortcuts);
  addEventListener("hashchange", () => { readAddress(); show(); restoreToken(); });
}

/** Show a pair of the list, and move to it. */
function openPair(key) {
  hideCard();
  change({ row: key, token: "" });
  byId("comparisons").scrollIntoView();
}

/** One listener for all tokens of both sides and all scores. */
function setUpTexts() {
  const tokenOf = (event) => event.target.closest(".token");
  listen("sides", "mouseover", (event) => { const span = tokenOf(event); if (span && !pinned) showCard(span); });
  listen("sides", "mouseleave", () => { if (!pinned) hideCard(); });
  listen("sides", "click", (event) => { const span = tokenOf(event); if (span) choose(span); });
  listen("sides", "focusin", (event) => { if (event.target.matches(".token")) showCard(event.target); });
  listen("sides", "focusout", () => { if (!pinned) hideCard(); });
  listen("sides", "keydown", moveInResponse);
  for (const side of SIDES) {
    listen(`${side}-line`, "click", (event) => {
      const span = tokenOfLine(event, side);
      if (!span) return;
      span.scrollIntoView({ block: "center" });
      choose(span);
    });
  }
}

/** Arrow keys move from unit to unit in the focused text. */
function moveInResponse(event) {
  const box = event.target.closest("[data-side]");
  if (!box) return;
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const spans = [...box.querySelectorAll(".token")], here = document.activeElement.dataset.unit;
  const heads = spans.filter((span, i) => !i || span.dataset.unit !== spans[i - 1].dataset.unit);
  const place = heads.findIndex((span) => span.dataset.unit === here);
  if (by) heads[Math.min(Math.max(place + by, 0), heads.length - 1)].focus();
  else if (event.key === "Home") heads[0].focus();
  else if (event.key === "End") heads[heads.length - 1].focus();
  else if (event.key === "Enter" && place >= 0) choose(document.activeElement);
  else return;
  event.preventDefault();
}

const SHORTCUTS = {
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  "/": () => { byId("find").open = true; byId("q").focus(); }, "?": () => byId("help").showModal(),
  u: () => { hideCard(); change({ unit: nextOf(CHOICES.unit, state.unit) }); },
  d: () => flip("dim"), s: () => flip("sums"), c: () => flip("stacked"), t: () => flip("table"),
};

function shortcuts(event) {
  if (event.key === "Escape") { hideCard(); document.activeElement.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input:not([type="checkbox"]), select, textarea, summary')) return;
  if (!(event.key in SHORTCUTS) || byId("help").open) return;
  if (event.key.startsWith("Arrow") && !event.target.closest("#comparisons")) return;
  event.preventDefault();
  SHORTCUTS[event.key]();
}

/** Open the parts whose settings the address changes. */
function openParts() {
  const parts = { find: ["q", "show", "part", "sort"], options: ["scorer", "unit", "pool", "scale", "stacked"], choice: ["moved", "weights"] };
  for (const id in parts) if (parts[id].some((key) => state[key] !== START[key])) byId(id).open = true;
}

readAddress();
setUp();
openParts();
show();
restoreToken();
