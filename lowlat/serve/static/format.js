// Formatting of numbers, sizes and times.

const integer = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => integer.format(value);

/** Bytes in decimal units with at most three digits: "1.23 MB". */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toPrecision(3)} ${units[unit]}`;
}

/** Seconds: "0.42 s", "7.3 s", "2 min 05 s". */
export function seconds(value) {
  if (value < 1) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, "0")} s`;
}

export const rate = (value) => `${value < 100 ? value.toFixed(1) : count(value)} tok/s`;

export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
