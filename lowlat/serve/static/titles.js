// Titles of conversations: the first line of the first message, until the user gives a name.

import { pathOf } from "./tree.js";

const TITLE_LENGTH = 60;

/** The title from the shown messages. */
export function titleFor(conversation) {
  const first = pathOf(conversation).find(({ role }) => role === "user");
  const line = (first?.content.trim() || first?.files?.[0]?.name || "").split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

/** Updates the title after the first message was edited or another version is shown. */
export function retitle(conversation) {
  if (!conversation.isNamed) conversation.title = titleFor(conversation) || conversation.title;
}
