// Import of conversations from exported JSON files. Every field is checked: a file may come from anywhere.

import { FORMAT } from "./export.js";
import { newId } from "./ids.js";
import { newAnswer } from "./run.js";
import { newConversation } from "./store.js";
import { titleFor } from "./titles.js";
import { upgrade } from "./tree.js";

/**
 * The conversations in the text of a file: of all conversations, of one, or of one from before there were versions.
 * Raises Error with one line for anything else.
 */
export function readConversations(text, name) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error(`${name} is not JSON; choose a file that this page exported.`);
  }
  const found = data?.format === FORMAT ? data.conversations : Array.isArray(data) ? data : [data];
  if (!Array.isArray(found) || !found.length || !found.every(isConversation)) {
    throw new Error(`${name} has no conversations of this page; choose a file that it exported.`);
  }
  return found.map(clean);
}

const isText = (value) => typeof value === "string";
const textOr = (value, other) => (isText(value) ? value : other);
const numberOr = (value, other) => (Number.isFinite(value) ? value : other);
/** Ids are part of addresses and of keys in storage. */
const isId = (value) => isText(value) && /^[\w-]{1,64}$/.test(value);

function isConversation(value) {
  return Array.isArray(value?.messages) && value.messages.every(isMessage);
}

function isMessage(value) {
  return ["user", "assistant"].includes(value?.role) && isText(value.content);
}

function clean(data) {
  const conversation = newConversation(textOr(data.system, ""));
  const ids = data.messages.map(({ id }) => id);
  const isTree = ids.every(isId) && new Set(ids).size === ids.length;
  Object.assign(conversation, {
    id: isId(data.id) ? data.id : newId(),
    title: textOr(data.title, "").slice(0, 200),
    created: numberOr(data.created, conversation.created),
    updated: numberOr(data.updated, conversation.updated),
    messages: data.messages.map((message) => cleanMessage(message, isTree)),
    head: isTree && ids.includes(data.head) ? data.head : (ids.at(-1) ?? null),
  });
  upgrade(conversation);
  dropLoops(conversation);
  conversation.isNamed = conversation.title !== "" && conversation.title !== titleFor(conversation);
  return conversation;
}

function cleanMessage(data, isTree) {
  const place = isTree ? { id: data.id, parent: isId(data.parent) ? data.parent : null } : {};
  if (data.role === "user") return { role: "user", content: data.content, files: cleanFiles(data.files), ...place };
  const calls = Array.isArray(data.toolCalls) ? data.toolCalls.filter(Boolean) : [];
  return {
    ...newAnswer(textOr(data.model, "")),
    content: data.content,
    reasoning: textOr(data.reasoning, ""),
    reasoningSeconds: numberOr(data.reasoningSeconds, null),
    toolCalls: calls.map((call) => ({ name: String(call.name), arguments: String(call.arguments) })),
    status: data.status === "done" ? "done" : "stopped",
    finishReason: isText(data.finishReason) ? data.finishReason : null,
    usage: cleanUsage(data.usage),
    ...(data.isEdited === true ? { isEdited: true } : {}),
    ...place,
  };
}

function cleanFiles(files) {
  const valid = Array.isArray(files) ? files.filter((file) => isText(file?.name) && isText(file?.text)) : [];
  return valid.map(({ name, text }) => ({ name, text }));
}

function cleanUsage(usage) {
  if (!Number.isFinite(usage?.completionTokens)) return null;
  return {
    promptTokens: numberOr(usage.promptTokens, null),
    completionTokens: usage.completionTokens,
    cachedTokens: numberOr(usage.cachedTokens, 0),
    prefillSeconds: numberOr(usage.prefillSeconds, null),
    tokensPerSecond: numberOr(usage.tokensPerSecond, null),
    contextTokens: numberOr(usage.contextTokens, null),
    isEstimate: usage.isEstimate === true || !Number.isFinite(usage.promptTokens),
  };
}

/** A message's parent comes before it; others begin a path. */
function dropLoops({ messages }) {
  const known = new Set();
  for (const message of messages) {
    if (!known.has(message.parent)) message.parent = null;
    known.add(message.id);
  }
}
