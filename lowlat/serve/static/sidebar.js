// Sidebar: the list of conversations; opens and closes on narrow screens.

import { arrange, h, icon } from "./dom.js";

export class Sidebar {
  #list = document.getElementById("conversations");
  #panel = document.getElementById("sidebar");
  #toggle = document.getElementById("toggle-sidebar");
  #narrow = matchMedia("(max-width: 56rem)");
  /** Entries by conversation; they are reused, or a click during an update would be lost. */
  #entries = new Map();

  constructor({ onNew }) {
    const begin = document.getElementById("new");
    begin.prepend(icon("plus"));
    begin.addEventListener("click", () => {
      this.close();
      onNew();
    });
    this.#toggle.append(icon("menu"));
    this.#toggle.addEventListener("click", () => this.#setOpen(!this.#isOpen));
    this.#list.addEventListener("click", () => this.close());
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
    const focused = document.activeElement?.closest?.("#conversations a")?.hash;
    this.ids = conversations.map(({ id }) => id);
    const entries = conversations.map(({ id }) => [id, this.#entries.get(id) ?? new Entry(id)]);
    this.#entries = new Map(entries);
    for (const { id, title } of conversations) {
      this.#entries.get(id).update({ title, isCurrent: id === currentId, isRunning: isRunning(id) });
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
  constructor(id) {
    this.title = h("span", {});
    this.running = h("span", { class: "running", role: "img", "aria-label": "answering" });
    this.link = h("a", { href: `#${id}` }, this.title);
    this.element = h("li", {}, this.link);
  }

  update({ title, isCurrent, isRunning }) {
    const text = title || "Untitled";
    if (this.title.textContent !== text) this.title.textContent = text;
    if (isCurrent) this.link.setAttribute("aria-current", "page");
    else this.link.removeAttribute("aria-current");
    if (isRunning) this.link.append(this.running);
    else this.running.remove();
  }
}
