// Sanitized DOM nodes of Markdown blocks: HTML passes DOMPurify, then math, copy buttons and boxes are added by script.

import { copyButton, h } from "./dom.js";
import { isSafeAddress, renderBlock } from "./markdown.js";
import { renderMath } from "./math.js";
import DOMPurify from "./vendor/dompurify.js";

const RULES = {
  ALLOWED_TAGS: [
    ...["a", "blockquote", "br", "code", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "span"],
    ...["strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ],
  ALLOWED_ATTR: ["class", "data-display", "data-language", "data-level", "href", "rel", "start", "target"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("uponSanitizeAttribute", (element, data) => {
  if (data.attrName === "href" && !isSafeAddress(data.attrValue)) data.keepAttr = false;
});

/** A fragment with the nodes of `blocks` (see parseBlocks). */
export function renderBlocks(blocks) {
  const fragment = DOMPurify.sanitize(blocks.map(renderBlock).join(""), RULES);
  fragment.querySelectorAll(".code-block").forEach(dressCode);
  fragment.querySelectorAll("table").forEach(dressTable);
  fragment.querySelectorAll(".math").forEach(dressMath);
  fragment.querySelectorAll(".task").forEach(dressTask);
  return fragment;
}

/** The text node of an open listing's code. */
export function codeText(element) {
  const code = element.querySelector("pre code");
  if (!code.firstChild) code.append("");
  return code.firstChild;
}

function dressCode(block) {
  const { language } = block.dataset;
  const pre = block.querySelector("pre");
  block.removeAttribute("data-language");
  block.prepend(
    h(
      "div",
      { class: "code-head" },
      h("span", {}, language || "text"),
      copyButton("Copy code", () => pre.textContent, { text: true }),
    ),
  );
  // Focusable, as it may have to be scrolled sideways without a mouse.
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
}

function dressTable(table) {
  const wrap = h("div", { class: "table-wrap", tabIndex: 0, role: "group", "aria-label": "Table" });
  table.replaceWith(wrap);
  wrap.append(table);
}

/** Invalid TeX stays as its source. */
function dressMath(element) {
  const tex = element.textContent;
  const isDisplay = element.dataset.display === "true";
  element.removeAttribute("data-display");
  const node = renderMath(tex, isDisplay);
  element.classList.toggle("display", isDisplay);
  element.classList.toggle("invalid", node === null);
  if (node !== null) element.replaceChildren(node);
  if (isDisplay && node !== null) {
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Formula");
  }
}

function dressTask(item) {
  const isDone = item.classList.contains("done");
  item.classList.remove("done");
  const box = h("input", { type: "checkbox", disabled: true, "aria-label": isDone ? "done" : "to do" });
  box.toggleAttribute("checked", isDone); // an attribute, as nodes are compared by them
  const text = item.firstElementChild?.localName === "p" ? item.firstElementChild : item;
  text.prepend(box, " ");
}
