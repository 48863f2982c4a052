// Render throttling: at most one render per animation frame, fewer if rendering takes long.

export class Frames {
  #draw;
  #isAsked = false;
  #notBefore = 0;

  constructor(draw) {
    this.#draw = draw;
  }

  /** Schedules a render; several calls are merged into one. */
  request() {
    if (this.#isAsked) return;
    this.#isAsked = true;
    const wait = this.#notBefore - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(() => this.#run()), wait);
    else requestAnimationFrame(() => this.#run());
  }

  #run() {
    this.#isAsked = false;
    const start = performance.now();
    this.#draw();
    const end = performance.now();
    // Rendering takes at most a third of the time, so that typing and scrolling stay smooth.
    this.#notBefore = end + 2 * (end - start);
  }
}
