// Import of chosen files into the store. What is there already stays as it is; only what it lacks is added.

import { h } from "./dom.js";
import { plural } from "./format.js";
import { readConversations } from "./import.js";
import { merge } from "./tree.js";

/** Lets the user choose files and adds them; returns {text, ids}: a line that reports it, and the changed ids. */
export async function importFiles(store) {
  const ids = [];
  const problems = [];
  let known = 0;
  for (const file of await chooseFiles()) {
    try {
      for (const conversation of readConversations(await file.text(), file.name)) {
        if (await add(store, conversation)) ids.push(conversation.id);
        else known += 1;
      }
    } catch (error) {
      problems.push(error.message);
    }
  }
  const parts = [];
  if (ids.length || !problems.length) parts.push(`${plural(ids.length, "conversation")} imported.`);
  if (known) parts.push(`${plural(known, "conversation")} already here.`);
  return { text: [...parts, ...problems].join(" "), ids };
}

/** Whether something was added. */
async function add(store, conversation) {
  const stored = await store.get(conversation.id);
  if (!stored) {
    await store.put(conversation);
    return true;
  }
  const merged = merge(stored, conversation, null);
  if (merged.messages.length === stored.messages.length) return false;
  await store.put(merged);
  return true;
}

function chooseFiles() {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", multiple: true, accept: ".json,application/json", hidden: true });
    const finish = () => {
      input.remove();
      resolve([...input.files]);
    };
    input.addEventListener("change", finish);
    input.addEventListener("cancel", finish);
    document.body.append(input);
    input.click();
  });
}
