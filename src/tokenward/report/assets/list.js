// The list of comparisons.

let listed = [];

function textOf(pair) {
  return [...pair.prompt.map((message) => message.content), ...pair.responses.map((response) => response.text)].join("\n");
}

function showList() {
  const wanted = state.q.toLowerCase();
  listed = pairs.filter((pair) =>
    (state.show === "all" || pair.reasons.includes(state.show)) &&
    (state.part === "all" || pair.part === state.part) &&
    (!wanted || textOf(pair).toLowerCase().includes(wanted)));
  const [by, way] = state.sort.split(" ");
  if (by in measures(pairs[0])) listed.sort((a, b) => (way === "up" ? 1 : -1) * (measures(a)[by] - measures(b)[by]));
  byId("count").textContent = `${listed.length} of ${pairs.length} on this page, of ${data.total} in the run`;
  if (!listed.length) byId("count").textContent = "no pair matches";
  const place = listed.findIndex((pair) => pair.key === state.row);
  byId("place").textContent = place < 0 ? "" : `${place + 1} of ${listed.length}`;
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place === listed.length - 1;
  byId("list").replaceChildren(...listed.map(listRow));
}

function listRow(pair) {
  const prompt = pair.prompt.length ? pair.prompt[pair.prompt.length - 1].content : "";
  const link = element("button", { type: "button", textContent: prompt.slice(0, 200) || "(no prompt)", title: prompt, dir: "auto" });
  const { margin, disagreement, peaks, length } = measures(pair);
  const part = byId("part").querySelector(`[value="${pair.part}"]`).textContent;
  const cells = [shown(margin, 1), percent(disagreement), percent(peaks), String(length), part];
  const row = element("tr", {}, element("td", {}, link), ...cells.map((text) => element("td", { textContent: text })));
  row.dataset.key = pair.key;
  if (pair.key === state.row) link.setAttribute("aria-current", "true");
  if (margin < 0) row.classList.add("wrong");
  return row;
}

function step(by) {
  const place = listed.findIndex((pair) => pair.key === state.row);
  const next = listed[Math.min(Math.max(place + by, 0), listed.length - 1)];
  if (!next) return;
  hideCard();
  change({ row: next.key, token: "" });
  const link = byId("list").querySelector("[aria-current]");
  if (link) link.scrollIntoView({ block: "nearest" });
}
