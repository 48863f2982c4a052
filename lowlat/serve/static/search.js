// Search in conversations: every word of the query must occur, in titles, messages or files, in any script.

import { sentText } from "./request.js";

const EXCERPT = 40;

/** Without case, and with one spelling of equal characters; hyphens and signs stay. */
const fold = (text) => text.normalize("NFKC").toLowerCase();

/** The conversations that match, each {conversation, excerpt}: the text around the first word, or "". */
export function search(conversations, query) {
  const words = fold(query).split(/\s+/u).filter(Boolean);
  return conversations.flatMap((conversation) => {
    const texts = conversation.messages.map(sentText);
    const all = fold([conversation.title, ...texts].join("\n"));
    if (!words.every((word) => all.includes(word))) return [];
    return [{ conversation, excerpt: words.length ? excerptOf(texts, words[0]) : "" }];
  });
}

function excerptOf(texts, word) {
  for (const text of texts) {
    const folded = fold(text);
    const at = folded.indexOf(word);
    if (at < 0) continue;
    const start = Math.max(0, at - EXCERPT / 2);
    // Folding may change lengths; the excerpt is then of the folded text.
    const source = folded.length === text.length ? text : folded;
    return `${start ? "…" : ""}${source.slice(start, at + word.length + EXCERPT).replaceAll(/\s+/g, " ").trim()}`;
  }
  return "";
}
