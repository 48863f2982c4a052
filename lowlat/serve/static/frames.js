// Drawing at the screen's pace. Tokens may come by the hundred a second; what they change is drawn
// once per frame, and less often where drawing itself takes long.

export class Frames {
  #draw;
  #isAsked = false;
  #notBefore = 0;

  constructor(draw) {
    this.#draw = draw;
  }

  /** Draw soon; many calls make one drawing. */
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
    // At most a third of the time goes into drawing; the rest is for typing and scrolling.
    this.#notBefore = end + 2 * (end - start);
  }
}
