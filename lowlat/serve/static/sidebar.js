// Sidebar: the list of conversations with search; opens and closes on narrow screens.

import { arrange, h, icon, iconButton } from "./dom.js";
import { search } from "./search.js";

export class Sidebar {
  #list = document.getElementById("conversations");
  #panel = document.getElementById("sidebar");
  #toggle = document.getElementById("toggle-sidebar");
  #narrow = matchMedia("(max-width: 56rem)");
  /** Entries by conversation; they are reused, or a click during an update would be lost. */
  #entries = new Map();

  #search = document.getElementById("search");
  #found = document.getElementById("search-found");
  #shown = { conversations: [], currentId: null, isRunning: () => false };

  /** `actions`: onNew(), rename(conversation), remove(conversation). */
  constructor({ onNew, rename, remove }) {
    this.actions = { rename, remove };
    this.#search.addEventListener("input", () => this.#draw());
    const begin = document.getElementById("new");
    begin.prepend(icon("plus"));
    begin.addEventListener("click", () => {
      this.close();
      onNew();
    });
    this.#toggle.append(icon("menu"));
    this.#toggle.addEventListener("click", () => this.#setOpen(!this.#isOpen));
    this.#list.addEventListener("click", (event) => event.target.closest("a") && this.close());
    document.getElementById("app").addEventListener("click", (event) => {
      if (event.target.id === "app") this.close(); // the shade next to an open panel
    });
    this.#panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isOpen || !this.#narrow.matches) return;
      event.stopPropagation();
      this.close();
      this.#toggle.focus();
    });
    this.#narrow.addEventListener("change", () => this.#setOpen(false));
    this.#setOpen(false);
  }

  get #isOpen() {
    return document.getElementById("app").classList.contains("sidebar-open");
  }

  close() {
    if (this.#isOpen) this.#setOpen(false);
  }

  /** `isRunning(id)` marks conversations with a running response. */
  show(conversations, currentId, isRunning) {
    this.#shown = { conversations, currentId, isRunning };
    this.#search.closest(".search").hidden = conversations.length === 0;
    this.#draw();
  }

  #draw() {
    const { conversations, currentId, isRunning } = this.#shown;
    const focused = document.activeElement?.closest?.("#conversations a")?.hash;
    const query = this.#search.value.trim();
    const found = query ? search(conversations, query) : conversations.map((conversation) => ({ conversation }));
    this.#found.textContent = query ? `${found.length} found` : "";
    this.ids = found.map(({ conversation: { id } }) => id);
    const entries = this.ids.map((id) => [id, this.#entries.get(id) ?? new Entry(id, this.actions)]);
    this.#entries = new Map(entries);
    for (const { conversation, excerpt = "" } of found) {
      const { id } = conversation;
      const state = { excerpt, isCurrent: id === currentId, isRunning: isRunning(id) };
      this.#entries.get(id).update(conversation, state);
    }
    arrange(this.#list, entries.map(([, entry]) => entry.element));
    if (focused) this.#list.querySelector(`a[href="${focused}"]`)?.focus();
  }

  /** The conversation `step` entries below `id`, or undefined. */
  neighbour(id, step) {
    const at = this.ids.indexOf(id);
    return this.ids[at < 0 ? 0 : at + step];
  }

  #setOpen(isOpen) {
    document.getElementById("app").classList.toggle("sidebar-open", isOpen);
    this.#toggle.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) document.getElementById("new").focus();
  }
}

/** The list entry of one conversation. */
class Entry {
  constructor(id, { rename, remove }) {
    this.title = h("span", { class: "entry-title" });
    this.excerpt = h("span", { class: "excerpt" });
    this.running = h("span", { class: "running", role: "img", "aria-label": "answering" });
    this.link = h("a", { href: `#${id}` }, h("span", { class: "entry-text" }, this.title, this.excerpt));
    this.rename = iconButton("edit", "Rename", () => rename(this.conversation));
    this.remove = iconButton("trash", "Delete", () => remove(this.conversation));
    this.element = h("li", {}, this.link, this.rename, this.remove);
  }

  update(conversation, { excerpt, isCurrent, isRunning }) {
    this.conversation = conversation;
    const text = conversation.title || "Untitled";
    if (this.title.textContent !== text) this.title.textContent = text;
    this.excerpt.textContent = excerpt;
    this.excerpt.hidden = !excerpt;
    this.rename.setAttribute("aria-label", `Rename ${text}`);
    this.remove.setAttribute("aria-label", `Delete ${text}`);
    if (isCurrent) this.link.setAttribute("aria-current", "page");
    else this.link.removeAttribute("aria-current");
    if (isRunning) this.link.append(this.running);
    else this.running.remove();
  }
}
