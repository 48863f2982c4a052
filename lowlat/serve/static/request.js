// Request bodies: messages (or plain text, for a model without chat template) and sampling settings.

import { textOptions } from "./text_settings.js";

/**
 * Path and body of the request for the next response of `model` (an entry of /v1/models). `conversation.messages` are
 * those to send. `isResumed`: the model continues the last one, its own.
 */
export function buildRequest(model, conversation, settings, { isResumed = false } = {}) {
  const sampling = { ...buildSampling(settings), ...textOptions(model, settings, { isResumed }) };
  if (model.has_chat_template === false) {
    const prompt = plainText(conversation);
    const body = { model: model.id, prompt, max_tokens: roomFor(prompt, model), ...sampling };
    return { path: "v1/completions", body };
  }
  const prefill = isResumed ? { continue_final_message: true, add_generation_prompt: false } : {};
  return {
    path: "v1/chat/completions",
    body: { model: model.id, messages: buildMessages(conversation), ...sampling, ...prefill },
  };
}

/** The text of a message with its attached files, each in a fence that it does not contain. */
export function sentText({ content, files = [] }) {
  const attached = files.map(({ name, text }) => {
    const runs = [...text.matchAll(/`{3,}/g)].map(([run]) => run.length);
    const fence = "`".repeat(Math.max(2, ...runs) + 1);
    return `File: ${name}\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
  });
  return [...attached, ...(content ? [content] : [])].join("\n\n");
}

/** The text so far: all messages, concatenated. */
export function plainText(conversation) {
  return conversation.messages.map(sentText).join("");
}

/**
 * max_tokens for completions: the API's default is 16, and more than the rest of the context is an
 * error. A token covers at least one byte, so the prompt has at most as many tokens as bytes.
 */
function roomFor(prompt, { max_model_len: context }) {
  return Math.max(16, context - new TextEncoder().encode(prompt).length - 2);
}

/**
 * Messages in the API's format. Reasoning and tool calls of earlier answers are left out, as models
 * expect. An answer without text is left out, and the user messages around it are merged into one.
 */
function buildMessages({ system, messages }) {
  const built = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    const [role, content] = [message.role, sentText(message)];
    if (!content) continue;
    const last = built.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else built.push({ role, content });
  }
  return built;
}

/** At temperature 0 decoding is greedy; filters would be an error. */
function buildSampling({ temperature, top_p, top_k, min_p, max_tokens, seed, ...penalties }) {
  const body = { temperature };
  const { presence_penalty, frequency_penalty, repetition_penalty } = penalties;
  if (presence_penalty !== 0) body.presence_penalty = presence_penalty;
  if (frequency_penalty !== 0) body.frequency_penalty = frequency_penalty;
  if (repetition_penalty !== 1) body.repetition_penalty = repetition_penalty;
  if (temperature > 0) {
    body.top_p = top_p;
    if (top_k > 0) body.top_k = top_k;
    if (min_p > 0) body.min_p = min_p;
  }
  if (max_tokens !== null) body.max_tokens = max_tokens;
  if (seed !== null) body.seed = seed;
  return body;
}
