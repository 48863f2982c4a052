// Settings that are text: stop strings, a JSON schema, and whether the model thinks.

import { h } from "./dom.js";

const MAX_STOPS = 16;
const MAX_STOP_LENGTH = 256;
/** Variables of chat templates that switch reasoning. */
const SWITCHES = ["enable_thinking", "thinking"];

/** The stop strings of a text with one a line, where \n, \t and \\ stand for characters. */
export function readStops(text) {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replaceAll(/\\([nt\\])/g, (_, char) => escapes[char]));
}

/** Why `text` cannot be the setting `name`, or "". */
export function problemOf(name, text) {
  if (name === "stop") {
    const stops = readStops(text);
    if (stops.length > MAX_STOPS) return `At most ${MAX_STOPS} stop strings.`;
    const isLong = stops.some((stop) => stop.length > MAX_STOP_LENGTH);
    return isLong ? `A stop string has at most ${MAX_STOP_LENGTH} characters.` : "";
  }
  if (name !== "schema" || !text.trim()) return "";
  try {
    const schema = JSON.parse(text);
    return schema !== null && typeof schema === "object" && !Array.isArray(schema) ? "" : "A schema is a JSON object.";
  } catch (error) {
    return `Not JSON: ${error.message}.`;
  }
}

/** The variable of the model's chat template that switches reasoning, or undefined. */
export const thinkingSwitch = (model) => model?.chat_template_kwargs?.find((name) => SWITCHES.includes(name));

/** The parts of a request's body for these settings. */
export function textOptions(model, { stop, schema, thinking }, { isResumed }) {
  const body = {};
  const stops = readStops(stop);
  if (stops.length) body.stop = stops;
  // The rest of a document does not begin where its schema begins.
  if (schema.trim() && !isResumed) body.structured_outputs = { json: JSON.parse(schema) };
  const variable = thinkingSwitch(model);
  if (variable && thinking) body.chat_template_kwargs = { [variable]: thinking === "on" };
  return body;
}

export class TextSettings {
  #thinking = document.getElementById("thinking");
  #fields = Object.entries({ stop: "stop-strings", schema: "schema" }).map(([name, id]) => ({
    name,
    input: document.getElementById(id),
    problem: h("p", { class: "field-problem", role: "alert" }),
  }));

  /** `onChange(name, text)` is called with valid values. */
  constructor(values, onChange) {
    for (const { name, input, problem } of this.#fields) {
      input.after(problem);
      input.addEventListener("input", () => {
        const found = problemOf(name, input.value);
        problem.textContent = found ? `${found} The last good value holds.` : "";
        input.setAttribute("aria-invalid", String(Boolean(found)));
        if (!found) onChange(name, input.value);
      });
    }
    this.#thinking.addEventListener("change", () => onChange("thinking", this.#thinking.value));
    this.show(values);
  }

  show(values) {
    this.#thinking.value = values.thinking;
    for (const { name, input, problem } of this.#fields) {
      input.value = values[name];
      input.setAttribute("aria-invalid", "false");
      problem.textContent = "";
    }
  }

  showModel(model) {
    document.getElementById("thinking-field").hidden = thinkingSwitch(model) === undefined;
  }
}
