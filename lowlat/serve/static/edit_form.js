// The form for editing a message. What is typed survives a look at another conversation and a reload.

import { h } from "./dom.js";
import { newId } from "./ids.js";
import { grow, isSendKey } from "./keys.js";

const DRAFT = "lowlat-edit-";

/** The text of an unfinished edit of a message, or null. */
export const draftOf = (id) => sessionStorage.getItem(DRAFT + id);

/** A form with the text of a message; exactly one of `onSave(text)` and `onCancel()` is called. */
export function editForm({ id, role, content }, { onSave, onCancel }) {
  const isUser = role === "user";
  const hint = `hint-${newId()}`;
  const label = isUser ? "Edit message" : "Edit answer";
  const value = draftOf(id) ?? content;
  const field = h("textarea", { value, rows: 2, "aria-label": label, "aria-describedby": hint });
  const save = h("button", { type: "submit", class: "primary" }, isUser ? "Save and send" : "Save");
  const form = h(
    "form",
    { class: "edit-form", on: { submit: submit, keydown: keydown } },
    field,
    h(
      "div",
      { class: "edit-buttons" },
      h("span", { class: "field-hint", id: hint }, "Becomes a new version; the old one stays."),
      h("button", { type: "button", class: "text-button bordered", on: { click: cancel } }, "Cancel"),
      save,
    ),
  );

  function submit(event) {
    event.preventDefault();
    if (!field.value.trim()) return;
    sessionStorage.removeItem(DRAFT + id);
    onSave(field.value);
  }

  function cancel() {
    sessionStorage.removeItem(DRAFT + id);
    onCancel();
  }

  function keydown(event) {
    if (event.key === "Escape") {
      event.stopPropagation(); // Esc ends the editing and not an answer
      cancel();
    } else if (isUser && event.target === field && isSendKey(event)) {
      submit(event);
    }
  }

  field.addEventListener("input", () => {
    sessionStorage.setItem(DRAFT + id, field.value);
    grow(field);
  });
  requestAnimationFrame(() => grow(field));
  return form;
}
