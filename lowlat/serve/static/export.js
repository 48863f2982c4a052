// Export of conversations as Markdown or JSON files.

import { h } from "./dom.js";
import { sentText } from "./request.js";
import { pathOf } from "./tree.js";

/** Names the form of a file with several conversations; see import.js. */
export const FORMAT = "lowlat-conversations";

/** Saves `conversation` as "markdown" or "json". */
export function exportConversation(conversation, format) {
  const name = fileName(conversation.title);
  if (format === "json") save(`${name}.json`, JSON.stringify(conversation, null, 2), "application/json");
  else save(`${name}.md`, toMarkdown(conversation), "text/markdown");
}

/** Saves all conversations, with all versions, as one JSON file. */
export function exportAll(conversations) {
  const day = new Date().toISOString().slice(0, 10);
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  save(`lowlat-conversations-${day}.json`, text, "application/json");
}

function save(download, text, type) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href, download }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** The shown messages as one Markdown text. */
export function toMarkdown(conversation) {
  const { title, system } = conversation;
  const parts = [`# ${title || "Conversation"}`];
  if (system.trim()) parts.push("## System", system);
  for (const message of pathOf(conversation)) {
    parts.push(message.role === "user" ? "## You" : "## Answer");
    if (message.reasoning) parts.push(message.reasoning.replace(/^/gm, "> "));
    const text = sentText(message);
    if (text) parts.push(text);
    for (const call of message.toolCalls?.filter(Boolean) ?? []) {
      parts.push(`\`${call.name}(${call.arguments})\``);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

function fileName(title) {
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  return name.slice(0, 60) || "conversation";
}
