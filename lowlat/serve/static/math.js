// Math with KaTeX: TeX to nodes that look right, and MathML for screen readers. Styles are set through the CSSOM, as
// the Content-Security-Policy forbids style attributes.

import { memoize } from "./memo.js";
import katex from "./vendor/katex.js";

// Longer or deeper TeX stays text: it is hostile or broken, and deep trees exhaust a browser.
const MAX_LENGTH = 5000;
const MAX_DEPTH = 150;
const LIMITS = { maxExpand: 500, maxSize: 20, strict: "ignore", trust: false, throwOnError: true };

const render = memoize((key) => {
  const displayMode = key[0] === "d";
  const tex = key.slice(1);
  if (tex.length > MAX_LENGTH) return null;
  try {
    const tree = katex.__renderToDomTree(tex, { ...LIMITS, displayMode });
    return tidy(tree, MAX_DEPTH) ? tree.toNode() : null;
  } catch (error) {
    if (error instanceof katex.ParseError || error instanceof RangeError) return null;
    throw error;
  }
});

/** A new element for `tex`, or null if it is not valid TeX. */
export function renderMath(tex, isDisplay) {
  return render(`${isDisplay ? "d" : "i"}${tex}`)?.cloneNode(true) ?? null;
}

/**
 * Drops the decoration of MathML nodes, which are for screen readers; other nodes have a `style` of their own.
 * Returns whether the tree is at most `depth` deep.
 */
function tidy(node, depth) {
  if (node.attributes?.style !== undefined) delete node.attributes.style;
  return depth > 0 && (node.children ?? []).every((child) => tidy(child, depth - 1));
}
