// Incremental rendering of streamed Markdown: complete blocks do not change, only the last one does.
// Owns which nodes of one answer are final.

import { parseBlocks } from "./markdown.js";
import { growBlock, renderBlock } from "./markdown_nodes.js";

/** Shows a growing text in `element`, which it fills alone. */
export class MarkdownView {
  #element;
  /** Text before this offset has its final nodes. */
  #settled = 0;
  /** Nodes of the text after it. */
  #tail = [];
  /** The block of #tail if it is one, else null. */
  #lastBlock = null;

  constructor(element) {
    this.#element = element;
  }

  /** `text` is all of it so far and begins with what was shown before. */
  update(text) {
    const lines = text.slice(this.#settled).split("\n");
    const blocks = parseBlocks(lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line)));
    if (!this.#grow(blocks)) this.#remake(blocks, lines);
    this.#lastBlock = this.#tail.length === 1 ? blocks.at(-1) : null;
  }

  #grow(blocks) {
    if (blocks.length !== 1 || this.#lastBlock === null) return false;
    return growBlock(this.#tail[0], this.#lastBlock, blocks[0]);
  }

  #remake(blocks, lines) {
    for (const node of this.#tail) node.remove();
    const settled = numSettled(blocks, lines);
    for (const block of blocks.slice(0, settled)) this.#element.append(renderBlock(block));
    this.#tail = blocks.slice(settled).map(renderBlock);
    this.#element.append(...this.#tail);
    if (settled > 0) this.#settled += offsetOf(lines, blocks[settled].line);
  }
}

/**
 * Number of blocks that no later text can change: all before the last one. If the last one begins
 * in an unfinished line, that line may still continue the one before ("#" may become "#1").
 */
function numSettled(blocks, lines) {
  const last = blocks.at(-1);
  const isCertain = last && last.line < lines.length - 1;
  return Math.max(0, blocks.length - (isCertain ? 1 : 2));
}

function offsetOf(lines, index) {
  let offset = 0;
  for (let line = 0; line < index; line += 1) offset += lines[line].length + 1;
  return offset;
}
