// Storage: conversations in IndexedDB, settings in localStorage. Nothing leaves the browser except
// in requests.

import { newId } from "./ids.js";
import { merge, upgrade } from "./tree.js";

const DATABASE = "lowlat";
const TABLE = "conversations";
const SETTINGS = "lowlat-settings";

/** A conversation without messages. */
export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", isNamed: false, system, created: now, updated: now, messages: [], head: null };
}

/** The conversation store. Tabs notify each other of changes through `onChange`. */
export class ConversationStore {
  #database = null;
  #memory = new Map();
  #channel = new BroadcastChannel("lowlat-conversations");
  /** Why conversations are not saved beyond this page, or "". */
  problem = "";

  /** Opens the database; without one, conversations last as long as the page, and `problem` is set. */
  async open(onChange) {
    this.#channel.addEventListener("message", ({ data }) => onChange(data.id));
    try {
      this.#database = await openDatabase();
    } catch (error) {
      this.#fail(error);
    }
  }

  /** All conversations, the last changed first. */
  async list() {
    const stored = this.#database ? await this.#request("readonly", (table) => table.getAll()) : [];
    const all = new Map(stored.map((conversation) => [conversation.id, conversation]));
    for (const [id, conversation] of this.#memory) all.set(id, conversation);
    return [...all.values()].map(upgrade).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    if (this.#memory.has(id)) return this.#memory.get(id);
    const stored = this.#database ? await this.#request("readonly", (table) => table.get(id)) : undefined;
    return stored && upgrade(stored);
  }

  /** Saves a copy of `conversation`, and keeps messages that another tab added; see merge for `liveId`. */
  async put(conversation, liveId = null) {
    const copy = structuredClone(conversation);
    if (this.#database) {
      try {
        await this.#request("readwrite", (table) => putMerged(table, copy, liveId));
        this.#memory.delete(copy.id);
        this.#channel.postMessage({ id: copy.id });
        return;
      } catch (error) {
        this.#fail(error);
      }
    }
    this.#memory.set(copy.id, copy);
  }

  async remove(id) {
    this.#memory.delete(id);
    if (this.#database) await this.#request("readwrite", (table) => table.delete(id));
    this.#channel.postMessage({ id });
  }

  #fail(error) {
    const reason = error?.name === "QuotaExceededError" ? "its storage is full" : "it has no storage for this page";
    this.problem = `Conversations are not saved: the browser reports ${reason}.`;
  }

  #request(mode, action) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(TABLE, mode);
      const request = action(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }
}

function putMerged(table, conversation, liveId) {
  const reading = table.get(conversation.id);
  reading.onsuccess = () => {
    const stored = reading.result;
    table.put(stored ? merge(conversation, upgrade(stored), liveId) : conversation);
    // Without commit, a page that is closed now loses the change.
    table.transaction.commit?.();
  };
  return reading;
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

/** Default sampling settings; null means the server's default. */
export const DEFAULTS = Object.freeze({
  temperature: 0.6,
  top_p: 0.95,
  top_k: 0,
  min_p: 0,
  presence_penalty: 0,
  frequency_penalty: 0,
  repetition_penalty: 1,
  max_tokens: null,
  seed: null,
});

/** Default settings that are text: stop strings, one a line; a JSON schema; "on", "off" or "" for thinking. */
export const TEXT_DEFAULTS = Object.freeze({ system: "", stop: "", schema: "", thinking: "", model: "" });

/** The stored settings over the defaults; invalid values are dropped. `model` is the id of the chosen one. */
export function loadSettings() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") ?? {};
  } catch {
    // No storage, or invalid data: use the defaults.
  }
  const settings = { ...DEFAULTS, ...TEXT_DEFAULTS };
  for (const name of Object.keys(TEXT_DEFAULTS)) {
    if (typeof stored[name] === "string") settings[name] = stored[name];
  }
  for (const name of Object.keys(DEFAULTS)) {
    if (Number.isFinite(stored[name])) settings[name] = stored[name];
  }
  return settings;
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // The settings then last as long as the page.
  }
}
