// The chat page: creates the components and connects them.

import { announce, describeEnd } from "./announcer.js";
import { fetchModels } from "./api.js";
import { Composer } from "./composer.js";
import { askDelete, askTitle, showHelp } from "./dialogs.js";
import { copyText, h, icon } from "./dom.js";
import { exportAll, exportConversation } from "./export.js";
import { Frames } from "./frames.js";
import { importFiles } from "./import_files.js";
import { listenForShortcuts } from "./keys.js";
import { Meter } from "./meter.js";
import { Session } from "./session.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore } from "./store.js";
import { Thread } from "./thread.js";
import { versionsOf } from "./tree.js";
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
      resume: () => this.session.resume(),
      edit: (message, text) => this.session.edit(message, text),
      editAnswer: (message, text) => this.session.editAnswer(message, text),
      showVersion: (message, step) => this.session.showVersion(message, step),
      retry: () => this.retry(),
      stop: () => this.session.stop(),
    });
    this.composer = new Composer({ onSend: (text, files) => this.send(text, files), onStop: () => this.session.stop() });
    this.sidebar = new Sidebar({
      onNew: () => this.begin(),
      rename: (conversation) => this.rename(conversation),
      remove: (conversation) => this.remove(conversation),
    });
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
      this.pickModel();
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

  /** The model of the open conversation's last answer, the chosen one, or the server's first. */
  pickModel() {
    const last = this.session.messages.findLast(({ role }) => role === "assistant")?.model;
    const find = (id) => this.models.find((model) => model.id === id);
    this.model = find(last) ?? find(this.settings.values.model) ?? this.models[0] ?? null;
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
    if (!id || !(await this.session.open(id))) {
      if (location.hash) history.replaceState(null, "", location.pathname);
      this.session.begin();
    }
    const before = this.model;
    this.pickModel();
    if (before !== this.model) this.showModel();
  }

  begin() {
    history.pushState(null, "", location.pathname);
    this.session.begin();
    this.composer.focus();
  }

  send(text, files = []) {
    this.isSendWanted = !this.model;
    const isSent = this.session.send(text, files);
    if (isSent) {
      this.thread.follow();
      announce("Sent. The model is answering.");
    }
    return isSent;
  }

  /** Retries; after a restart the server may have another model. */
  async retry() {
    const status = this.session.messages.at(-1)?.error?.status;
    if (status === 0 || status === 404) await this.loadModels();
    this.session.retry();
  }

  showConversation() {
    const { conversation, messages } = this.session;
    const hadFocus = document.activeElement !== document.body;
    if (messages.length && location.hash.slice(1) !== conversation.id) {
      history.replaceState(null, "", `#${conversation.id}`);
    }
    this.thread.show(messages, {
      system: conversation.system,
      versionsOf: (message) => versionsOf(conversation, message),
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
    const { run, isBusy, messages } = this.session;
    const isGenerating = run?.message.status === "running";
    this.meter.update(messages, isGenerating ? run : null, this.model);
    this.composer.setBusy(isBusy);
  }

  finished(message) {
    announce(describeEnd(message));
    this.showList();
  }

  changedElsewhere(id) {
    this.showList();
    this.session.adopt(id);
  }

  connectButtons() {
    document.getElementById("open-menu").append(icon("more"));
    document.getElementById("open-help").prepend(icon("help"));
    document.getElementById("open-help").addEventListener("click", () => showHelp());
    document.getElementById("import").prepend(icon("import"));
    document.getElementById("import").addEventListener("click", () => this.import());
    document.getElementById("export").prepend(icon("export"));
    document.getElementById("export").addEventListener("click", async () => exportAll(await this.store.list()));
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
    if (action === "rename") await this.rename(conversation);
    else if (action === "delete") await this.remove(conversation);
    else exportConversation(conversation, action);
  }

  async rename({ id, title }) {
    const name = await askTitle(title);
    if (name !== null) await this.session.rename(id, name);
  }

  async remove({ id, title }) {
    if (!(await askDelete(title))) return;
    await this.session.remove(id);
    if (document.activeElement === document.body) this.composer.focus();
  }

  async import() {
    const { text, ids } = await importFiles(this.store);
    this.notify(text);
    setTimeout(() => document.getElementById("notice").textContent === text && this.notify(""), 10_000);
    for (const id of ids) await this.session.adopt(id);
    this.showList();
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
    const answer = this.session.messages.findLast(({ role }) => role === "assistant");
    if (answer?.content) announce((await copyText(answer.content)) ? "Copied." : "Copying was refused.");
  }
}

new App().start();
