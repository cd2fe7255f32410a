// From stored values to grey levels on the screen; pure functions.

const SAMPLE = 100_000; // values are enough for a percentile, and sort in a few milliseconds

/** Where the contrast starts, and how far its sliders reach: `{low, high, least, most}` in stored values. */
export function autoContrast(values) {
  const sample = finiteSample(values);
  if (!sample.length) return { low: 0, high: 1, least: 0, most: 1 };
  const at = (percent) => sample[Math.round(((sample.length - 1) * percent) / 100)];
  const [low, high] = [at(0.5), at(99.5)];
  // A single hot pixel must not make the sliders too coarse to use, so they do not reach all the way to it.
  const reach = 2 * (high - low || 1);
  return { low, high, least: Math.max(at(0), low - reach), most: Math.min(at(100), high + reach) };
}

/** Fill `rgba` with `values`, black at `low` and below, white at `high` and above; NaN is black. */
export function paint(values, { low, high }, rgba) {
  // A slice of one value is mid-grey, and what differs from it is black or white.
  const [middle, span] = [(low + high) / 2, Math.max(high - low, Number.MIN_VALUE * 2 ** 80)];
  for (let i = 0; i < values.length; i++) {
    // The clamped type rounds and cuts off at 0 and 255 by itself.
    const level = 127.5 + (255 * (values[i] - middle)) / span;
    rgba[4 * i] = rgba[4 * i + 1] = rgba[4 * i + 2] = level;
    rgba[4 * i + 3] = 255;
  }
}

function finiteSample(values) {
  const step = Math.max(1, Math.floor(values.length / SAMPLE));
  const sample = [];
  for (let i = 0; i < values.length; i += step) if (Number.isFinite(values[i])) sample.push(values[i]);
  return Float64Array.from(sample).sort();
}
