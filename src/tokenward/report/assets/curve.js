// Which tokens of the open comparison are selected, and how much of the score they hold.

function showKept() {
  const kept = keptOf(open);
  for (const box of byId("sides").querySelectorAll("[data-side]")) {
    const side = SIDES.indexOf(box.dataset.side), { groups } = open.responses[side];
    box.querySelectorAll(".token").forEach((span, place) => {
      // Selected tokens beside each other share a frame.
      const isKept = (group) => Boolean(group) && !isWhole() && group.some((i) => kept[side][i]);
      const weights = groups[place].map((i) => kept[side][i]);
      span.classList.toggle("kept", isKept(groups[place]));
      span.classList.toggle("first", isKept(groups[place]) && !isKept(groups[place - 1]));
      span.classList.toggle("last", isKept(groups[place]) && !isKept(groups[place + 1]));
      span.classList.toggle("against", Math.min(...weights) < 0);
    });
  }
  showCurve();
}

/** Share of selected tokens, and the part of the absolute score that they hold, over some pairs. */
function carried(chosenPairs) {
  const found = { kept: [0, 0], sizes: [0, 0], part: 0, whole: 0 };
  for (const pair of chosenPairs) {
    const kept = keptOf(pair), flags = kept.flatMap((side) => [...side]);
    const sizes = contributions(pair, state.scorer).map(Math.abs);
    found.part += total(sizes.filter((_, i) => flags[i]));
    found.whole += total(sizes);
    kept.forEach((side, number) => {
      found.kept[number] += side.filter(Boolean).length;
      found.sizes[number] += side.length;
    });
  }
  return found;
}

function inWords(found) {
  const sides = [0, 1].map((i) => `${percent(found.kept[i] / found.sizes[i])} of the ${NAMES[i]}`).join(" and ");
  const part = found.whole > 0 ? `; they hold ${percent(found.part / found.whole)} of the absolute score` : "";
  return `${sides} tokens are selected${part}`;
}

function showCurve() {
  const mine = measures(open).curve, others = pairs.map((pair) => measures(pair).curve);
  const here = carried([open]), all = carried(pairs);
  byId("kept").textContent = isSilent() ? "No token is marked." : isWhole() ? data.selection.whole : `This pair: ${inWords(here)}.`;
  byId("kept-all").textContent = isSilent() || isWhole() ? "" : `All ${pairs.length} pairs of the page: ${inWords(all)}.`;
  const shares = others.map((curve) => shareCarrying(curve, 0.8)).filter((x) => x !== null).sort((a, b) => a - b);
  const own = shareCarrying(mine, 0.8);
  byId("carries").textContent = own === null ? "All scores of this pair are 0."
    : `${percent(own)} of this pair's tokens hold 80 % of its absolute score; the median over the page's pairs is ${percent(shares[shares.length >> 1])}.`;
  drawCurve(mine, others, here);
}

function drawCurve(mine, others, here) {
  const curves = { "series-1": relative(others), "series-0": relative([mine]) };
  const down = (y) => (150 - 140 * y).toFixed(1);
  const point = ([x, y]) => `${46 + 240 * x},${down(y)}`;
  const marks = [0, 0.25, 0.5, 0.75, 1];
  const lines = marks.map((y) => drawing("path", { d: `M46,${down(y)}H286`, class: y ? "grid" : "axis" }));
  for (const name in curves) lines.push(drawing("polyline", { points: curves[name].map(point).join(" "), class: name }));
  if (here.whole > 0 && !isSilent()) {
    const [x, y] = point([(here.kept[0] + here.kept[1]) / (here.sizes[0] + here.sizes[1]), here.part / here.whole]).split(",");
    lines.push(drawing("circle", { cx: x, cy: y, r: 5, class: "here" }));
  }
  const labels = [
    ...marks.map((y) => [42, Number(down(y)) + 4, `${100 * y} %`, "end"]),
    ...[0, 0.5, 1].map((x) => [46 + 240 * x, 163, `${100 * x} %`, x === 1 ? "end" : x ? "middle" : "start"]),
    [166, 176, "share of the tokens", "middle"],
  ];
  byId("curve").replaceChildren(...lines, ...labels.map(([x, y, text, anchor]) => drawing("text", { x, y, "text-anchor": anchor }, text)));
}

/** A curve, or the sum of several, at fifty shares of tokens, relative to its last value. */
function relative(curves) {
  const end = total(curves.map((curve) => curve[curve.length - 1]));
  return Array.from({ length: 51 }, (_, k) => {
    const part = total(curves.map((curve) => curve[Math.round((k / 50) * curve.length) - 1] || 0));
    return [k / 50, end > 0 ? part / end : 0];
  });
}
