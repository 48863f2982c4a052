// Session: the open conversation and the running responses. Implements send, stop, regenerate, edit
// and retry on the records, and saves them. Renders nothing.

import { buildRequest } from "./request.js";
import { newAnswer, Run } from "./run.js";
import { newConversation } from "./store.js";

const MAX_RETRIES = 5;
const SAVE_MS = 1000;
const TITLE_LENGTH = 60;

export class Session {
  /** The open conversation. */
  conversation = newConversation();
  /** Running responses and waiting retries by conversation; they continue when another is opened. */
  #live = new Map();

  /**
   * `settings()` and `model()` return the current values. `on.opened()`: another conversation or other
   * messages; `on.changed(message)`: one message grew; `on.stored()`: the list of conversations
   * changed; `on.finished(message)`: an answer is over.
   */
  constructor({ store, settings, model, on }) {
    this.store = store;
    this.settings = settings;
    this.model = model;
    this.on = on;
  }

  /** The Run of the open conversation, or null. */
  get run() {
    return this.#live.get(this.conversation.id)?.run ?? null;
  }

  /** Whether the open conversation has a running response or a waiting retry. */
  get isBusy() {
    return this.#live.has(this.conversation.id);
  }

  isRunning(id) {
    return this.#live.has(id);
  }

  /** Opens a stored conversation; false if there is none with this id. */
  async open(id) {
    const live = this.#live.get(id)?.conversation;
    const conversation = live ?? (await this.store.get(id));
    if (!conversation) return false;
    if (!live) conversation.messages.forEach(settle);
    this.conversation = conversation;
    this.on.opened();
    return true;
  }

  /** Starts a conversation; it is saved once it has a message. */
  begin() {
    this.conversation = newConversation(this.settings().system);
    this.on.opened();
  }

  /** Sends `text`; without a chat template, empty text continues the output. False if it cannot. */
  send(text) {
    const { messages } = this.conversation;
    const model = this.model();
    const isContinuing = model?.has_chat_template === false && messages.length > 0;
    if (this.isBusy || !model || !(text.trim() || isContinuing)) return false;
    if (text) messages.push({ role: "user", content: text });
    this.conversation.title ||= titleOf(text);
    this.#answer(this.conversation);
    return true;
  }

  /** Regenerates the last response. */
  regenerate() {
    const { messages } = this.conversation;
    if (this.isBusy || !this.model() || messages.at(-1)?.role !== "assistant") return;
    messages.pop();
    this.#answer(this.conversation);
  }

  /** Edits a user message: sends it again and deletes all later messages. */
  edit(message, text) {
    const { messages } = this.conversation;
    const index = messages.indexOf(message);
    if (index < 0 || !this.model()) return;
    this.stop();
    messages.splice(index, Infinity, { role: "user", content: text });
    this.#answer(this.conversation);
  }

  /** Retries at once after an error. */
  retry() {
    this.stop();
    this.regenerate();
  }

  /** Stops the response of the open conversation and keeps its text. */
  stop() {
    const live = this.#live.get(this.conversation.id);
    if (live) this.#end(live);
  }

  async rename(title) {
    this.conversation.title = title;
    await this.#save(this.conversation);
  }

  /** Sets the system prompt, and saves it if the conversation is saved. */
  async setSystem(system) {
    this.conversation.system = system;
    if (this.conversation.messages.length) await this.#save(this.conversation);
  }

  async remove() {
    const { id } = this.conversation;
    const live = this.#live.get(id);
    if (live) this.#halt(live);
    this.conversation = newConversation(this.settings().system);
    await this.store.remove(id);
    this.on.opened();
    this.on.stored();
  }

  #answer(conversation, attempt = 0) {
    const { path, body } = buildRequest(this.model(), conversation, this.settings());
    const message = newAnswer(this.model().id);
    conversation.messages.push(message);
    conversation.updated = Date.now();
    const live = { conversation, message, attempt, timer: null, savedAt: Date.now() };
    live.run = new Run(message, { path, body }, () => this.#changed(live));
    this.#live.set(conversation.id, live);
    if (conversation === this.conversation) this.on.opened();
    this.#save(conversation);
    live.run.start().then(() => this.#over(live));
  }

  #changed(live) {
    if (live.conversation === this.conversation) this.on.changed(live.message);
    // Save once per second, so that a page closed during generation loses little.
    if (Date.now() - live.savedAt < SAVE_MS || !this.#isCurrent(live)) return;
    live.savedAt = Date.now();
    this.store.put(live.conversation);
  }

  #isCurrent(live) {
    return this.#live.get(live.conversation.id) === live;
  }

  #over(live) {
    if (!this.#isCurrent(live)) return;
    const { conversation, message } = live;
    const { error } = message;
    if (error?.status === 429 && error.retryAfter !== null && live.attempt < MAX_RETRIES) {
      error.retryAt = Date.now() + 1000 * error.retryAfter;
      live.timer = setTimeout(() => this.#again(live), 1000 * error.retryAfter);
    } else {
      this.#live.delete(conversation.id);
    }
    this.#save(conversation);
    if (conversation === this.conversation) this.on.changed(message);
    this.on.finished(message);
  }

  #again({ conversation, message, attempt }) {
    this.#live.delete(conversation.id);
    if (conversation.messages.at(-1) !== message) return;
    conversation.messages.pop();
    this.#answer(conversation, attempt + 1);
  }

  #halt(live) {
    this.#live.delete(live.conversation.id);
    clearTimeout(live.timer);
    live.run.stop();
  }

  #end(live) {
    this.#halt(live);
    const { message } = live;
    if (message.error) message.error.retryAt = null;
    this.#save(live.conversation);
    this.on.changed(message);
    this.on.finished(message);
  }

  async #save(conversation) {
    await this.store.put(conversation);
    this.on.stored();
  }
}

/** Marks messages as stopped that were being generated when their page was closed. */
function settle(message) {
  if (message.status === "running") message.status = "stopped";
  if (message.error) message.error.retryAt = null;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}
