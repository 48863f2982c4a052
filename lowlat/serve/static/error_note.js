// The error of a response, with its remedy: retry, wait for Retry-After, or log in.

import { h } from "./dom.js";

export class ErrorNote {
  #timer = null;

  /** `retry()` sends the request again; `stop()` cancels a waiting retry. */
  constructor({ retry, stop }) {
    this.message = h("p", { role: "alert" });
    // Outside the alert, or a screen reader would read the countdown every second.
    this.countdown = h("span", { class: "countdown" });
    this.again = h("button", { type: "button", class: "text-button bordered", on: { click: retry } }, "Try again");
    this.cancel = h("button", { type: "button", class: "text-button", on: { click: stop } }, "Do not wait");
    this.login = h("a", { href: "./" }, "Log in");
    this.actions = h("div", { class: "error-actions" }, this.again, this.login, this.cancel, this.countdown);
    this.element = h("div", { class: "error-note", hidden: true }, this.message, this.actions);
  }

  /** `error`: {message, status, retryAt} or null; only the last response can be retried. */
  update(error, isLast) {
    clearInterval(this.#timer);
    this.element.hidden = error === null;
    if (error === null) return;
    if (this.message.textContent !== error.message) this.message.textContent = error.message;
    this.again.hidden = !isLast;
    this.login.hidden = error.status !== 401;
    this.cancel.hidden = !error.retryAt;
    this.countdown.hidden = !error.retryAt;
    this.actions.hidden = !isLast && error.status !== 401;
    if (!error.retryAt) return;
    const show = () => {
      const left = Math.max(0, Math.ceil((error.retryAt - Date.now()) / 1000));
      this.countdown.textContent = `Trying again in ${left} s`;
    };
    this.#timer = setInterval(() => (this.element.isConnected ? show() : clearInterval(this.#timer)), 250);
    show();
  }
}
