// Words and sentences: their score is the mean or the sum of the raw scores of their tokens.

const BREAKS = { word: 1, sentence: 2 }; // bits of a response's `breaks`: the token starts such a unit

/** The units of a response as lists of its groups. An eos token is always a unit by itself. */
function unitsOf(response, unit) {
  const units = [];
  response.groups.forEach((group, number) => {
    const begins = !(unit in BREAKS) || isClosing(response, group[0]) || group.some((i) => response.breaks[i] & BREAKS[unit]);
    if (begins || !units.length) units.push([number]);
    else units[units.length - 1].push(number);
  });
  return units;
}

/** Mean or sum of scores, without missing ones; NaN if all are missing. */
function pool(values, how) {
  const known = values.filter((x) => !Number.isNaN(x));
  if (!known.length) return NaN;
  return how === "sum" ? total(known) : total(known) / known.length;
}

/** A response's units with their score; `apart` is the same for the distances to the channel's zero. */
function pooledUnits(response, channel, unit, how) {
  const values = response.values[channel.name];
  return unitsOf(response, unit).map((groups) => {
    const places = groups.flatMap((number) => response.groups[number]);
    const scores = places.map((i) => values[i]);
    // Tokens that share a character look like one token, so they are averaged and not summed.
    const by = unit === "token" ? "mean" : how;
    return { groups, places, value: pool(scores, by), apart: pool(scores.map((x) => x - channel.zero), by) };
  });
}

/** The limit of a scale of sums: the 98th percentile of the units' absolute values, like the limit of the run's own scale. */
function limitOfSums(pairs, channel, unit) {
  const sizes = pairs.flatMap((pair) => pair.responses.flatMap((response) =>
    pooledUnits(response, channel, unit, "sum").map(({ apart }) => Math.abs(apart))));
  const sorted = sizes.filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
  return sorted[Math.floor(0.98 * (sorted.length - 1))] || 1;
}

/** Maps a unit's distance to zero to -1 .. 1: on the scale of the whole run, of some units, or by rank among them. */
function shadeOf(scale, limit, units) {
  if (scale === "run") return (apart) => apart / limit;
  const sorted = units.map(({ apart }) => Math.abs(apart)).filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
  if (scale === "pair") return (apart) => apart / (sorted[sorted.length - 1] || 1);
  return (apart) => (Math.sign(apart) * firstNotUnder(sorted, Math.abs(apart))) / sorted.length;
}
