// Syntax highlighting with highlight.js, for the languages of its common set.

import { memoize } from "./memo.js";
import hljs from "./vendor/highlight.js";

// Above this length colours would cost more than a frame.
const MAX_LENGTH = 50_000;

const highlightKey = memoize((key) => {
  const split = key.indexOf("\n");
  return hljs.highlight(key.slice(split + 1), { language: key.slice(0, split), ignoreIllegals: true }).value;
});

/** HTML of `code` with spans of classes; null if the language is unknown or the code too long. */
export function highlight(code, language) {
  if (code.length > MAX_LENGTH || !hljs.getLanguage(language)) return null;
  return highlightKey(`${language}\n${code}`);
}
