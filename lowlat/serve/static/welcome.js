// Welcome screen of an empty conversation: model, context length, cache size, example prompts.

import { h } from "./dom.js";
import { bytes, count } from "./format.js";

const IDEAS = [
  "Explain latent attention to a curious ten-year-old.",
  "Write a Python function that merges overlapping intervals, with tests.",
  "Compare three ways to brew coffee in a table.",
];

/** `onIdea(text)` is called with the example that was chosen. */
export function welcome(model, onIdea) {
  const isChat = model?.has_chat_template !== false;
  const mark = h("img", { src: "static/icon.svg", alt: "", width: 56, height: 56 });
  const ideas = h(
    "ul",
    { class: "ideas", "aria-label": "Examples" },
    IDEAS.map((idea) => h("li", {}, h("button", { type: "button", on: { click: () => onIdea(idea) } }, idea))),
  );
  return h(
    "div",
    { class: "welcome" },
    mark,
    h("h2", {}, isChat ? "What would you like to know?" : "Begin a text; the model continues it"),
    model ? h("p", {}, describe(model)) : null,
    isChat ? ideas : null,
  );
}

function describe(model) {
  const parts = [model.id];
  if (model.max_model_len) parts.push(`${count(model.max_model_len)} tokens of context`);
  if (model.cache_bytes_per_token) parts.push(`${bytes(model.cache_bytes_per_token)} of cache for each`);
  return parts.join(" · ");
}
