// HTTP client of the server's API: requests, responses, error messages. The browser adds the login
// cookie by itself.

import { readEvents } from "./sse.js";

/** A failed request; `message` is the server's message if it sent one. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    /** HTTP status; 0 if there was no response, or if it broke off. */
    this.status = status;
    /** Retry-After in seconds, or null. */
    this.retryAfter = retryAfter;
  }

  /** Whether a retry may succeed. */
  get isTemporary() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/** The entries of GET /v1/models. */
export async function fetchModels() {
  const response = await send("v1/models", { method: "GET" });
  return (await response.json()).data;
}

/** The chunks of a streamed POST to `path` ("v1/chat/completions" or "v1/completions"). */
export async function* streamChunks(path, body, signal) {
  const response = await send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      yield parseChunk(data);
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
  throw new ApiError("The server ended the answer before it was complete.");
}

function parseChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is not JSON.");
  }
  if (chunk.error) throw new ApiError(String(chunk.error.message));
  return chunk;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const text = await response.text().catch(() => "");
  let message = `The server answered with status ${status}.`;
  try {
    message = String(JSON.parse(text).error.message);
  } catch {
    // Not this server's JSON, perhaps a proxy's page: report the status.
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ApiError(message, { status, retryAfter: Number.isFinite(seconds) ? seconds : null });
}
