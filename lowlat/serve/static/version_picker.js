// The arrows between versions of a message: "2 / 3".

import { h, iconButton } from "./dom.js";

export class VersionPicker {
  /** `onStep(step)`: -1 for the previous version, 1 for the next. */
  constructor(onStep) {
    this.previous = iconButton("left", "Previous version", () => onStep(-1));
    this.next = iconButton("right", "Next version", () => onStep(1));
    this.label = h("span", { class: "version" });
    const props = { class: "versions", role: "group", "aria-label": "Versions", hidden: true };
    this.element = h("span", props, this.previous, this.label, this.next);
  }

  show(index, count) {
    this.element.hidden = count < 2;
    this.label.textContent = `${index + 1} / ${count}`;
    this.previous.disabled = index === 0;
    this.next.disabled = index === count - 1;
  }
}
