// Units larger than a token: words and sentences, whose score is pooled from the raw scores of their tokens.

const BREAKS = { word: 1, sentence: 2 }; // bits of a response's `breaks`: a token with one begins such a unit

/** The units of a response: lists of its groups. What closes the turn stands alone, whatever the unit. */
function unitsOf(response, unit) {
  const units = [];
  response.groups.forEach((group, number) => {
    const begins = !(unit in BREAKS) || isClosing(response, group[0]) || group.some((i) => response.breaks[i] & BREAKS[unit]);
    if (begins || !units.length) units.push([number]);
    else units[units.length - 1].push(number);
  });
  return units;
}

/** Mean or sum of scores. Missing ones are left out; NaN where all are missing. */
function pool(values, how) {
  const known = values.filter((x) => !Number.isNaN(x));
  if (!known.length) return NaN;
  return how === "sum" ? total(known) : total(known) / known.length;
}

/** A response's units with their pooled score: `apart` is the same pooled from each token's distance to the channel's zero. */
function pooledUnits(response, channel, unit, how) {
  const values = response.values[channel.name];
  return unitsOf(response, unit).map((groups) => {
    const places = groups.flatMap((number) => response.groups[number]);
    const scores = places.map((i) => values[i]);
    // Tokens that share a character are one token to the eye, and not a unit to sum over.
    const by = unit === "token" ? "mean" : how;
    return { groups, places, value: pool(scores, by), apart: pool(scores.map((x) => x - channel.zero), by) };
  });
}

/** Where a sum's scale ends: the 98th percentile of the units' sizes over some pairs, as the run's own scale has it. */
function limitOfSums(pairs, channel, unit) {
  const sizes = pairs.flatMap((pair) => pair.responses.flatMap((response) =>
    pooledUnits(response, channel, unit, "sum").map(({ apart }) => Math.abs(apart))));
  const sorted = sizes.filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
  return sorted[Math.floor(0.98 * (sorted.length - 1))] || 1;
}

/** From a unit's distance to zero to -1 .. 1 on a scale: of the whole run, of some units, or by rank among them. */
function shadeOf(scale, limit, units) {
  if (scale === "run") return (apart) => apart / limit;
  const sorted = units.map(({ apart }) => Math.abs(apart)).filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
  if (scale === "pair") return (apart) => apart / (sorted[sorted.length - 1] || 1);
  return (apart) => (Math.sign(apart) * firstNotUnder(sorted, Math.abs(apart))) / sorted.length;
}
