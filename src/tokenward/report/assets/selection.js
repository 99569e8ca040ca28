"use strict";
// Which tokens a rate selects: the rule of tokenward.selection.TopFraction, on raw scores, within each response.

/** A decimal number as [numerator, denominator]; 0.333... is one third.
 *  Python: Fraction(str(value)).limit_denominator(largest). */
function exactFraction(value, largest) {
  const [digits, exponent = "0"] = String(value).split("e");
  const [whole, decimals = ""] = digits.split(".");
  const places = decimals.length - Number(exponent);
  let n = BigInt(whole + decimals) * 10n ** BigInt(Math.max(-places, 0));
  let d = 10n ** BigInt(Math.max(places, 0));
  const limit = BigInt(largest), start = [n, d];
  if (d <= limit) return start.map(Number);
  let [p0, q0, p1, q1] = [0n, 1n, 1n, 0n];
  while (q0 + (n / d) * q1 <= limit) {
    const a = n / d;
    [p0, q0, p1, q1] = [p1, q1, p0 + a * p1, q0 + a * q1];
    [n, d] = [d, n - a * d];
    if (d === 0n) return [p1, q1].map(Number);
  }
  const k = (limit - q0) / q1, q = q0 + k * q1;
  return (2n * d * q <= start[1] ? [p1, q1] : [p0 + k * p1, q]).map(Number);
}

/** How many of `total` tokens a fraction keeps, in exact arithmetic, or as in the published code ("float"). */
function keptCount(total, fraction, rules) {
  let count;
  if (rules.count === "float") {
    count = Math.trunc(total * fraction);
  } else {
    const [n, d] = exactFraction(fraction, rules.denominator);
    const added = { floor: 0, round: Math.floor(d / 2), ceil: d - 1 }[rules.count];
    const product = total * n + added;
    count = (product - (product % d)) / d;
  }
  return Math.min(Math.max(count, rules.minimum), total);
}

/** The numbers by which a direction ranks tokens; the highest is selected first. */
function directed(response, scores, direction) {
  if (direction === "random") return response.values.noise;
  const change = { top: (x) => x, bottom: (x) => -x, magnitude: Math.abs }[direction];
  return Array.from(scores, change);
}

/** Segments of tokens that are selected as one, each as a token with the sum of their scores.
 *  Python: tokenward.selection.weights, for an oracle with another tokenizer. */
function asOne(response, scores) {
  const { joint, eos } = response, size = joint.length, count = size ? joint[size - 1] + 1 : 0;
  const sums = new Array(count).fill(NaN), values = {};
  joint.forEach((segment, i) => {
    if (!Number.isNaN(scores[i])) sums[segment] = (Number.isNaN(sums[segment]) ? 0 : sums[segment]) + scores[i];
  });
  for (const name of ["noise", "noise of ties"]) if (response.values[name]) values[name] = response.values[name].slice(0, count);
  const end = size - eos, begun = end && joint[end] === joint[end - 1] ? 1 : 0;  // a segment is an end if its first token is
  return { response: { eos: eos ? count - joint[end] - begun : 0, values }, scores: sums };
}

/** 1 for each selected token of a response, 0 for the others.
 *  rules: count, minimum, first_token, eos, ties, denominator, and per side {fraction, direction}. */
function select(response, scores, side, rules) {
  if (response.joint) {
    const one = asOne(response, scores), kept = select(one.response, one.scores, side, rules);
    return Uint8Array.from(response.joint, (segment) => kept[segment]);
  }
  const { fraction, direction } = rules[side];
  const ranked = directed(response, scores, direction);
  const size = scores.length, lastText = size - response.eos;
  const closes = rules.eos === "both" || rules.eos === side;
  const eligible = [];
  for (let i = rules.first_token ? 0 : 1; i < size; i++) {
    if (!Number.isNaN(scores[i]) && (closes || i < lastText)) eligible.push(i);
  }
  const tie = rules.ties === "random" ? response.values["noise of ties"] : null;
  const before = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  eligible.sort((a, b) => before(ranked[b], ranked[a]) || (tie ? before(tie[a], tie[b]) : a - b));
  const kept = new Uint8Array(size);
  for (const i of eligible.slice(0, keptCount(eligible.length, fraction, rules))) kept[i] = 1;
  if (rules.eos === "always" && side === "chosen") {
    for (let i = lastText; i < size; i++) if (!Number.isNaN(scores[i])) kept[i] = 1;
  }
  return kept;
}

/** What each token adds to the pair's margin: scores of the chosen response add, scores of the rejected one subtract. */
function contributions(pair, scorer) {
  const [chosen, rejected] = pair.responses.map((response) => response.values[scorer]);
  return [...chosen, ...Array.from(rejected, (x) => -x)].map((x) => (Number.isNaN(x) ? 0 : x));
}

/** Running sums of the absolute contributions, the largest first. */
function curveOf(pair, scorer) {
  let sum = 0;
  return contributions(pair, scorer).map((x) => Math.abs(x) || 0).sort((a, b) => b - a).map((x) => (sum += x));
}

/** The least share of tokens that holds a share of the absolute score; null if all scores are 0. */
function shareCarrying(curve, share) {
  const end = curve[curve.length - 1];
  return end > 0 ? (curve.findIndex((sum) => sum >= share * end) + 1) / curve.length : null;
}
