// Meter: tokens per second, context usage, and the KV cache bytes it takes.

import { bytes, count, rate, seconds } from "./format.js";

const CHARS_PER_TOKEN = 4; // estimate until the server reports the usage

/** Tokens of the conversation: {tokens, isExact}. */
export function contextTokens({ messages }, run) {
  let tokens = 0;
  let isExact = true;
  for (const message of messages) {
    if (message.usage) {
      tokens = message.usage.promptTokens + message.usage.completionTokens;
      isExact = true;
    } else {
      const isGrowing = run?.message === message;
      const estimate = isGrowing ? run.pieces : Math.ceil(message.content.length / CHARS_PER_TOKEN);
      tokens += estimate;
      isExact &&= estimate === 0;
    }
  }
  return { tokens, isExact };
}

export class Meter {
  #usage = document.getElementById("usage");
  #fill = document.getElementById("usage-fill");
  #text = document.getElementById("usage-text");
  #rate = document.getElementById("rate");

  update(conversation, run, model) {
    this.#rate.textContent = run ? speedOf(run) : "";
    this.#usage.hidden = !model?.max_model_len || !conversation.messages.length;
    if (this.#usage.hidden) return;
    const { tokens, isExact } = contextTokens(conversation, run);
    const share = Math.min(1, tokens / model.max_model_len);
    this.#fill.style.width = `${100 * share}%`;
    this.#usage.classList.toggle("is-nearly-full", share > 0.9);
    const about = isExact ? "" : "≈ ";
    const cache = model.cache_bytes_per_token
      ? `${bytes(tokens * model.cache_bytes_per_token)} ${model.cache_dtype ?? ""} cache`
      : "";
    this.#text.replaceChildren(
      span("tokens", `${about}${count(tokens)} / ${count(model.max_model_len)} tokens`),
      span("cache", cache),
    );
  }
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

function speedOf(run) {
  const speed = run.rate;
  return speed === null ? seconds(run.elapsed) : `${rate(speed)} · ${seconds(run.elapsed)}`;
}
