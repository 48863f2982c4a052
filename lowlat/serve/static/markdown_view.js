// Markdown as DOM nodes, also while it is still coming in: blocks that are complete stay as they
// are, only the last one is made anew. Owns the nodes of one answer.

import { copyButton, h } from "./dom.js";
import { renderInline } from "./inline.js";
import { parseBlocks } from "./markdown.js";

/** Shows a growing text in `element`, which it fills alone. */
export class MarkdownView {
  #element;
  /** Text before this offset has its final nodes. */
  #settled = 0;
  /** Nodes of the text after it. */
  #tail = [];
  /** The Text of the code block at the end whose fence is still open. */
  #openCode = null;

  constructor(element) {
    this.#element = element;
  }

  /** `text` is all of it so far and begins with what was shown before. */
  update(text) {
    const lines = text.slice(this.#settled).split("\n");
    const blocks = parseBlocks(lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line)));
    if (this.#growCode(blocks)) return;
    for (const node of this.#tail) node.remove();
    this.#tail = [];
    const settled = numSettled(blocks, lines);
    for (const block of blocks.slice(0, settled)) this.#element.append(renderBlock(block));
    for (const block of blocks.slice(settled)) this.#tail.push(renderBlock(block));
    this.#element.append(...this.#tail);
    if (settled > 0) this.#settled += offsetOf(lines, blocks[settled].line);
    this.#watchCode(blocks.at(-1), lines);
  }

  /** A long listing would be made anew for each token; its text is extended instead. */
  #growCode(blocks) {
    const open = this.#openCode;
    if (!open || blocks.length !== 1 || !blocks[0].isOpen) return false;
    open.appendData(blocks[0].text.slice(open.data.length));
    return true;
  }

  #watchCode(block, lines) {
    this.#openCode = null;
    // The language is known once the fence's own line is complete.
    if (this.#tail.length !== 1 || !block.isOpen || block.line >= lines.length - 1) return;
    const code = this.#tail[0].querySelector("pre code");
    if (!code.firstChild) code.append(document.createTextNode(""));
    this.#openCode = code.firstChild;
  }
}

/**
 * How many blocks no later text can change: all before the last one. Where the last one begins in
 * an unfinished line it may yet turn out to go on with the one before ("#" may become "#1").
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

/** The element of one block. */
function renderBlock(block) {
  switch (block.type) {
    case "heading":
      return renderHeading(block);
    case "code":
      return renderCode(block);
    case "quote":
      return h("blockquote", {}, block.blocks.map(renderBlock));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    case "rule":
      return h("hr");
    default:
      return h("p", {}, renderInline(block.text));
  }
}

function renderHeading({ level, text }) {
  // The page has its title as h1 and each message has an h2.
  const tag = `h${Math.min(6, level + 2)}`;
  return h(tag, { dataset: { level } }, renderInline(text));
}

function renderCode({ language, text }) {
  const code = h("code", {}, text);
  const name = language.slice(0, 40);
  return h(
    "div",
    { class: "code-block" },
    h(
      "div",
      { class: "code-head" },
      h("span", {}, name || "text"),
      copyButton("Copy code", () => code.textContent, { text: true }),
    ),
    // Focusable, as it may have to be scrolled sideways without a mouse.
    h("pre", { tabIndex: 0, role: "group", "aria-label": name ? `Code, ${name}` : "Code" }, code),
  );
}

function renderList({ isOrdered, start, isLoose, items }) {
  const props = isOrdered && start !== 1 ? { start } : {};
  return h(isOrdered ? "ol" : "ul", props, items.map((item) => renderItem(item, isLoose)));
}

function renderItem({ task, blocks }, isLoose) {
  const parts = blocks.flatMap((block) =>
    block.type === "paragraph" && !isLoose ? renderInline(block.text) : [renderBlock(block)],
  );
  if (task === null) return h("li", {}, parts);
  const box = h("input", { type: "checkbox", checked: task, disabled: true, "aria-label": task ? "done" : "to do" });
  return h("li", { class: "task" }, box, " ", parts);
}

function renderTable({ align, header, rows }) {
  const row = (tag, cells) =>
    h("tr", {}, cells.map((cell, column) => h(tag, { class: align[column] }, renderInline(cell))));
  const table = h(
    "table",
    {},
    h("thead", {}, row("th", header)),
    h("tbody", {}, rows.map((cells) => row("td", cells))),
  );
  return h("div", { class: "table-wrap", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
}
