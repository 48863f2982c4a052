// Incremental rendering of streamed Markdown: complete blocks do not change, only the last one is rendered again.
// Owns which nodes of one answer are final.

import { parseBlocks } from "./markdown.js";
import { codeText, renderBlocks } from "./markdown_nodes.js";

/** A definition of a link, which may change text far above it: [name]: address. */
const DEFINITION = /^[ \t>*+\-\d.)]*\[(?:\\.|[^[\]\\]){1,999}\]:/m;

/** Shows a growing text in `element`, which it fills alone. */
export class MarkdownView {
  #element;
  #text = "";
  #isComplete = false;
  /** Text before this offset has its final nodes, the first #numFinal ones. */
  #final = 0;
  #numFinal = 0;
  /** Whether the text may define links: all of it is then rendered each time. */
  #hasDefinitions = false;
  /** The listing that is the whole of the text after #final and still open, or null: {markup, line, node}. */
  #listing = null;

  constructor(element) {
    this.#element = element;
  }

  /** `source` is all of the text; `isComplete`: it is finished. Cheap if it continues what was shown before. */
  update(source, { isComplete = false } = {}) {
    const text = source.includes("\r") ? source.replaceAll(/\r\n?/g, "\n") : source;
    if (text === this.#text && isComplete === this.#isComplete) return;
    if (!text.startsWith(this.#text)) this.#reset();
    if (isComplete || !this.#growListing(text)) this.#render(text, isComplete);
    this.#text = text;
    this.#isComplete = isComplete;
  }

  #reset() {
    this.#final = this.#numFinal = 0;
    this.#hasDefinitions = false;
    this.#listing = null;
    this.#element.replaceChildren();
  }

  #render(text, isComplete) {
    this.#hasDefinitions ||= DEFINITION.test(text.slice(this.#final));
    if (this.#hasDefinitions) this.#final = this.#numFinal = 0;
    const tail = text.slice(this.#final);
    const lines = tail.split("\n");
    const blocks = parseBlocks(tail, { isComplete });
    patch(this.#element, renderBlocks(blocks), this.#numFinal);
    const settled = this.#hasDefinitions ? 0 : numSettled(blocks, lines);
    if (settled > 0) {
      this.#final += offsetOf(lines, blocks[settled].line);
      this.#numFinal += settled;
    }
    this.#listing = this.#openListing(blocks.slice(settled), lines, text);
  }

  /** See #listing. An indented listing loses its indentation and is rendered again instead. */
  #openListing(blocks, lines, text) {
    const [token] = blocks.length === 1 ? blocks[0].tokens : [];
    const isOpen = token?.type === "fence" && token.meta.isOpen && token.map[1] - token.map[0] > 1;
    if (!isOpen || !lines[blocks[0].line].startsWith(token.markup)) return null;
    const node = codeText(this.#element.lastElementChild);
    // Rendering leaves out the end of the last line.
    if (text.endsWith("\n")) node.appendData("\n");
    return { markup: token.markup, line: text.lastIndexOf("\n") + 1, node };
  }

  /** Appends to an open listing in time that depends on what is new only; false if it may have ended. */
  #growListing(text) {
    if (this.#listing === null) return false;
    const { markup, line, node } = this.#listing;
    const news = text.slice(line);
    if (new RegExp(`^ {0,3}${markup[0]}{${markup.length},}[ \\t]*$`, "m").test(news)) return false;
    node.appendData(text.slice(this.#text.length));
    this.#listing.line = text.lastIndexOf("\n") + 1;
    return true;
  }
}

/**
 * Number of blocks that no later text can change: all before the last one. If the last one begins
 * in an unfinished line, that line may still continue the one before ("#" may become "#1"), as may
 * math that turns out to be none.
 */
function numSettled(blocks, lines) {
  const last = blocks.at(-1);
  const isCertain = last && last.line < lines.length - 1 && last.tokens[0].type !== "math_block";
  return Math.max(0, blocks.length - (isCertain ? 1 : 2));
}

function offsetOf(lines, index) {
  let offset = 0;
  for (let line = 0; line < index; line += 1) offset += lines[line].length + 1;
  return offset;
}

/** Makes the children of `parent` from index `at` equal to those of `fragment`; nodes that are equal stay. */
function patch(parent, fragment, at) {
  const wanted = [...fragment.childNodes];
  let same = 0;
  while (same < wanted.length && parent.childNodes[at + same]?.isEqualNode(wanted[same])) same += 1;
  const [old, next] = [parent.childNodes[at + same], wanted[same]];
  if (old && next && isGrown(old, next)) {
    if (next.nodeType === Node.TEXT_NODE) old.data = next.data;
    else patch(old, next, 0);
    same += 1;
  }
  while (parent.childNodes.length > at + same) parent.lastChild.remove();
  parent.append(...wanted.slice(same));
}

/** Whether `next` is a later state of `old`: the same element with other children, or text. */
function isGrown(old, next) {
  if (old.nodeType !== next.nodeType) return false;
  return next.nodeType === Node.TEXT_NODE || old.cloneNode(false).isEqualNode(next.cloneNode(false));
}
