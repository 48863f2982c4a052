// The form for editing a sent message.

import { h } from "./dom.js";
import { grow, isSendKey } from "./keys.js";
import { newId } from "./store.js";

/** A form with `text`; exactly one of `onSave(text)` and `onCancel()` is called. */
export function editForm(text, { onSave, onCancel }) {
  const hint = `hint-${newId()}`;
  const field = h("textarea", { value: text, rows: 2, "aria-label": "Edit message", "aria-describedby": hint });
  const save = h("button", { type: "submit", class: "primary" }, "Save and send");
  const form = h(
    "form",
    { class: "edit-form", on: { submit: submit, keydown: keydown } },
    field,
    h(
      "div",
      { class: "edit-buttons" },
      h("span", { class: "field-hint", id: hint }, "All later messages are replaced."),
      h("button", { type: "button", class: "text-button bordered", on: { click: onCancel } }, "Cancel"),
      save,
    ),
  );

  function submit(event) {
    event.preventDefault();
    if (field.value.trim()) onSave(field.value);
  }

  function keydown(event) {
    if (event.key === "Escape") {
      event.stopPropagation(); // Esc ends the editing and not an answer
      onCancel();
    } else if (event.target === field && isSendKey(event)) {
      submit(event);
    }
  }

  field.addEventListener("input", () => grow(field));
  requestAnimationFrame(() => grow(field));
  return form;
}
