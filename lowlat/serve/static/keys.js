// Keyboard handling: send key, shortcuts, text fields that grow with their text.

/** Enter without Shift, and not the Enter that ends the composition of a character. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Sets the height to that of the text; style sheets set the maximum. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Calls the action of `shortcuts` ("Alt+KeyN") for a keydown, and prevents the browser's own. */
export function listenForShortcuts(shortcuts) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open], :popover-open")) return;
    const names = [event.ctrlKey || event.metaKey ? "Ctrl" : "", event.altKey ? "Alt" : "", event.code];
    const action = shortcuts[names.filter(Boolean).join("+")];
    if (!action || event.shiftKey) return;
    event.preventDefault();
    action(event);
  });
}
