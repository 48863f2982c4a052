// The field in which a message is written. Owns its text, drafts and the send and stop buttons.

import { icon } from "./dom.js";
import { grow, isSendKey } from "./keys.js";

const DRAFT = "lowlat-draft";

export class Composer {
  #field = document.getElementById("prompt");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #isBusy = false;

  /** `onSend(text)` returns whether it was taken; then the field is emptied. */
  constructor({ onSend, onStop }) {
    this.onSend = onSend;
    this.#send.append(icon("send"));
    this.#stop.append(icon("stop"));
    this.#stop.addEventListener("click", () => {
      onStop();
      this.focus();
    });
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.#field.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      this.submit();
    });
    this.#field.addEventListener("input", () => this.#changed());
    // Neither a reload nor typing before this script ran loses anything.
    this.set(this.#field.value || (sessionStorage.getItem(DRAFT) ?? ""));
  }

  set(text) {
    this.#field.value = text;
    this.#changed();
  }

  focus() {
    this.#field.focus();
  }

  /** While an answer is under way the button stops it; text may still be written. */
  setBusy(isBusy) {
    this.#isBusy = isBusy;
    const hadFocus = [this.#send, this.#stop].includes(document.activeElement);
    this.#send.hidden = isBusy;
    this.#stop.hidden = !isBusy;
    if (hadFocus) this.focus();
  }

  setPlaceholder(text) {
    this.#field.placeholder = text;
  }

  /** Sends the text, if it can be sent. */
  submit() {
    if (!this.#isBusy && this.onSend(this.#field.value)) this.set("");
  }

  #changed() {
    grow(this.#field);
    sessionStorage.setItem(DRAFT, this.#field.value);
  }
}
