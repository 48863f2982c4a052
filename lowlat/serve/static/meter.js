// Meter: tokens per second, context usage, and the KV cache bytes it takes.

import { bytes, count, rate, seconds } from "./format.js";
import { sentText } from "./request.js";

const CHARS_PER_TOKEN = 4; // estimate until the server reports the usage

/** Tokens of the shown messages: {tokens, isExact}. */
export function contextTokens(messages, run) {
  let tokens = 0;
  let isExact = true;
  for (const message of messages) {
    const { usage } = message;
    if (usage && !usage.isEstimate && message.status !== "running") {
      // Records from before answers could be continued have no contextTokens.
      tokens = usage.contextTokens ?? usage.promptTokens + usage.completionTokens;
      isExact = true;
    } else {
      const isGrowing = run?.message === message;
      const estimate = isGrowing ? run.pieces : Math.ceil(sentText(message).length / CHARS_PER_TOKEN);
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

  update(messages, run, model) {
    this.#rate.textContent = run ? speedOf(run) : "";
    this.#usage.hidden = !model?.max_model_len || !messages.length;
    if (this.#usage.hidden) return;
    const { tokens, isExact } = contextTokens(messages, run);
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
