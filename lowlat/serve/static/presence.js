// Presence of answers in other tabs: asks the tabs of this browser which of them is generating an answer. Without Web
// Locks, which plain http does not have.

const WAIT_MS = 1500;

export class Presence {
  #channel = new BroadcastChannel("lowlat-answers");

  /** `isHere(id)`: whether this tab generates the message; `onStop(id)`: another tab wants it stopped. */
  constructor({ isHere, onStop }) {
    this.#channel.addEventListener("message", ({ data: { type, id } }) => {
      if (type === "ask" && isHere(id)) this.#channel.postMessage({ type: "alive", id });
      if (type === "stop") onStop(id);
    });
  }

  /** Whether another tab generates the message. */
  isAlive(id) {
    return new Promise((resolve) => {
      const finish = (isAlive) => {
        clearTimeout(timer);
        this.#channel.removeEventListener("message", listen);
        resolve(isAlive);
      };
      const listen = ({ data }) => data.type === "alive" && data.id === id && finish(true);
      const timer = setTimeout(() => finish(false), WAIT_MS);
      this.#channel.addEventListener("message", listen);
      this.#channel.postMessage({ type: "ask", id });
    });
  }

  stop(id) {
    this.#channel.postMessage({ type: "stop", id });
  }
}
