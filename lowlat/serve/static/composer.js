// The message input: text, attached files, drafts, send and stop buttons.

import { Attachments } from "./attachments.js";
import { icon } from "./dom.js";
import { grow, isSendKey } from "./keys.js";

const DRAFT = "lowlat-draft";

export class Composer {
  #field = document.getElementById("prompt");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #isBusy = false;
  #attachments = new Attachments({ onChange: () => this.focus() });

  /** `onSend(text, files)` returns whether it accepted them; the field is then emptied. */
  constructor({ onSend, onStop }) {
    this.onSend = onSend;
    this.#send.append(icon("send"));
    this.#stop.append(icon("stop"));
    const attach = document.getElementById("attach");
    attach.append(icon("attach"));
    attach.addEventListener("click", () => this.#attachments.choose());
    this.#field.addEventListener("paste", (event) => {
      if (this.#attachments.takePaste(event)) event.preventDefault();
    });
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
    // Keep text from before a reload, and text typed before this script ran.
    this.set(this.#field.value || (sessionStorage.getItem(DRAFT) ?? ""));
  }

  set(text) {
    this.#field.value = text;
    this.#changed();
  }

  focus() {
    this.#field.focus();
  }

  /** During generation the button stops it; typing remains possible. */
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
    if (this.#isBusy || !this.onSend(this.#field.value, this.#attachments.files)) return;
    this.#attachments.clear();
    this.set("");
  }

  #changed() {
    grow(this.#field);
    sessionStorage.setItem(DRAFT, this.#field.value);
  }
}
