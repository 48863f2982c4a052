// Parser of Markdown blocks: lines in, plain records out. Owns what begins and ends a block; makes no nodes.
// Follows CommonMark and GitHub's tables where answers of models do, and is lenient about the
// indentation of nested lists, which models often get wrong.

const FENCE = /^ {0,3}(`{3,}(?!.*`)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TASK = /^\[([ xX])\][ \t]+/;
const DELIMITER = /^:?-+:?$/;
// Deeper nesting is rendered as text, which bounds the recursion.
const MAX_DEPTH = 12;

/**
 * Blocks of `lines`, each with `line`, the index of its first line, and `type`: paragraph (text),
 * heading (level, text), code (language, text, isOpen), quote (blocks), rule, table (align, header,
 * rows: {cells, source}) or list (isOrdered, start, isLoose, items: {task, blocks, source}).
 */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = parseBlock(lines, at, depth);
    blocks.push({ ...block, line: at });
    at = next;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return parseFence(lines, at, fence);
  if (indentOf(line) >= 4) return parseIndented(lines, at);
  if (HEADING.test(line)) return [parseHeading(line), at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return parseQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return parseList(lines, at, depth);
  if (isTable(lines, at)) return parseTable(lines, at);
  return parseParagraph(lines, at);
}

const isBlank = (line) => line.trim() === "";

/** Columns of white space before the text; a tab is 4. */
function indentOf(line) {
  let columns = 0;
  for (const char of line) {
    if (char === " ") columns += 1;
    else if (char === "\t") columns += 4;
    else break;
  }
  return columns;
}

/** `line` without its first `columns` columns of white space, or without as many as it has. */
function strip(line, columns) {
  let at = 0;
  while (columns > 0 && (line[at] === " " || line[at] === "\t")) {
    columns -= line[at] === " " ? 1 : 4;
    at += 1;
  }
  return " ".repeat(Math.max(0, -columns)) + line.slice(at);
}

/** Whether the line at `at` ends a paragraph by beginning something else. */
function interrupts(lines, at) {
  const line = lines[at];
  if (isBlank(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line)) return true;
  if (RULE.test(line) || isTable(lines, at)) return true;
  const item = ITEM.exec(line);
  if (!item || item[0].length === line.length) return false;
  // "1986. A great year" within a sentence is no list.
  return !/\d/.test(item[2]) || Number.parseInt(item[2], 10) === 1;
}

function parseParagraph(lines, at) {
  const start = at;
  do at += 1;
  while (at < lines.length && !interrupts(lines, at));
  const text = lines.slice(start, at).map((line) => line.trimStart());
  return [{ type: "paragraph", text: text.join("\n").trimEnd() }, at];
}

function parseHeading(line) {
  const { 0: marker, 1: signs } = HEADING.exec(line);
  let text = line.slice(marker.length).trim();
  const end = text.length - (/#*$/.exec(text.slice(-16))?.[0].length ?? 0);
  // Closing signs stand alone: "C#" keeps its own.
  if (end === 0 || /\s/.test(text[end - 1])) text = text.slice(0, end).trim();
  return { type: "heading", level: signs.length, text };
}

function parseFence(lines, at, [, marker, info]) {
  const language = info.trim().split(/\s/, 1)[0];
  const indent = indentOf(lines[at]);
  const body = [];
  for (let next = at + 1; next < lines.length; next += 1) {
    const text = lines[next].trim();
    const isEnd = text.length >= marker.length && indentOf(lines[next]) < 4 && isRunOf(text, marker[0]);
    if (isEnd) return [{ type: "code", language, text: body.join("\n"), isOpen: false }, next + 1];
    body.push(strip(lines[next], indent));
  }
  return [{ type: "code", language, text: body.join("\n"), isOpen: true }, lines.length];
}

const isRunOf = (text, char) => text[0] === char && text === char.repeat(text.length);

function parseIndented(lines, at) {
  const start = at;
  while (at < lines.length && (indentOf(lines[at]) >= 4 || isBlank(lines[at]))) at += 1;
  while (isBlank(lines[at - 1])) at -= 1;
  const text = lines.slice(start, at).map((line) => strip(line, 4));
  return [{ type: "code", language: "", text: text.join("\n"), isOpen: false }, at];
}

function parseQuote(lines, at, depth) {
  const inner = [];
  while (at < lines.length) {
    if (QUOTE.test(lines[at])) inner.push(lines[at].replace(QUOTE, ""));
    // A sentence may continue without its ">".
    else if (!interrupts(lines, at) && inner.length && !isBlank(inner.at(-1))) inner.push(lines[at]);
    else break;
    at += 1;
  }
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, at];
}

function parseList(lines, at, depth) {
  const first = ITEM.exec(lines[at])[2];
  const isOrdered = /\d/.test(first);
  const start = isOrdered ? Number.parseInt(first, 10) : 1;
  const list = { type: "list", isOrdered, start, isLoose: false, items: [] };
  for (;;) {
    const [body, next] = takeItem(lines, at);
    list.items.push(makeItem(body, depth));
    at = next;
    let after = at;
    while (after < lines.length && isBlank(lines[after])) after += 1;
    const marker = after < lines.length && !RULE.test(lines[after]) ? ITEM.exec(lines[after])?.[2] : undefined;
    // Another kind of marker begins another list.
    if (marker?.at(-1) !== first.at(-1) || /\d/.test(marker) !== isOrdered) break;
    list.isLoose ||= after > at;
    at = after;
  }
  list.isLoose ||= list.items.some((item) => item.isLoose);
  return [list, at];
}

/** The lines of the item at `at`, its marker and indentation taken off, and where it ends. */
function takeItem(lines, at) {
  const [marker, indent] = ITEM.exec(lines[at]);
  const width = marker.trimEnd().length;
  const spaces = marker.length - width;
  const column = width + (spaces >= 1 && spaces <= 4 ? spaces : 1);
  const least = Math.min(column, indent.length + 2);
  const body = [lines[at].slice(Math.min(column, marker.length))];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    if (isBlank(line)) {
      body.push("");
    } else if (indentOf(line) >= least) {
      body.push(strip(line, column));
    } else if (isBlank(body.at(-1)) || interrupts(lines, next) || ITEM.test(line)) {
      break;
    } else {
      body.push(line);
    }
  }
  let end = next;
  while (body.length > 1 && isBlank(body.at(-1))) {
    body.pop();
    end -= 1;
  }
  return [body, end];
}

function makeItem(body, depth) {
  const source = body.join("\n");
  const task = TASK.exec(body[0]);
  if (task) body[0] = body[0].slice(task[0].length);
  const blocks = parseBlocks(body, depth + 1);
  const isLoose = blocks.slice(1).some((block) => isBlank(body[block.line - 1]));
  return { task: task ? task[1] !== " " : null, blocks, isLoose, source };
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const delimiters = splitRow(lines[at + 1]);
  return delimiters.every((cell) => DELIMITER.test(cell)) && delimiters.length === splitRow(lines[at]).length;
}

function parseTable(lines, at) {
  const header = splitRow(lines[at]);
  const align = splitRow(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "left";
  });
  const rows = [];
  for (at += 2; at < lines.length && lines[at].includes("|") && !interrupts(lines, at); at += 1) {
    const cells = splitRow(lines[at]);
    rows.push({ cells: header.map((_, column) => cells[column] ?? ""), source: lines[at] });
  }
  return [{ type: "table", align, header, rows }, at];
}

/** Cells of a table's row; a bar is text after a backslash. */
function splitRow(line) {
  const row = line.trim();
  const cells = [];
  let cell = "";
  for (let at = row.startsWith("|") ? 1 : 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (row[at] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else {
      cell += row[at];
    }
  }
  if (cell.trim() || !row.endsWith("|")) cells.push(cell.trim());
  return cells;
}
