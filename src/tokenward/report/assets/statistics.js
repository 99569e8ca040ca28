// Correlations of two scores of the same tokens.

const total = (values) => values.reduce((sum, x) => sum + (Number.isNaN(x) ? 0 : x), 0);

/** Index of the first value that is at least x, in sorted values. */
function firstNotUnder(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Ranks from 0; equal values share their mean rank. */
function ranks(values) {
  const sorted = Float64Array.from(values).sort(), place = new Map();
  for (let start = 0, end; start < sorted.length; start = end) {
    for (end = start + 1; end < sorted.length && sorted[end] === sorted[start]; end++);
    place.set(sorted[start], (start + end - 1) / 2);
  }
  return Array.from(values, (x) => place.get(x));
}

/** Pearson's correlation; NaN if one of the scores is constant. */
function pearson(one, other) {
  const means = [one, other].map((values) => total(values) / values.length);
  let product = 0;
  const squares = [0, 0];
  one.forEach((x, i) => {
    const apart = [x - means[0], other[i] - means[1]];
    product += apart[0] * apart[1];
    apart.forEach((size, side) => (squares[side] += size * size));
  });
  return squares[0] && squares[1] ? product / Math.sqrt(squares[0] * squares[1]) : NaN;
}

/** Pearson's and Spearman's correlation of two scores over the tokens that have both. */
function correlation(pairs, first, second) {
  const one = [], other = [];
  for (const { responses } of pairs) {
    for (const { values } of responses) {
      values[first].forEach((x, i) => {
        const y = values[second][i];
        if (!Number.isNaN(x) && !Number.isNaN(y)) { one.push(x); other.push(y); }
      });
    }
  }
  return { n: one.length, pearson: pearson(one, other), spearman: pearson(ranks(one), ranks(other)) };
}
