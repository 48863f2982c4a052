// A cache of a function's results, for text that is rendered again while an answer grows.

/** `compute` with its results by argument; the oldest of more than `limit` are dropped. */
export function memoize(compute, limit = 200) {
  const results = new Map();
  return (argument) => {
    if (!results.has(argument)) {
      if (results.size >= limit) results.delete(results.keys().next().value);
      results.set(argument, compute(argument));
    }
    return results.get(argument);
  };
}
