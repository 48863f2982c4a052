// Attached text files of the message being written: chosen, dropped, or pasted as long text.

import { h } from "./dom.js";
import { fileChip } from "./file_chips.js";
import { bytes } from "./format.js";

const MAX_BYTES = 1 << 20; // of all files together; the server takes bodies of 4 MiB
const MAX_FILES = 16;
/** Longer pasted text becomes a file. */
const LONG_PASTE = 4000;

export class Attachments {
  files = [];
  #list = document.getElementById("attachments");
  #problem = document.getElementById("attachment-problem");
  #input = h("input", { type: "file", multiple: true, hidden: true });

  /** `onChange()` is called after files were added or removed. */
  constructor({ onChange }) {
    this.onChange = onChange;
    this.#input.addEventListener("change", async () => {
      await this.add([...this.#input.files]);
      this.#input.value = "";
    });
    this.#list.after(this.#input);
    this.#listenForDrops(document.getElementById("app"));
  }

  /** Opens the browser's dialog. */
  choose() {
    this.#input.click();
  }

  /** Whether `event`, a paste, became files. */
  takePaste(event) {
    const { files } = event.clipboardData;
    const text = event.clipboardData.getData("text/plain");
    if (!files.length && text.length <= LONG_PASTE) return false;
    // Some programs put a picture of the text next to it.
    this.add(text ? [new File([text], `pasted-${this.files.length + 1}.txt`)] : [...files]);
    return true;
  }

  /** Adds File objects; what is no short text is refused in one line. */
  async add(files) {
    this.#problem.textContent = "";
    for (const file of files) {
      const problem = await this.#take(file);
      if (problem) this.#problem.textContent = problem;
    }
    this.#show();
  }

  clear() {
    this.files = [];
    this.#problem.textContent = "";
    this.#show();
  }

  async #take(file) {
    if (this.files.length >= MAX_FILES) return `${file.name} is not attached: a message has at most ${MAX_FILES} files.`;
    const used = this.files.reduce((sum, { text }) => sum + new Blob([text]).size, 0);
    if (used + file.size > MAX_BYTES) {
      return `${file.name} is not attached: the files of a message have at most ${bytes(MAX_BYTES)}.`;
    }
    const text = await readText(file);
    if (text === null) return `${file.name} is not attached: it is not a text file in UTF-8.`;
    // Another file may have been read meanwhile.
    this.files.push({ name: file.name.slice(0, 200), text });
    return "";
  }

  #show() {
    const chips = this.files.map((file) =>
      fileChip(file, () => {
        this.files = this.files.filter((other) => other !== file);
        this.#show();
        document.getElementById("prompt").focus();
      }),
    );
    this.#list.replaceChildren(...chips);
    this.#list.hidden = !chips.length;
    this.onChange();
  }

  #listenForDrops(target) {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    target.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      target.classList.add("is-dropping");
    });
    target.addEventListener("dragleave", (event) => {
      if (!target.contains(event.relatedTarget)) target.classList.remove("is-dropping");
    });
    target.addEventListener("drop", (event) => {
      target.classList.remove("is-dropping");
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }
}

async function readText(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text.replaceAll(/\r\n?/g, "\n");
  } catch {
    return null; // not UTF-8, or a folder
  }
}
