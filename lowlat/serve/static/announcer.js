// What a screen reader hears without being asked: that an answer began, its text when it is
// finished, never each token.

const MAX_LENGTH = 2000;

export function announce(text) {
  const region = document.getElementById("announcer");
  // The same text twice is news too: an emptied region makes it a change.
  region.textContent = "";
  setTimeout(() => {
    region.textContent = text.length > MAX_LENGTH ? `${text.slice(0, MAX_LENGTH)} … The rest is on the page.` : text;
  }, 50);
}

/** The sentence for an answer that is over. */
export function describeEnd({ status, content, toolCalls }) {
  if (status === "stopped") return "Stopped.";
  if (status === "error") return ""; // the alert in its place says it
  const calls = toolCalls.filter(Boolean).map((call) => call.name);
  if (!content && calls.length) return `The model calls ${calls.join(", ")}.`;
  return content ? `Answer: ${content}` : "The answer is empty.";
}
