// Dialogs: help, rename, confirm deletion.

/** Opens the dialog `id`; resolves to true when it was confirmed. */
function ask(id) {
  const dialog = document.getElementById(id);
  const cancel = dialog.querySelector("[data-cancel]");
  dialog.returnValue = "";
  return new Promise((resolve) => {
    cancel?.addEventListener("click", () => dialog.close(""), { once: true });
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
    dialog.showModal();
  });
}

export const showHelp = () => ask("help");

/** The new title, or null. */
export async function askTitle(title) {
  const field = document.getElementById("rename-field");
  field.value = title;
  const answer = ask("rename");
  field.select();
  return (await answer) && field.value.trim() ? field.value.trim() : null;
}

export function askDelete(title) {
  document.getElementById("delete-name").textContent = `“${title || "Untitled"}” is removed from this browser.`;
  return ask("confirm-delete");
}
