// DOM nodes of Markdown blocks, and their update when a block grows. Text in, as text only;
// knows nothing of streaming.

import { copyButton, h } from "./dom.js";
import { renderInline } from "./inline.js";

/** The element of one block (see parseBlocks). */
export function renderBlock(block) {
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

/**
 * Updates `node`, the element of `before`, to `after`, a later state of the same block; false if it
 * must be rebuilt. A long listing, list or table costs only what was added to it.
 */
export function growBlock(node, before, after) {
  if (before.type !== after.type) return false;
  if (after.type === "code") return growCode(node, before, after);
  if (after.type === "list") return growList(node, before, after);
  return after.type === "table" && growTable(node, before, after);
}

function growCode(node, before, after) {
  if (before.language !== after.language || !before.isOpen || !after.isOpen) return false;
  const code = node.querySelector("pre code");
  const more = after.text.slice(before.text.length);
  if (code.firstChild) code.firstChild.appendData(more);
  else code.append(more);
  return true;
}

function growList(node, before, after) {
  const isSame = ["isOrdered", "start", "isLoose"].every((name) => before[name] === after[name]);
  if (isSame) growChildren(node, before.items, after.items, (item) => renderItem(item, after.isLoose));
  return isSame;
}

function growTable(node, before, after) {
  const sourceOf = ({ align, header }) => JSON.stringify([align, header]);
  if (sourceOf(before) !== sourceOf(after)) return false;
  growChildren(node.querySelector("tbody"), before.rows, after.rows, (row) => renderRow("td", row.cells, after.align));
  return true;
}

/** Rebuilds the children whose record has another `source`, which are the last ones. */
function growChildren(parent, before, after, render) {
  let same = 0;
  while (same < before.length && before[same].source === after[same]?.source) same += 1;
  while (parent.children.length > same) parent.lastChild.remove();
  parent.append(...after.slice(same).map(render));
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
  const table = h(
    "table",
    {},
    h("thead", {}, renderRow("th", header, align)),
    h("tbody", {}, rows.map(({ cells }) => renderRow("td", cells, align))),
  );
  return h("div", { class: "table-wrap", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
}

function renderRow(tag, cells, align) {
  return h("tr", {}, cells.map((cell, column) => h(tag, { class: align[column] }, renderInline(cell))));
}
