// The chat page: creates the components and connects them.

import { announce, describeEnd } from "./announcer.js";
import { fetchModels } from "./api.js";
import { Composer } from "./composer.js";
import { askDelete, askTitle, showHelp } from "./dialogs.js";
import { copyText, h, icon } from "./dom.js";
import { exportConversation } from "./export.js";
import { Frames } from "./frames.js";
import { listenForShortcuts } from "./keys.js";
import { Meter } from "./meter.js";
import { Session } from "./session.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore } from "./store.js";
import { Thread } from "./thread.js";
import { welcome } from "./welcome.js";

const NO_TEMPLATE = "This model has no chat template: it does not answer, it continues the text you begin.";

class App {
  models = [];
  model = null;
  changed = new Set();
  /** Whether a message was sent before the model was loaded; it is sent once it is. */
  isSendWanted = false;

  constructor() {
    this.store = new ConversationStore();
    this.settings = new SettingsPanel({
      onSystem: (text) => this.session.setSystem(text),
      onModel: (id) => this.chooseModel(id),
    });
    this.session = new Session({
      store: this.store,
      settings: () => this.settings.values,
      model: () => this.model,
      on: {
        opened: () => this.showConversation(),
        changed: (message) => this.redraw(message),
        stored: () => this.showList(),
        finished: (message) => this.finished(message),
      },
    });
    this.thread = new Thread({
      regenerate: () => this.session.regenerate(),
      edit: (message, text) => this.session.edit(message, text),
      retry: () => this.retry(),
      stop: () => this.session.stop(),
    });
    this.composer = new Composer({ onSend: (text) => this.send(text), onStop: () => this.session.stop() });
    this.sidebar = new Sidebar({ onNew: () => this.begin() });
    this.meter = new Meter();
    this.frames = new Frames(() => this.draw());
    this.connectButtons();
    this.connectKeys();
    // The clock must advance while no token arrives.
    setInterval(() => this.session.isBusy && this.frames.request(), 250);
  }

  async start() {
    await this.store.open((id) => this.changedElsewhere(id));
    addEventListener("hashchange", () => this.route());
    await this.route();
    this.showList();
    this.composer.focus();
    await this.loadModels();
  }

  async loadModels() {
    try {
      this.models = await fetchModels();
      this.model = this.models[0] ?? null;
      this.notify(this.model?.has_chat_template === false ? NO_TEMPLATE : "");
    } catch (error) {
      this.isSendWanted = false;
      const props = { type: "button", class: "text-button bordered", on: { click: () => this.loadModels() } };
      const isLocked = error.status === 401;
      this.notify(error.message, isLocked ? h("a", { href: "./" }, "Log in") : h("button", props, "Try again"));
    }
    this.showModel();
    if (this.isSendWanted) this.composer.submit();
  }

  chooseModel(id) {
    this.model = this.models.find((model) => model.id === id);
    this.notify(this.model.has_chat_template === false ? NO_TEMPLATE : "");
    this.showModel();
  }

  showModel() {
    this.settings.showModels(this.models, this.model);
    const isChat = this.model?.has_chat_template !== false;
    this.composer.setPlaceholder(isChat ? "Write a message" : "Write the beginning of a text");
    this.showConversation();
  }

  notify(text, action = null) {
    const notice = document.getElementById("notice");
    notice.hidden = !text;
    notice.replaceChildren(text, ...(action ? [" ", action] : []));
  }

  /** Opens the conversation in the URL, or starts a new one. */
  async route() {
    const id = location.hash.slice(1);
    if (id && id === this.session.conversation.id) return;
    if (id && (await this.session.open(id))) return;
    if (location.hash) history.replaceState(null, "", location.pathname);
    this.session.begin();
  }

  begin() {
    history.pushState(null, "", location.pathname);
    this.session.begin();
    this.composer.focus();
  }

  send(text) {
    this.isSendWanted = !this.model;
    const isSent = this.session.send(text);
    if (isSent) {
      this.thread.follow();
      announce("Sent. The model is answering.");
    }
    return isSent;
  }

  /** Retries; after a restart the server may have another model. */
  async retry() {
    const status = this.session.conversation.messages.at(-1)?.error?.status;
    if (status === 0 || status === 404) await this.loadModels();
    this.session.retry();
  }

  showConversation() {
    const { conversation } = this.session;
    const hadFocus = document.activeElement !== document.body;
    if (conversation.messages.length && location.hash.slice(1) !== conversation.id) {
      history.replaceState(null, "", `#${conversation.id}`);
    }
    this.thread.show(conversation.messages, {
      system: conversation.system,
      empty: welcome(this.model, (idea) => {
        this.composer.set(idea);
        this.composer.focus();
      }),
    });
    this.settings.showSystem(conversation.system);
    this.showTitle();
    this.showList();
    this.draw();
    // The pressed button may have been removed with its message.
    if (hadFocus && document.activeElement === document.body) this.composer.focus();
  }

  showTitle() {
    const { title, messages } = this.session.conversation;
    document.getElementById("title").textContent = title || "New conversation";
    document.title = title ? `${title} - lowlat` : "lowlat";
    document.getElementById("open-menu").hidden = messages.length === 0;
  }

  async showList() {
    const conversations = await this.store.list();
    this.sidebar.show(conversations, this.session.conversation.id, (id) => this.session.isRunning(id));
    const note = document.getElementById("storage-note");
    note.textContent = this.store.problem;
    note.hidden = !this.store.problem;
    this.showTitle();
  }

  redraw(message) {
    this.changed.add(message);
    this.frames.request();
  }

  draw() {
    for (const message of this.changed) this.thread.refresh(message);
    this.changed.clear();
    const { run, isBusy, conversation } = this.session;
    const isGenerating = run?.message.status === "running";
    this.meter.update(conversation, isGenerating ? run : null, this.model);
    this.composer.setBusy(isBusy);
  }

  finished(message) {
    announce(describeEnd(message));
    this.showList();
  }

  async changedElsewhere(id) {
    this.showList();
    const isEditing = document.querySelector(".edit-form") !== null;
    if (id !== this.session.conversation.id || this.session.isBusy || isEditing) return;
    if (!(await this.session.open(id))) this.session.begin();
  }

  connectButtons() {
    document.getElementById("open-menu").append(icon("more"));
    document.getElementById("open-help").prepend(icon("help"));
    document.getElementById("open-help").addEventListener("click", () => showHelp());
    document.getElementById("skip").addEventListener("click", (event) => {
      event.preventDefault();
      this.composer.focus();
    });
    document.getElementById("menu").addEventListener("click", (event) => this.menuAction(event.target.dataset.action));
    document.getElementById("logout").hidden = !document.cookie.includes("lowlat_login=1");
    const theme = document.getElementById("theme");
    const show = (choice) => theme.replaceChildren(icon(choice), `Theme: ${choice === "auto" ? "system" : choice}`);
    theme.addEventListener("click", () => show(window.lowlatTheme.next()));
    show(window.lowlatTheme.choice);
  }

  async menuAction(action) {
    if (!action) return;
    document.getElementById("menu").hidePopover();
    const { conversation } = this.session;
    if (action === "rename") {
      const title = await askTitle(conversation.title);
      if (title !== null) await this.session.rename(title);
    } else if (action === "delete") {
      if (await askDelete(conversation.title)) await this.session.remove();
    } else {
      exportConversation(conversation, action);
    }
  }

  connectKeys() {
    const go = (step) => {
      const id = this.sidebar.neighbour(this.session.conversation.id, step);
      if (id) location.hash = id;
    };
    listenForShortcuts({
      Escape: () => (this.session.isBusy ? this.session.stop() : this.composer.focus()),
      "Alt+KeyN": () => this.begin(),
      "Alt+KeyR": () => this.session.regenerate(),
      "Alt+KeyU": () => this.thread.editLast(),
      "Alt+KeyC": () => this.copyLast(),
      "Alt+KeyS": () => this.settings.toggle(),
      "Alt+ArrowUp": () => go(-1),
      "Alt+ArrowDown": () => go(1),
      "Ctrl+Slash": () => showHelp(),
    });
  }

  async copyLast() {
    const answer = this.session.conversation.messages.findLast(({ role }) => role === "assistant");
    if (answer?.content) announce((await copyText(answer.content)) ? "Copied." : "Copying was refused.");
  }
}

new App().start();
