// markdown-it rules of math: \( \), \[ \], $$ $$ and $ $. They make tokens `math_inline` and `math_block` whose
// content is the TeX source; a `$` of a price stays text.

/** Adds the rules to a markdown-it parser. */
export function addMath(parser) {
  parser.inline.ruler.before("escape", "math", inlineMath);
  parser.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
}

const PAIRS = [
  { open: "\\(", close: "\\)", isDisplay: false },
  { open: "\\[", close: "\\]", isDisplay: true },
  { open: "$$", close: "$$", isDisplay: true },
];

function inlineMath(state, isSilent) {
  const { src, pos } = state;
  if (src[pos] !== "$" && src[pos] !== "\\") return false;
  const pair = PAIRS.find(({ open }) => src.startsWith(open, pos));
  if (pair) return takePair(state, pair, isSilent);
  return src[pos] === "$" && takeDollars(state, isSilent);
}

function takePair(state, { open, close, isDisplay }, isSilent) {
  // Where a search for this end found nothing, a later one finds nothing either.
  const missing = (state.env.missing ??= {});
  const key = `${close}${state.src.length}`;
  const end = missing[key] === state.src ? -1 : state.src.indexOf(close, state.pos + open.length);
  if (end < 0) missing[key] = state.src;
  const source = state.src.slice(state.pos + open.length, Math.max(0, end)).trim();
  if (!source) return false;
  if (!isSilent) push(state, "math_inline", source, isDisplay);
  state.pos = end + close.length;
  return true;
}

/**
 * `$x$`, but not the amounts of "$5 and $10", "US$5", "$5-$10", "5$" or "$5 million or 6 million$": the signs touch
 * the source, no digit follows, no word or range precedes, and a source that begins with a digit has no plain words.
 */
function takeDollars(state, isSilent) {
  const { src, pos } = state;
  const isAmount = /(?:[\p{L}\p{N}$]|\d\s?[-–/])$/u.test(src.slice(Math.max(0, pos - 3), pos));
  const end = isAmount ? -1 : closingDollar(src, pos + 1);
  if (end < 0 || /[\d$]/.test(src[end + 1] ?? "")) return false;
  const source = src.slice(pos + 1, end);
  if (!/^[^\s`][^`\n]*$/.test(source) || /\s$/.test(source)) return false;
  if (/^\d/.test(source) && /(^|\s)[\p{L}]{2,}(\s|$)/u.test(source)) return false;
  if (!isSilent) push(state, "math_inline", source, false);
  state.pos = end + 1;
  return true;
}

/** The next `$` that no backslash escapes; at most a line away. */
function closingDollar(src, at) {
  for (; at < src.length && src[at] !== "\n"; at += 1) {
    if (src[at] === "\\") at += 1;
    else if (src[at] === "$") return at;
  }
  return -1;
}

function push(state, type, source, isDisplay) {
  const token = state.push(type, "span", 0);
  token.content = source;
  token.meta = { isDisplay };
}

/** Display math on lines of its own. It ends before a blank line at the latest, and may be open at the end. */
function blockMath(state, startLine, endLine, isSilent) {
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = lineOf(state, startLine);
  const pair = PAIRS.find(({ open, isDisplay }) => isDisplay && first.startsWith(open));
  if (!pair) return false;
  const lines = [];
  let line = startLine;
  let isClosed = false;
  for (; line < endLine && !isClosed; line += 1) {
    const text = line === startLine ? first.slice(pair.open.length) : lineOf(state, line);
    if (line > startLine && (!text.trim() || state.sCount[line] < state.blkIndent)) return false;
    const end = text.indexOf(pair.close);
    // Text after the end: the whole is part of a paragraph.
    if (end >= 0 && text.slice(end + pair.close.length).trim()) return false;
    isClosed = end >= 0;
    lines.push(isClosed ? text.slice(0, end) : text);
  }
  const source = lines.join("\n").trim();
  // Open math may only be unfinished: it lasts to the end of the whole text.
  if (!isClosed && line < state.lineMax) return false;
  if (isClosed && !source) return false;
  if (isSilent) return true;
  const token = state.push("math_block", "div", 0);
  token.content = source;
  token.map = [startLine, line];
  token.meta = { isDisplay: true, isOpen: !isClosed, markup: pair.open };
  token.block = true;
  state.line = line;
  return true;
}

function lineOf(state, line) {
  return state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
}
