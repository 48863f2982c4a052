// Settings panel: model, system prompt, sampling, structured output.

import { h, icon } from "./dom.js";
import { bytes, count } from "./format.js";
import { DEFAULTS, loadSettings, saveSettings, TEXT_DEFAULTS } from "./store.js";
import { TextSettings } from "./text_settings.js";

const FIELDS = [
  {
    ...{ name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
    hint: "0 always takes the likeliest token.",
  },
  {
    ...{ name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, isFilter: true },
    hint: "Keep the most likely tokens of this total probability.",
  },
  {
    ...{ name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, isFilter: true },
    hint: "Keep tokens at least this probable relative to the most likely one.",
  },
  {
    ...{ name: "top_k", label: "Top k", min: 0, max: 1 << 20, step: 1, isFilter: true, isNumber: true },
    hint: "Keep this many of the most likely tokens; 0 keeps all.",
  },
  {
    ...{ name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.05 },
    hint: "Lowers tokens that the answer already has.",
  },
  {
    ...{ name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.05 },
    hint: "Lowers tokens by how often the answer has them.",
  },
  {
    ...{ name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.01 },
    hint: "Divides tokens of the prompt and the answer; 1 changes nothing.",
  },
  {
    ...{ name: "max_tokens", label: "Max tokens", min: 1, max: 1 << 20, step: 1, isNumber: true },
    hint: "Empty: up to the end of the context.",
  },
  {
    ...{ name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, isNumber: true },
    hint: "Empty: a random one each time.",
  },
];

export class SettingsPanel {
  values = loadSettings();
  #panel = document.getElementById("settings");
  #toggle = document.getElementById("toggle-settings");
  #system = document.getElementById("system");
  #controls = new Map();
  #text;

  /** `onSystem(text)`: the system prompt was changed; `onModel(id)`: another model was chosen. */
  constructor({ onSystem, onModel }) {
    this.#toggle.append(icon("sliders"));
    this.#toggle.addEventListener("click", () => this.toggle());
    const close = document.getElementById("close-settings");
    close.append(icon("close"));
    close.addEventListener("click", () => this.toggle(false));
    this.#panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.toggle(false);
    });
    this.#system.addEventListener("change", () => {
      this.#keep("system", this.#system.value);
      onSystem(this.#system.value);
    });
    document.getElementById("model").addEventListener("change", ({ target }) => {
      this.#keep("model", target.value);
      onModel(target.value);
    });
    this.#text = new TextSettings(this.values, (name, text) => this.#keep(name, text));
    const form = document.getElementById("sampling");
    form.addEventListener("reset", (event) => this.#reset(event));
    form.addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("sampling-fields").append(...FIELDS.map((field) => this.#build(field)));
    this.#show();
    this.toggle(false, { focus: false });
  }

  toggle(isOpen = this.#panel.hidden, { focus = true } = {}) {
    this.#panel.hidden = !isOpen;
    document.getElementById("app").classList.toggle("settings-open", isOpen);
    this.#toggle.setAttribute("aria-expanded", String(isOpen));
    if (focus) (isOpen ? this.#system : this.#toggle).focus();
  }

  showSystem(text) {
    // Another tab may save while the user types here.
    if (this.#system.value !== text && document.activeElement !== this.#system) this.#system.value = text;
  }

  /** The list of models, and facts about the selected one. */
  showModels(models, current) {
    const select = document.getElementById("model");
    select.replaceChildren(...models.map(({ id }) => h("option", { value: id, selected: id === current?.id }, id)));
    select.disabled = models.length < 2;
    this.#text.showModel(current);
    const facts = current ? factsOf(current) : [];
    document
      .getElementById("model-facts")
      .replaceChildren(...facts.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
    const hasSystem = current?.has_chat_template !== false;
    this.#system.disabled = !hasSystem;
    document.getElementById("system-hint").textContent = hasSystem
      ? "Applies to this conversation and to new ones."
      : "This model has no chat template, so it takes no system prompt.";
  }

  #keep(name, value) {
    this.values[name] = value;
    saveSettings(this.values);
  }

  #build(field) {
    const { name, label, hint, isNumber } = field;
    const limits = { min: field.min, max: field.max, step: field.step };
    const input = h("input", {
      id: `sampling-${name}`,
      type: isNumber ? "number" : "range",
      inputMode: isNumber ? "numeric" : undefined,
      placeholder: isNumber && DEFAULTS[name] === null ? "none" : undefined,
      "aria-describedby": `hint-${name}`,
      ...limits,
      on: { input: () => this.#take(field, input) },
    });
    const output = isNumber ? null : h("output", { for: input.id });
    const problem = h("p", { class: "field-problem", role: "alert" });
    this.#controls.set(name, { input, output, problem });
    return h(
      "div",
      { class: "field" },
      h("div", { class: "field-head" }, h("label", { for: input.id }, label), output),
      input,
      h("p", { class: "field-hint", id: `hint-${name}` }, hint),
      problem,
    );
  }

  #take({ name }, input) {
    const { problem } = this.#controls.get(name);
    const isValid = input.checkValidity();
    problem.textContent = isValid ? "" : `${input.validationMessage} The last good value holds.`;
    input.setAttribute("aria-invalid", String(!isValid));
    if (!isValid) return;
    this.#keep(name, input.value === "" ? DEFAULTS[name] : Number(input.value));
    this.#showOutputs();
  }

  #reset(event) {
    event.preventDefault(); // the browser would empty the fields after this
    const { system, model } = this.values;
    Object.assign(this.values, DEFAULTS, TEXT_DEFAULTS, { system, model });
    saveSettings(this.values);
    this.#text.show(this.values);
    this.#show();
  }

  #show() {
    for (const { name } of FIELDS) {
      const { input, problem } = this.#controls.get(name);
      input.value = this.values[name] ?? "";
      input.setAttribute("aria-invalid", "false");
      problem.textContent = "";
    }
    this.#showOutputs();
  }

  #showOutputs() {
    for (const { name, isFilter } of FIELDS) {
      const { input, output } = this.#controls.get(name);
      if (output) output.textContent = Number(this.values[name]).toFixed(2);
      // Greedy decoding has nothing to filter, and the server rejects such settings.
      if (isFilter) input.disabled = this.values.temperature === 0;
    }
  }
}

function factsOf(model) {
  const facts = [];
  if (model.max_model_len) facts.push(["Context", `${count(model.max_model_len)} tokens`]);
  if (model.cache_bytes_per_token) {
    const type = model.cache_dtype ? `, ${model.cache_dtype}` : "";
    facts.push(["KV cache per token", `${count(model.cache_bytes_per_token)} bytes${type}`]);
    const full = model.cache_bytes_per_token * model.max_model_len;
    if (full) facts.push(["KV cache at full context", bytes(full)]);
  }
  return facts;
}
