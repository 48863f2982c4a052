// Export of conversations as Markdown or JSON files.

import { h } from "./dom.js";

/** Saves `conversation` as "markdown" or "json". */
export function exportConversation(conversation, format) {
  const isJson = format === "json";
  const text = isJson ? JSON.stringify(conversation, null, 2) : toMarkdown(conversation);
  const blob = new Blob([text], { type: isJson ? "application/json" : "text/markdown" });
  const href = URL.createObjectURL(blob);
  h("a", { href, download: `${fileName(conversation.title)}.${isJson ? "json" : "md"}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** The conversation as one Markdown text. */
export function toMarkdown({ title, system, messages }) {
  const parts = [`# ${title || "Conversation"}`];
  if (system.trim()) parts.push("## System", system);
  for (const message of messages) {
    parts.push(message.role === "user" ? "## You" : "## Answer");
    if (message.reasoning) parts.push(message.reasoning.replace(/^/gm, "> "));
    if (message.content) parts.push(message.content);
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
