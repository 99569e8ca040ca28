// How much of the margin the selected tokens of the open comparison make up.

function showKept() {
  const kept = keptOf(open);
  for (const box of byId("sides").querySelectorAll("[data-side]")) {
    const side = SIDES.indexOf(box.dataset.side), { groups } = open.responses[side];
    box.querySelectorAll(".token").forEach((span, place) => {
      const weights = groups[place].map((i) => kept[side][i]);
      span.classList.toggle("kept", weights.some(Boolean));
      span.classList.toggle("against", Math.min(...weights) < 0);
    });
  }
  showCurve();
}

/** Share of selected tokens, and their part of the margin, over some pairs. */
function carried(chosenPairs) {
  const found = { tokens: 0, kept: [0, 0], sizes: [0, 0], part: 0, whole: 0 };
  for (const pair of chosenPairs) {
    const kept = keptOf(pair), flags = kept.flatMap((side) => [...side]);
    found.part += total(contributions(pair, state.scorer).filter((_, i) => flags[i]));
    found.whole += measures(pair).margin;
    kept.forEach((side, number) => {
      found.kept[number] += side.filter(Boolean).length;
      found.sizes[number] += side.length;
    });
  }
  return found;
}

function inWords(found) {
  const sides = SIDES.map((side, i) => `${side} ${percent(found.kept[i] / found.sizes[i])}`).join(", ");
  const part = found.whole > 0 ? `; they make up ${percent(found.part / found.whole)} of the margin` : "";
  return `selected tokens: ${sides}${part}`;
}

function showCurve() {
  const mine = measures(open).curve, others = pairs.map((pair) => measures(pair).curve);
  const here = carried([open]), all = carried(pairs);
  byId("kept").textContent = isSilent() ? "No token is marked." : `This pair: ${inWords(here)}.`;
  byId("kept-all").textContent = isSilent() ? "" : `All ${pairs.length} pairs of the page: ${inWords(all)}.`;
  const shares = others.map((curve) => shareCarrying(curve, 0.8)).filter((x) => x !== null).sort((a, b) => a - b);
  const own = shareCarrying(mine, 0.8);
  byId("carries").textContent =
    (own === null ? "This pair has no positive margin. " : `80 % of this pair's margin comes from ${percent(own)} of its tokens. `) +
    (shares.length ? `The median over the ${shares.length} pairs with a positive margin is ${percent(shares[shares.length >> 1])}.` : "");
  drawCurve(mine, others, here);
}

function drawCurve(mine, others, here) {
  const curves = { "series-1": relative(others), ...(mine[mine.length - 1] > 0 ? { "series-0": relative([mine]) } : {}) };
  const top = Math.max(1.1, ...Object.values(curves).flat().map(([, y]) => y));
  const down = (y) => (150 - (140 * Math.max(y, 0)) / top).toFixed(1);
  const point = ([x, y]) => `${46 + 240 * x},${down(y)}`;
  const lines = [drawing("path", { d: "M46,10V150H286", class: "axis" }), drawing("path", { d: `M46,${down(0.8)}H286`, class: "zero" })];
  for (const name in curves) lines.push(drawing("polyline", { points: curves[name].map(point).join(" "), class: name }));
  if (here.whole > 0 && !isSilent()) {
    const [x, y] = point([(here.kept[0] + here.kept[1]) / (here.sizes[0] + here.sizes[1]), here.part / here.whole]).split(",");
    lines.push(drawing("circle", { cx: x, cy: y, r: 5, class: "here" }));
  }
  const labels = [...(top < 3 ? [0, 0.8, 1] : [0, 1]).map((y) => [42, Number(down(y)) + 4, `${100 * y} %`, "end"]), [286, 166, "100 % of tokens", "end"]];
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
