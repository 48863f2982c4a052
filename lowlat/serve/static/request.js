// Request bodies: messages (or plain text, for a model without chat template) and sampling settings.

/** Path and body of the request for the next response of `model` (an entry of /v1/models). */
export function buildRequest(model, conversation, settings) {
  const sampling = buildSampling(settings);
  if (model.has_chat_template === false) {
    const prompt = plainText(conversation);
    const body = { model: model.id, prompt, max_tokens: roomFor(prompt, model), ...sampling };
    return { path: "v1/completions", body };
  }
  return {
    path: "v1/chat/completions",
    body: { model: model.id, messages: buildMessages(conversation), ...sampling },
  };
}

/** The text so far: all messages, concatenated. */
export function plainText(conversation) {
  return conversation.messages.map((message) => message.content).join("");
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
  for (const { role, content } of messages) {
    if (!content) continue;
    const last = built.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else built.push({ role, content });
  }
  return built;
}

/** At temperature 0 decoding is greedy; filters would be an error. */
function buildSampling({ temperature, top_p, top_k, min_p, max_tokens, seed }) {
  const body = { temperature };
  if (temperature > 0) {
    body.top_p = top_p;
    if (top_k > 0) body.top_k = top_k;
    if (min_p > 0) body.min_p = min_p;
  }
  if (max_tokens !== null) body.max_tokens = max_tokens;
  if (seed !== null) body.seed = seed;
  return body;
}
