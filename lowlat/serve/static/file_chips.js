// Attached text files as shown: chips in the composer, folded notes in a sent message.

import { h, icon, iconButton } from "./dom.js";
import { bytes } from "./format.js";

const sizeOf = ({ text }) => bytes(new Blob([text]).size);

/** A file of a sent message: its name, and its text on demand. */
export function fileNote(file) {
  const text = h("pre", { tabIndex: 0, role: "group", "aria-label": `Text of ${file.name}` });
  const note = h(
    "details",
    { class: "file-note", on: { toggle: () => (text.textContent = note.open ? file.text : "") } },
    h("summary", {}, icon("file"), `${file.name} · ${sizeOf(file)}`),
    text,
  );
  return note;
}

/** A file that will be sent; `onRemove()` takes it out. */
export function fileChip(file, onRemove) {
  const name = h("span", { class: "chip-name" }, `${file.name} · ${sizeOf(file)}`);
  return h("li", { class: "chip" }, icon("file"), name, iconButton("close", `Remove ${file.name}`, onRemove));
}
