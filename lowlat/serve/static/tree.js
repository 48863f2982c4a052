// Conversation tree: messages with parents. Editing and regenerating add versions next to the old ones, and `head`
// names the last message of the shown path. Nothing is ever removed.

import { newId } from "./ids.js";

/** The shown messages from the first to `head`. */
export function pathOf({ messages, head }) {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const path = [];
  for (let message = byId.get(head); message; message = byId.get(message.parent)) path.push(message);
  return path.reverse();
}

/** Adds `message` after `parent` (a message, or null at the beginning) and shows it. */
export function append(conversation, message, parent = pathOf(conversation).at(-1) ?? null) {
  Object.assign(message, { id: message.id ?? newId(), parent: parent?.id ?? null });
  conversation.messages.push(message);
  conversation.head = message.id;
  return message;
}

export function parentOf({ messages }, { parent }) {
  return messages.find(({ id }) => id === parent) ?? null;
}

/** All versions of `message`, the oldest first: the messages with the same parent. */
export function versionsOf({ messages }, message) {
  return messages.filter(({ parent }) => parent === message.parent);
}

/** Shows `message` and the newest messages after it. */
export function select(conversation, message) {
  for (let next = message; next; next = conversation.messages.findLast(({ parent }) => parent === next.id)) {
    conversation.head = next.id;
    message = next;
  }
}

/** A stored or imported conversation in today's form. Before there were versions, messages were a list without ids. */
export function upgrade(conversation) {
  if (conversation.head !== undefined && conversation.messages.every(({ id }) => id !== undefined)) return conversation;
  let parent = null;
  for (const message of conversation.messages) {
    message.parent = parent;
    // By the content, so that another import of the same file has the same ids.
    message.id ??= hash(`${parent}\n${message.role}\n${message.content}`);
    parent = message.id;
  }
  conversation.head = parent;
  const first = conversation.messages.find(({ role }) => role === "user")?.content.trim() ?? "";
  // A title that is not the beginning of the first message was given by the user.
  conversation.isNamed ??= !first.startsWith(conversation.title.replace(/…$/, ""));
  return conversation;
}

/**
 * `conversation` with the messages of `other`, another state of it, that it lacks. An answer that runs in another tab
 * is taken from `other`; `liveId` names the one that runs here.
 */
export function merge(conversation, other, liveId = null) {
  const theirs = new Map(other.messages.map((message) => [message.id, message]));
  const ours = conversation.messages.map((message) => {
    const isTheirs = message.status === "running" && message.id !== liveId && theirs.has(message.id);
    return isTheirs ? theirs.get(message.id) : message;
  });
  const known = new Set(ours.map(({ id }) => id));
  return { ...conversation, messages: [...ours, ...other.messages.filter(({ id }) => !known.has(id))] };
}

/** 64 bits of FNV-1a over the UTF-16 code units, in hexadecimal. */
function hash(text) {
  let value = 0xcbf29ce484222325n;
  for (let at = 0; at < text.length; at += 1) {
    value = BigInt.asUintN(64, (value ^ BigInt(text.charCodeAt(at))) * 0x100000001b3n);
  }
  return value.toString(16).padStart(16, "0");
}
