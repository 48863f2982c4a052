// Run: one response being generated. Applies stream chunks to a message record; renders and stores
// nothing.

import { ApiError, streamChunks } from "./api.js";

/** An assistant message before its first token. */
export function newAnswer(model) {
  return {
    role: "assistant",
    model,
    content: "",
    reasoning: "",
    reasoningSeconds: null,
    toolCalls: [],
    /** running, done, stopped or error */
    status: "running",
    /** With status error: {message, status, retryAfter, isTemporary}. */
    error: null,
    finishReason: null,
    /** Tokens and seconds as reported by the server; null until then. */
    usage: null,
  };
}

export class Run {
  #abort = new AbortController();
  #started = performance.now();
  #reasoningStarted = null;
  #firstPiece = null;
  #pieces = 0;
  /** Usage of the part that is continued, or null. */
  #before;

  /**
   * Fills `message` (from newAnswer) in place and calls `onChange` after each change. A message that has text is
   * continued.
   */
  constructor(message, { path, body }, onChange) {
    this.#before = message.usage;
    Object.assign(message, { status: "running", error: null, finishReason: null });
    this.message = message;
    this.request = { path, body };
    this.onChange = onChange;
  }

  /** Resolves when the response has ended; message.status is then its outcome. Never rejects. */
  async start() {
    const { path, body } = this.request;
    try {
      for await (const chunk of streamChunks(path, body, this.#abort.signal)) {
        // Chunks that arrive after the stop are dropped.
        this.#abort.signal.throwIfAborted();
        this.#take(chunk);
        this.onChange();
      }
      this.#abort.signal.throwIfAborted();
      this.#end("done");
    } catch (error) {
      if (this.#abort.signal.aborted) this.#end("stopped");
      else this.#fail(error);
    }
    this.onChange();
  }

  /** Stops the response and keeps the text so far. */
  stop() {
    this.#abort.abort();
    if (this.message.status === "running") this.#end("stopped");
  }

  /** Number of text chunks so far: at least one token each. */
  get pieces() {
    return this.#pieces;
  }

  /** Seconds since the request was sent. */
  get elapsed() {
    return (performance.now() - this.#started) / 1000;
  }

  /** Chunks per second since the first, or null before the second. */
  get rate() {
    if (this.#pieces < 2) return null;
    const elapsed = performance.now() - this.#firstPiece;
    return elapsed > 0 ? (1000 * (this.#pieces - 1)) / elapsed : null;
  }

  #take(chunk) {
    if (chunk.usage) this.message.usage = addUsage(this.#before, readUsage(chunk));
    const [choice] = chunk.choices ?? [];
    if (!choice) return;
    const delta = choice.delta ?? { content: choice.text };
    if (delta.reasoning_content) this.#takeReasoning(delta.reasoning_content);
    if (delta.content) this.#takeContent(delta.content);
    for (const call of delta.tool_calls ?? []) this.#takeToolCall(call);
    if (choice.finish_reason) this.message.finishReason = choice.finish_reason;
  }

  #count() {
    this.#firstPiece ??= performance.now();
    this.#pieces += 1;
  }

  #takeReasoning(text) {
    this.#count();
    this.#reasoningStarted ??= performance.now();
    this.message.reasoning += text;
  }

  #takeContent(text) {
    this.#count();
    this.#endReasoning();
    this.message.content += text;
  }

  #takeToolCall(call) {
    this.#count();
    this.#endReasoning();
    const calls = this.message.toolCalls;
    calls[call.index] ??= { name: "", arguments: "" };
    calls[call.index].name += call.function?.name ?? "";
    calls[call.index].arguments += call.function?.arguments ?? "";
  }

  #endReasoning() {
    if (this.#reasoningStarted === null || this.message.reasoningSeconds !== null) return;
    this.message.reasoningSeconds = (performance.now() - this.#reasoningStarted) / 1000;
  }

  #end(status) {
    this.#endReasoning();
    this.message.status = status;
    // A stopped answer has no report of the server: its text chunks are at least one token each.
    if (status !== "done" && this.#pieces > 0 && this.message.usage === this.#before) {
      this.message.usage = addUsage(this.#before, {
        ...{ promptTokens: null, completionTokens: this.#pieces, cachedTokens: 0, prefillSeconds: null },
        ...{ tokensPerSecond: this.rate, contextTokens: null, isEstimate: true },
      });
    }
  }

  #fail(error) {
    // Anything but an ApiError is a bug of this page: show it and log it to the console.
    if (!(error instanceof ApiError)) console.error(error);
    this.#end("error");
    this.message.error = {
      message: error.message,
      status: error.status ?? null,
      retryAfter: error.retryAfter ?? null,
      isTemporary: error.isTemporary ?? false,
    };
  }
}

function readUsage({ usage, lowlat }) {
  return {
    promptTokens: usage.prompt_tokens,
    completionTokens: usage.completion_tokens,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
    prefillSeconds: lowlat?.prefill_seconds ?? null,
    tokensPerSecond: lowlat?.tokens_per_second ?? null,
    contextTokens: usage.prompt_tokens + usage.completion_tokens,
    isEstimate: false,
  };
}

/** Usage of an answer that was continued: the tokens of both parts; prompt and speed are those of the last. */
function addUsage(before, usage) {
  if (before === null) return usage;
  const completionTokens = before.completionTokens + usage.completionTokens;
  return { ...usage, completionTokens, isEstimate: usage.isEstimate || before.isEstimate };
}
