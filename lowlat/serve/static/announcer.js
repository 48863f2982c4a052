// Live region for screen readers: announces that a response began, and its text once it is finished.

const MAX_LENGTH = 2000;

export function announce(text) {
  const region = document.getElementById("announcer");
  // Emptying the region first makes repeated text a change.
  region.textContent = "";
  setTimeout(() => {
    region.textContent = text.length > MAX_LENGTH ? `${text.slice(0, MAX_LENGTH)} … The rest is on the page.` : text;
  }, 50);
}

/** The announcement for a finished response. */
export function describeEnd({ status, content, toolCalls }) {
  if (status === "stopped") return "Stopped.";
  if (status === "error") return ""; // the alert announces the error
  const calls = toolCalls.filter(Boolean).map((call) => call.name);
  if (!content && calls.length) return `The model calls ${calls.join(", ")}.`;
  return content ? `Answer: ${content}` : "The answer is empty.";
}
