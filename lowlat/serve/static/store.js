// Storage: conversations in IndexedDB, settings in localStorage. Nothing leaves the browser except
// in requests.

const DATABASE = "lowlat";
const TABLE = "conversations";
const SETTINGS = "lowlat-settings";

/** Random id; crypto.randomUUID would need https. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation without messages. */
export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, messages: [] };
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
    return [...all.values()].sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    if (this.#memory.has(id)) return this.#memory.get(id);
    return this.#database ? this.#request("readonly", (table) => table.get(id)) : undefined;
  }

  /** Saves a copy of `conversation`. */
  async put(conversation) {
    const copy = structuredClone(conversation);
    if (this.#database) {
      try {
        await this.#request("readwrite", (table) => table.put(copy));
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
      // Without commit, a page that is closed now loses the change.
      transaction.commit?.();
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }
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
  max_tokens: null,
  seed: null,
});

/** The stored settings over DEFAULTS, with `system`, the default system prompt; invalid values are dropped. */
export function loadSettings() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") ?? {};
  } catch {
    // No storage, or invalid data: use the defaults.
  }
  const settings = { ...DEFAULTS, system: typeof stored.system === "string" ? stored.system : "" };
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
