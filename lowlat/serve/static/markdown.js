// Markdown to HTML with markdown-it: CommonMark, GitHub's tables, strikethrough, task lists and bare addresses, and
// math. HTML in the text stays text. Images become links, as the page fetches nothing from elsewhere.

import { highlight } from "./highlight.js";
import { addMath } from "./math_rules.js";
import MarkdownIt from "./vendor/markdown-it.js";

const parser = new MarkdownIt({ html: false, linkify: true, breaks: false });
// "readme.md" is a file and no host in Moldova.
parser.linkify.set({ fuzzyLink: false });
parser.validateLink = isSafeAddress;
addMath(parser);
parser.core.ruler.push("tasks", markTasks);

/** Whether a link may lead there: http, https and mailto only. */
export function isSafeAddress(address) {
  // Browsers drop control characters inside a scheme ("java\nscript:"), so none is allowed.
  return !/[\u0000-\u0020\u007f-\u009f]/.test(address) && /^(https?:\/\/|mailto:)/i.test(address);
}

/**
 * The top-level blocks of `text`: {line, tokens}, where `line` is the first line's number. `isComplete`: no text will
 * follow, so that an open listing is finished.
 */
export function parseBlocks(text, { isComplete }) {
  const tokens = parser.parse(text, {});
  const lines = text.split("\n");
  const blocks = [];
  for (const token of tokens) {
    if (token.type === "fence") token.meta = { isOpen: !isComplete && isOpenFence(token, lines) };
    if (token.level === 0 && token.nesting >= 0) blocks.push({ line: token.map[0], tokens: [] });
    blocks.at(-1).tokens.push(token);
  }
  return blocks;
}

export const renderBlock = (block) => parser.renderer.render(block.tokens, parser.options, {});

function isOpenFence({ map, markup }, lines) {
  const last = lines[map[1] - 1].trimEnd();
  return map[1] - map[0] < 2 || !last.endsWith(markup);
}

const TASK = /^\[([ xX])\] /;

/** List items that begin with a box, "[ ]" or "[x]". */
function markTasks({ tokens }) {
  for (const [at, token] of tokens.entries()) {
    const isItem = token.type === "inline" && tokens[at - 2]?.type === "list_item_open";
    const box = isItem && token.children[0]?.type === "text" ? TASK.exec(token.children[0].content) : null;
    if (!box) continue;
    token.children[0].content = token.children[0].content.slice(box[0].length);
    tokens[at - 2].attrSet("class", box[1] === " " ? "task" : "task done");
  }
}

const escape = (text) => parser.utils.escapeHtml(text);
const linkTo = (address) => `<a href="${escape(address)}" rel="noopener noreferrer nofollow" target="_blank">`;

parser.renderer.renderToken = (tokens, index) => {
  const token = tokens[index];
  if (token.hidden) return "";
  // The parser's alignment of cells is a style, which the Content-Security-Policy forbids.
  const align = /text-align:(\w+)/.exec(token.attrGet("style") ?? "")?.[1];
  if (align) token.attrs = [["class", align]];
  return `<${token.nesting < 0 ? "/" : ""}${token.tag}${parser.renderer.renderAttrs(token)}>`;
};

Object.assign(parser.renderer.rules, {
  hardbreak: () => "<br>",
  // The page has its title as h1 and each message has an h2.
  heading_open: (tokens, index) => {
    const level = Number(tokens[index].tag[1]);
    return `<h${Math.min(6, level + 2)} data-level="${level}">`;
  },
  heading_close: (tokens, index) => `</h${Math.min(6, Number(tokens[index].tag[1]) + 2)}>`,
  link_open: (tokens, index) => linkTo(tokens[index].attrGet("href")),
  image: (tokens, index) => {
    const address = tokens[index].attrGet("src");
    return `${linkTo(address)}${escape(tokens[index].content || address)}</a>`;
  },
  fence: (tokens, index) => {
    const { content, info, meta } = tokens[index];
    return listing(content, parser.utils.unescapeAll(info).trim().split(/\s/, 1)[0], meta.isOpen);
  },
  code_block: (tokens, index) => listing(tokens[index].content, "", false),
  math_inline: math,
  math_block: math,
});

function listing(content, language, isOpen) {
  const code = content.endsWith("\n") ? content.slice(0, -1) : content;
  const html = (isOpen ? null : highlight(code, language)) ?? escape(code);
  return `<div class="code-block" data-language="${escape(language.slice(0, 40))}"><pre><code>${html}</code></pre></div>`;
}

function math(tokens, index) {
  const { tag, content, meta } = tokens[index];
  if (meta.isOpen) return `<p>${escape(`${meta.markup}\n${content}`)}</p>`;
  return `<${tag} class="math" data-display="${meta.isDisplay}">${escape(content)}</${tag}>`;
}
