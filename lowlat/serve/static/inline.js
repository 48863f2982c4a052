// Markdown within a paragraph: code, emphasis, links, breaks. Text in, DOM nodes out; whatever is
// not understood stays text, HTML included. Linear in the length of the text, hostile or not.

import { h } from "./dom.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE_URL = /https?:\/\/[^\s<>"`*]+/y;
const AUTO_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/;
// Only hostile texts have longer runs or deeper nesting, and deep trees exhaust a browser.
const MAX_RUN = 3;
const MAX_DEPTH = 16;

/** DOM nodes of one paragraph's text. */
export function renderInline(text) {
  return new Inline(text).parse();
}

/** The address if a link may lead there, else null: http, https and mailto only. */
export function safeAddress(address) {
  // Browsers drop control characters inside a scheme ("java\nscript:"), so none is allowed.
  if (/[\u0000-\u0020\u007f-\u009f]/.test(address)) return null;
  return /^(https?:\/\/|mailto:)/i.test(address) ? address : null;
}

function link(address, children) {
  const href = safeAddress(address);
  if (href === null) return null;
  return h("a", { href, rel: "noopener noreferrer nofollow", target: "_blank" }, children);
}

/**
 * One pass over the text. `nodes` grows from left to right and holds strings, elements and marks:
 * emphasis runs that may still open or close something. `brackets` are the "[" that may still begin
 * a link.
 */
class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.plain = "";
    this.nodes = [];
    this.brackets = [];
    this.codeEnds = null;
  }

  parse() {
    while (this.at < this.text.length) this.#step();
    this.#flush();
    return emphasize(this.nodes);
  }

  #step() {
    const char = this.text[this.at];
    if (char === "\\") return this.#escape();
    if (char === "`") return this.#code();
    if (char === "*" || char === "_" || char === "~") return this.#mark(char);
    if (char === "[") return this.#open(1);
    if (char === "!" && this.text[this.at + 1] === "[") return this.#open(2);
    if (char === "]") return this.#close();
    if (char === "<" && this.#address(AUTO_LINK)) return undefined;
    if (char === "h" && !WORD.test(this.text[this.at - 1] ?? " ") && this.#address(BARE_URL)) return undefined;
    if (char === "\n") return this.#newline();
    this.plain += char;
    this.at += 1;
    return undefined;
  }

  #flush() {
    if (this.plain) this.nodes.push(this.plain);
    this.plain = "";
  }

  #push(node, length) {
    this.#flush();
    this.nodes.push(node);
    this.at += length;
  }

  #escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") return this.#push(h("br"), 2);
    const isEscape = ESCAPABLE.test(next);
    this.plain += isEscape ? next : "\\";
    this.at += isEscape ? 2 : 1;
    return undefined;
  }

  #newline() {
    const isBreak = this.plain.endsWith("  ");
    this.plain = this.plain.trimEnd();
    if (isBreak) return this.#push(h("br"), 1);
    this.plain += "\n";
    this.at += 1;
    return undefined;
  }

  #code() {
    const run = runLength(this.text, this.at);
    const end = this.#codeEnd(run);
    if (end === undefined) {
      this.plain += "`".repeat(run);
      this.at += run;
      return;
    }
    let code = this.text.slice(this.at + run, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    this.#push(h("code", {}, code), end + run - this.at);
  }

  /** Start of the next run of exactly `length` backticks after the one here. */
  #codeEnd(length) {
    if (this.codeEnds === null) {
      // All runs by length, found once: looking ahead from every run would be quadratic.
      this.codeEnds = new Map();
      for (const match of this.text.matchAll(/`+/g)) {
        const starts = this.codeEnds.get(match[0].length) ?? [];
        starts.push(match.index);
        this.codeEnds.set(match[0].length, starts);
      }
      for (const starts of this.codeEnds.values()) starts.reverse();
    }
    const starts = this.codeEnds.get(length) ?? [];
    while (starts.length && starts.at(-1) <= this.at) starts.pop();
    return starts.at(-1);
  }

  #mark(char) {
    const run = runLength(this.text, this.at);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + run] ?? " ";
    let canOpen = !SPACE.test(after) && (WORD.test(after) || !WORD.test(before));
    let canClose = !SPACE.test(before) && (WORD.test(before) || !WORD.test(after));
    if (char === "_") {
      // snake_case words are no emphasis
      canOpen &&= !WORD.test(before);
      canClose &&= !WORD.test(after);
    }
    if (run > MAX_RUN || (char === "~" && run !== 2)) canOpen = canClose = false;
    this.#push({ char, length: run, canOpen, canClose }, run);
  }

  #open(length) {
    this.#push(this.text.slice(this.at, this.at + length), length);
    this.brackets.push({ index: this.nodes.length - 1, isImage: length === 2 });
  }

  #close() {
    const bracket = this.brackets.pop();
    const target = bracket && linkTarget(this.text, this.at + 1);
    if (!target) {
      this.plain += "]";
      this.at += 1;
      return;
    }
    this.#flush();
    const children = emphasize(this.nodes.splice(bracket.index).slice(1));
    // An image would tell its server who reads this, so it is a link like any other.
    const label = children.length ? children : [target.address];
    const element = link(target.address, label);
    if (element) {
      this.nodes.push(element);
      // A link holds no other link.
      this.brackets = bracket.isImage ? this.brackets : [];
    } else {
      this.nodes.push(...children);
      this.nodes.push(` (${target.address})`);
    }
    this.at = target.end;
  }

  #address(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (!found) return false;
    let [whole, address = whole] = found;
    if (pattern === BARE_URL) whole = address = trimUrl(whole);
    const element = link(address, [address]);
    if (!element) return false;
    this.#push(element, whole.length);
    return true;
  }
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

// Every repetition is bounded, so that a text full of beginnings of links stays cheap.
const POINTED = String.raw`<([^<>\n]{0,2000})>`;
const PLAIN = String.raw`((?:[^\s()\\]|\\.|\([^\s()]{0,500}\)){0,2000})`;
const TITLE = String.raw`\s{1,8}(?:"[^"]{0,500}"|'[^']{0,500}')`;
const TARGET = new RegExp(String.raw`\(\s{0,8}(?:${POINTED}|${PLAIN})(?:${TITLE})?\s{0,8}\)`, "y");

/** `(address "title")` at `start`, or null. The title is not shown. */
function linkTarget(text, start) {
  TARGET.lastIndex = start;
  const found = TARGET.exec(text);
  if (!found) return null;
  const address = (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  return { address, end: TARGET.lastIndex };
}

/** A bare address ends before the punctuation of the sentence around it. */
function trimUrl(url) {
  const ending = url.includes("(") ? /[.,;:!?'\]_~]/ : /[.,;:!?'\]_~)]/;
  let end = url.length;
  while (end > 8 && ending.test(url[end - 1])) end -= 1;
  return url.slice(0, end);
}

const TAGS = { "*1": "em", "*2": "strong", _1: "em", _2: "strong", "~2": "del" };

/**
 * `nodes` with their marks resolved: each closing run takes the nearest open one of its kind; what
 * finds no partner is text. `stack` holds the open runs with what follows them.
 */
function emphasize(nodes) {
  const openers = { "*": [], _: [], "~": [] };
  const stack = [{ children: [] }];
  for (const node of nodes) {
    if (typeof node === "string" || node instanceof Node) stack.at(-1).children.push(node);
    else place(node, stack, openers);
  }
  collapse(stack, 0);
  return stack[0].children;
}

/** Lets `mark` close what is open, then open something itself. */
function place(mark, stack, openers) {
  let left = mark.length;
  while (mark.canClose && left > 0 && openers[mark.char].length) {
    const depth = openers[mark.char].at(-1);
    for (const inner of stack.slice(depth + 1)) openers[inner.char].pop();
    collapse(stack, depth);
    const frame = stack[depth];
    const size = Math.min(2, left, frame.length);
    const element = h(TAGS[mark.char + size], {}, frame.children);
    left -= size;
    frame.length -= size;
    frame.children = [element];
    if (frame.length === 0) {
      stack.pop();
      openers[mark.char].pop();
      stack.at(-1).children.push(element);
    }
  }
  if (left === 0) return;
  if (mark.canOpen && stack.length < MAX_DEPTH) {
    stack.push({ char: mark.char, length: left, children: [] });
    openers[mark.char].push(stack.length - 1);
  } else {
    stack.at(-1).children.push(mark.char.repeat(left));
  }
}

/** Runs opened above `depth` were never closed: they are text before their children. */
function collapse(stack, depth) {
  const { children } = stack[depth];
  for (const frame of stack.splice(depth + 1)) {
    children.push(frame.char.repeat(frame.length));
    for (const child of frame.children) children.push(child);
  }
}
