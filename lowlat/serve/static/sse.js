// Server-sent events parser for a fetch body: lines, data, comments, partial chunks.

/**
 * The data of each event of a response body, as strings.
 *
 * A character or line may be cut anywhere between two chunks. Comments (keep-alives) are dropped.
 * What follows the last blank line is no event and is dropped too, as the standard requires.
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const lines = new LineBuffer();
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      for (const line of lines.push(value)) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    // Leaving the loop early must abort the request, so that the server stops generating.
    reader.cancel().catch(() => {});
  }
}

/** Cuts text into lines that end with LF, CRLF or CR; the unfinished last one is held back. */
export class LineBuffer {
  #rest = "";

  push(text) {
    const parts = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = parts.pop();
    return parts;
  }
}
