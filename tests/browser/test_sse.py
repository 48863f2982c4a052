"""The SSE parser of the page, for every chunking."""

from tests.browser.conftest import Open

READ = """
async ([text, size]) => {
  const { readEvents } = await import("/static/sse.js");
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) {
        controller.enqueue(bytes.slice(at, at + size));
      }
      controller.close();
    },
  });
  const events = [];
  for await (const event of readEvents(body)) events.push(event);
  return events;
}
"""

STREAM = (
    ": keep-alive\n\n"
    'data: {"a": "é漢😀"}\n\n'
    "event: x\r\ndata:two\r\ndata: lines\r\n\r\n"
    "id: 7\nretry: 10\ndata: \n\n"
    "\n\ndata: [DONE]\n\ndata: never finished"
)
EVENTS = ['{"a": "é漢😀"}', "two\nlines", "", "[DONE]"]


def test_any_cut(open_page: Open) -> None:
    """Chunks of any size give the same events: characters and line ends may be cut in two."""
    page = open_page()
    for size in (1, 2, 3, 5, 7, 1000):
        assert page.evaluate(READ, [STREAM, size]) == EVENTS, size


def test_leaving_early_ends_the_request(open_page: Open) -> None:
    """A reader that stops reading cancels the body, which closes the connection."""
    page = open_page()
    cancelled = page.evaluate(
        """async () => {
          const { readEvents } = await import("/static/sse.js");
          let cancel;
          const isCancelled = new Promise((resolve) => (cancel = resolve));
          const body = new ReadableStream({
            start(controller) {
              controller.enqueue(new TextEncoder().encode("data: 1\\n\\ndata: 2\\n\\n"));
            },
            cancel() {
              cancel(true);
            },
          });
          for await (const event of readEvents(body)) break;
          const isLate = new Promise((resolve) => setTimeout(() => resolve(false), 60_000));
          return Promise.race([isCancelled, isLate]);
        }"""
    )
    assert cancelled


def test_one_drawing_a_frame(open_page: Open) -> None:
    """A thousand changes between two frames are drawn once."""
    page = open_page()
    drawings = page.evaluate(
        """async () => {
          const { Frames } = await import("/static/frames.js");
          let drawings = 0;
          const frames = new Frames(() => (drawings += 1));
          for (let change = 0; change < 1000; change += 1) frames.request();
          for (let frame = 0; frame < 5; frame += 1) await new Promise(requestAnimationFrame);
          return drawings;
        }"""
    )
    assert drawings == 1


def test_what_comes_after_a_stop_is_not_taken(open_page: Open) -> None:
    """Regression: a stopped answer that grows, by a piece that was on its way."""
    page = open_page()
    said = page.evaluate(
        """async () => {
          const { newAnswer, Run } = await import("/static/run.js");
          const piece = (content) => {
            const chunk = { choices: [{ index: 0, delta: { content }, finish_reason: null }] };
            return new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`);
          };
          let stream, begin;
          const body = new ReadableStream({ start: (controller) => (stream = controller) });
          window.fetch = async () => new Response(body);
          const hasBegun = new Promise((resolve) => (begin = resolve));
          const message = newAnswer("m");
          const run = new Run(message, { path: "x", body: {} }, () => message.content && begin());
          const over = run.start();
          stream.enqueue(piece("before"));
          await hasBegun;
          run.stop();
          stream.enqueue(piece("after"));
          stream.close();
          await over;
          return [message.content, message.status];
        }"""
    )
    assert said == ["before", "stopped"]
