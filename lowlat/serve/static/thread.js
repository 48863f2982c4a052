// The list of messages of the open conversation, and its scrolling: it follows a response only while
// the reader is at the bottom.

import { arrange, h, icon } from "./dom.js";
import { MessageView } from "./message_view.js";

const NEAR = 48; // pixels from the bottom that still count as at it

export class Thread {
  #scroller;
  #list;
  #jump;
  #views = [];
  #isPinned = true;

  /** `actions`: what a message's buttons do; see MessageView. */
  constructor(actions) {
    this.actions = actions;
    this.#scroller = document.getElementById("thread");
    this.#list = document.getElementById("messages");
    this.#jump = document.getElementById("jump");
    this.#jump.addEventListener("click", () => {
      this.#scroller.focus(); // the button goes away
      this.follow();
    });
    this.#scroller.addEventListener("scroll", () => this.#notice(), { passive: true });
    // Images aside, height also changes with the window and the composer.
    new ResizeObserver(() => this.#stay()).observe(this.#scroller);
  }

  /**
   * Shows `messages`; `versionsOf(message)` are all versions of one; `empty` is an element for a conversation that has
   * no messages. Scrolls to the end of another conversation and to a new answer.
   */
  show(messages, { system = "", versionsOf, empty }) {
    // Views of remaining messages are reused, with their expanded parts and selection.
    const kept = new Map(this.#views.map((view) => [view.message.id, view]));
    const [first, last] = [this.#views[0]?.message.id, this.#views.at(-1)?.message.id];
    this.#views = messages.map((message) => kept.get(message.id) ?? new MessageView(message, this.actions));
    messages.forEach((message, index) => {
      const isLast = index === messages.length - 1;
      this.#views[index].show(message, { versions: versionsOf(message), isLast });
    });
    const head = system.trim() ? [systemNote(system)] : [];
    const body = this.#views.length ? this.#views.map((view) => view.element) : [empty];
    arrange(this.#list, [...head, ...body]);
    const end = messages.at(-1);
    if (end && (messages[0].id !== first || (end.id !== last && end.status === "running"))) this.follow();
    else this.#stay();
  }

  /** Renders changes of `message`. */
  refresh(message) {
    this.#views.find((view) => view.message.id === message.id)?.update();
    this.#stay();
  }

  /** Edits the last user message; false if there is none. */
  editLast() {
    const view = this.#views.findLast((candidate) => candidate.message.role === "user");
    view?.edit();
    return view !== undefined;
  }

  /** Scrolls to the bottom and follows new text. */
  follow() {
    this.#isPinned = true;
    this.#stay();
    this.#jump.hidden = true;
  }

  #stay() {
    if (!this.#views.length) return;
    if (this.#isPinned) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    else this.#notice();
  }

  #notice() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#isPinned = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#jump.hidden = this.#isPinned;
  }
}

function systemNote(system) {
  return h(
    "details",
    { class: "system-note" },
    h("summary", {}, icon("sliders"), "System prompt"),
    h("p", {}, system),
  );
}
