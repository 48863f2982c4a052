// Session: the open conversation and the running responses. Implements send, stop, regenerate, edit, continue and
// retry on the conversation tree, and saves it. Renders nothing.

import { Presence } from "./presence.js";
import { buildRequest } from "./request.js";
import { newAnswer, Run } from "./run.js";
import { newConversation } from "./store.js";
import { retitle } from "./titles.js";
import { append, merge, parentOf, pathOf, select, versionsOf } from "./tree.js";

const MAX_RETRIES = 5;
const SAVE_MS = 1000;
const CHECK_MS = 4000;

export class Session {
  /** The open conversation. */
  conversation = newConversation();
  /** Running responses and waiting retries by conversation; they continue when another is opened. */
  #live = new Map();
  #presence = new Presence({
    isHere: (id) => this.#liveOf(id) !== undefined,
    onStop: (id) => this.#liveOf(id) && this.#end(this.#liveOf(id)),
  });

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
    setInterval(() => this.#elsewhere && this.#checkElsewhere(), CHECK_MS);
  }

  /** The shown messages. */
  get messages() {
    return pathOf(this.conversation);
  }

  /** The Run of the open conversation, or null. */
  get run() {
    return this.#live.get(this.conversation.id)?.run ?? null;
  }

  /** Whether the open conversation has a response that is running, also in another tab, or waits for a retry. */
  get isBusy() {
    return this.#live.has(this.conversation.id) || this.#elsewhere !== undefined;
  }

  isRunning(id) {
    return this.#live.has(id);
  }

  /** Opens a stored conversation; false if there is none with this id. */
  async open(id) {
    const conversation = this.#live.get(id)?.conversation ?? (await this.store.get(id));
    if (!conversation) return false;
    if (!this.#live.has(id)) for (const { error } of conversation.messages) if (error) error.retryAt = null;
    this.conversation = conversation;
    this.on.opened();
    if (this.#elsewhere) await this.#checkElsewhere();
    return true;
  }

  /** Starts a conversation; it is saved once it has a message. */
  begin() {
    this.conversation = newConversation(this.settings().system);
    this.on.opened();
  }

  /** Takes over what another tab changed in a stored conversation. */
  async adopt(id) {
    const live = this.#live.get(id);
    if (!live) {
      if (id === this.conversation.id && !(await this.open(id))) this.begin();
      return;
    }
    const stored = await this.store.get(id);
    if (!stored || !this.#isCurrent(live)) return;
    const { title, isNamed, system } = stored;
    const { messages } = merge(live.conversation, stored, live.message.id);
    Object.assign(live.conversation, { title, isNamed, system, messages });
    if (live.conversation === this.conversation) this.on.opened();
  }

  /** Sends `text` and `files`; without a chat template, nothing continues the output. False if it cannot. */
  send(text, files = []) {
    const model = this.model();
    const isContinuing = model?.has_chat_template === false && this.messages.length > 0;
    if (this.isBusy || !model || !(text.trim() || files.length || isContinuing)) return false;
    if (text || files.length) append(this.conversation, { role: "user", content: text, files });
    retitle(this.conversation);
    this.#answer(this.conversation);
    return true;
  }

  /** Adds another version of the last answer. */
  regenerate() {
    const last = this.messages.at(-1);
    if (this.isBusy || !this.model() || last?.role !== "assistant") return;
    this.#answerAgain(this.conversation, last);
  }

  /** Adds another version of a user message, and answers it. */
  edit(message, text) {
    if (!this.model()) return;
    this.stop();
    const { files } = message;
    append(this.conversation, { role: "user", content: text, files }, parentOf(this.conversation, message));
    retitle(this.conversation);
    this.#answer(this.conversation);
  }

  /** Adds another version of an answer with the user's text. */
  async editAnswer(message, text) {
    this.stop();
    const edited = { ...newAnswer(message.model), content: text, status: "done", isEdited: true };
    append(this.conversation, edited, parentOf(this.conversation, message));
    await this.#save(this.conversation);
    this.on.opened();
  }

  /** Lets the model continue the text of the last answer. */
  resume() {
    const last = this.messages.at(-1);
    if (this.isBusy || !this.model() || last?.role !== "assistant" || !last.content) return;
    this.#answer(this.conversation, { resumed: last });
  }

  /** Shows the version of `message` that is `step` after it, and what came after that. */
  async showVersion(message, step) {
    const versions = versionsOf(this.conversation, message);
    const version = versions[versions.indexOf(message) + step];
    if (!version || this.isBusy) return;
    select(this.conversation, version);
    retitle(this.conversation);
    await this.#save(this.conversation);
    this.on.opened();
  }

  /** Retries at once after an error. */
  retry() {
    this.stop();
    this.regenerate();
  }

  /** Stops the response of the open conversation, wherever it runs, and keeps its text. */
  stop() {
    const live = this.#live.get(this.conversation.id);
    if (live) this.#end(live);
    else if (this.#elsewhere) this.#presence.stop(this.#elsewhere.id);
  }

  async rename(id, title) {
    await this.#change(id, (conversation) => Object.assign(conversation, { title, isNamed: true }));
  }

  /** Sets the system prompt, and saves it if the conversation is saved. */
  async setSystem(system) {
    this.conversation.system = system;
    if (this.conversation.messages.length) await this.#save(this.conversation);
  }

  async remove(id) {
    const live = this.#live.get(id);
    if (live) this.#halt(live);
    await this.store.remove(id);
    if (id === this.conversation.id) this.begin();
    this.on.stored();
  }

  /** The answer of the open conversation that runs in another tab, or is said to. */
  get #elsewhere() {
    if (this.#live.has(this.conversation.id)) return undefined;
    return this.conversation.messages.find(({ status }) => status === "running");
  }

  /** Marks answers as stopped whose page was closed while they were generated. */
  async #checkElsewhere() {
    const { conversation } = this;
    const message = this.#elsewhere;
    if (await this.#presence.isAlive(message.id)) return;
    if (conversation !== this.conversation || this.#liveOf(message.id)) return;
    if (message.status === "running") message.status = "stopped";
    this.on.opened();
  }

  #liveOf(messageId) {
    return [...this.#live.values()].find(({ message }) => message.id === messageId);
  }

  async #change(id, action) {
    const isOpen = id === this.conversation.id;
    const conversation = this.#live.get(id)?.conversation ?? (isOpen ? this.conversation : await this.store.get(id));
    if (!conversation) return;
    action(conversation);
    await this.#save(conversation);
  }

  /** Another version of `message`; one without text is replaced. */
  #answerAgain(conversation, message, attempt = 0) {
    const isEmpty = !message.content && !message.reasoning && !message.toolCalls.length;
    conversation.head = message.parent;
    this.#answer(conversation, { replaced: isEmpty ? message : null, attempt });
  }

  #answer(conversation, { resumed = null, replaced = null, attempt = 0 } = {}) {
    const request = buildRequest(this.model(), { ...conversation, messages: pathOf(conversation) }, this.settings(), {
      isResumed: resumed !== null,
    });
    const message = resumed ?? this.#place(conversation, replaced);
    conversation.updated = Date.now();
    const live = { conversation, message, isResumed: resumed !== null, attempt, timer: null, savedAt: Date.now() };
    live.run = new Run(message, request, () => this.#changed(live));
    this.#live.set(conversation.id, live);
    if (conversation === this.conversation) this.on.opened();
    this.#save(conversation);
    live.run.start().then(() => this.#over(live));
  }

  #place(conversation, replaced) {
    const fresh = newAnswer(this.model().id);
    if (!replaced) return append(conversation, fresh);
    conversation.head = replaced.id;
    return Object.assign(replaced, fresh);
  }

  #changed(live) {
    if (live.conversation === this.conversation) this.on.changed(live.message);
    // Save once per second, so that a page closed during generation loses little.
    if (Date.now() - live.savedAt < SAVE_MS || !this.#isCurrent(live)) return;
    live.savedAt = Date.now();
    this.store.put(live.conversation, live.message.id);
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

  #again({ conversation, message, isResumed, attempt }) {
    this.#live.delete(conversation.id);
    if (conversation.head !== message.id) return;
    if (isResumed) this.#answer(conversation, { resumed: message, attempt: attempt + 1 });
    else this.#answerAgain(conversation, message, attempt + 1);
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
    await this.store.put(conversation, this.#live.get(conversation.id)?.message.id);
    this.on.stored();
  }
}
