// View of one message: renders its record. The session implements the buttons.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { draftOf, editForm } from "./edit_form.js";
import { ErrorNote } from "./error_note.js";
import { count, plural, rate, seconds } from "./format.js";
import { fileNote } from "./file_chips.js";
import { MarkdownView } from "./markdown_view.js";
import { VersionPicker } from "./version_picker.js";

export class MessageView {
  /**
   * `actions`: regenerate(), resume(), edit(message, text), editAnswer(message, text), retry(), stop(),
   * showVersion(message, step).
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.versions = new VersionPicker((step) => this.actions.showVersion(this.message, step));
    this.element = h("article", { class: `message ${message.role}` });
    this.isLast = false;
    if (message.role === "user") this.#buildUser();
    else this.#buildAnswer();
    this.update();
    // An edit that was begun before another conversation was opened.
    if (draftOf(message.id) !== null) this.edit({ focus: false });
  }

  /** `message`: a later state of the record; `versions`: all versions of it; `isLast`: nothing comes after it. */
  show(message, { versions, isLast }) {
    this.message = message;
    this.isLast = isLast;
    this.versions.show(versions.indexOf(message), versions.length);
    this.update();
  }

  /** Renders the record. */
  update() {
    if (this.message.role === "user") return;
    const { message } = this;
    const isRunning = message.status === "running";
    this.#updateReasoning(isRunning);
    if (message.content) this.body.update(message.content, { isComplete: !isRunning });
    this.bodyElement.hidden = !message.content;
    this.#updateToolCalls();
    const isSilent = isRunning && !message.content && !message.reasoning && !message.toolCalls.length;
    this.waiting.hidden = !isSilent;
    this.error.update(message.error, this.isLast);
    this.note.textContent = noteOf(message);
    this.note.hidden = !this.note.textContent;
    this.stats.textContent = isRunning ? "" : statsOf(message.usage);
    this.foot.hidden = isRunning;
    this.copy.hidden = !message.content;
    this.again.hidden = !this.isLast || message.status === "error";
    this.resume.hidden = !this.isLast || !canResume(message);
    this.change.hidden = !message.content;
    this.element.setAttribute("aria-busy", String(isRunning));
  }

  /** Replaces the text with an edit form. */
  edit({ focus = true } = {}) {
    if (this.element.querySelector("form")) return;
    const isUser = this.message.role === "user";
    const before = [...this.element.children];
    const restore = () => {
      this.element.replaceChildren(...before);
      this.element.querySelector("button")?.focus();
    };
    const form = editForm(this.message, {
      onSave: (text) => {
        restore();
        (isUser ? this.actions.edit : this.actions.editAnswer)(this.message, text);
      },
      onCancel: restore,
    });
    this.element.replaceChildren(before[0], form);
    if (focus) form.querySelector("textarea").focus();
  }

  #buildUser() {
    const { content, files = [] } = this.message;
    this.element.append(
      h("h2", { class: "visually-hidden" }, "You"),
      ...files.map(fileNote),
      ...(content ? [h("div", { class: "bubble" }, content)] : []),
      h(
        "div",
        { class: "foot" },
        iconButton("edit", "Edit message", () => this.edit()),
        copyButton("Copy message", () => content),
        this.versions.element,
      ),
    );
  }

  #buildAnswer() {
    this.bodyElement = h("div", { class: "markdown" });
    this.body = new MarkdownView(this.bodyElement);
    const pulse = h("span", { class: "pulse", "aria-hidden": "true" });
    this.waiting = h("p", { class: "waiting" }, pulse, "Processing the prompt");
    this.tools = h("div", { class: "tools" });
    this.error = new ErrorNote({ retry: this.actions.retry, stop: this.actions.stop });
    this.note = h("p", { class: "note" });
    this.stats = h("span", { class: "stats" });
    this.copy = copyButton("Copy answer", () => this.message.content);
    this.again = iconButton("retry", "Regenerate", () => this.actions.regenerate());
    this.change = iconButton("edit", "Edit answer", () => this.edit());
    this.resume = iconButton("play", "Continue", () => this.actions.resume());
    const buttons = [this.copy, this.again, this.resume, this.change, this.versions.element];
    this.foot = h("div", { class: "foot" }, ...buttons, this.stats);
    const name = h("h2", { class: "speaker" }, this.message.model);
    this.#buildReasoning();
    this.element.append(
      name,
      this.reasoning,
      this.bodyElement,
      this.tools,
      this.waiting,
      this.error.element,
      this.note,
      this.foot,
    );
  }

  #buildReasoning() {
    const text = h("div", { class: "markdown" });
    this.reasoningText = new MarkdownView(text);
    this.reasoningLabel = h("span", {});
    this.reasoning = h(
      "details",
      { class: "reasoning", on: { toggle: () => this.update() } },
      h("summary", {}, this.reasoningLabel),
      text,
    );
  }

  #updateReasoning(isRunning) {
    const { reasoning, reasoningSeconds } = this.message;
    this.reasoning.hidden = !reasoning;
    if (!reasoning) return;
    const isThinking = isRunning && reasoningSeconds === null;
    this.reasoning.classList.toggle("is-thinking", isThinking);
    const label = isThinking ? "Thinking" : `Thought for ${seconds(reasoningSeconds ?? 0)}`;
    if (this.reasoningLabel.textContent !== label) this.reasoningLabel.textContent = label;
    // Collapsed text is not rendered.
    if (this.reasoning.open) this.reasoningText.update(reasoning, { isComplete: !isThinking });
  }

  #updateToolCalls() {
    const calls = this.message.toolCalls.filter(Boolean);
    this.tools.hidden = !calls.length;
    if (!calls.length) return;
    this.tools.replaceChildren(
      ...calls.map((call) =>
        h(
          "div",
          { class: "tool-call" },
          h("p", {}, icon("tool"), "Calls ", h("code", {}, call.name)),
          h("pre", { tabIndex: 0, role: "group", "aria-label": `Arguments of ${call.name}` }, call.arguments),
        ),
      ),
    );
  }
}

/** Whether the model may continue the text: it was stopped, cut off or edited. */
function canResume({ status, content, finishReason, isEdited }) {
  if (!content || status === "running") return false;
  return status !== "done" || finishReason === "length" || isEdited === true;
}

function noteOf({ status, finishReason, isEdited }) {
  if (status === "stopped") return "Stopped.";
  if (isEdited) return "Edited.";
  if (status !== "done") return "";
  if (finishReason === "length") return "Stopped at the token limit.";
  return finishReason && !["stop", "tool_calls"].includes(finishReason) ? `Ended: ${finishReason}.` : "";
}

function statsOf(usage) {
  if (!usage) return "";
  const parts = [`${usage.isEstimate ? "at least " : ""}${plural(usage.completionTokens, "token")}`];
  if (usage.tokensPerSecond) parts.push(rate(usage.tokensPerSecond));
  if (usage.promptTokens !== null) {
    let prompt = `prompt ${count(usage.promptTokens)}`;
    if (usage.cachedTokens) prompt += `, ${count(usage.cachedTokens)} from cache`;
    if (usage.prefillSeconds !== null) prompt += ` in ${seconds(usage.prefillSeconds)}`;
    parts.push(prompt);
  }
  return parts.join(" · ");
}
