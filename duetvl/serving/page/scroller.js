// The end of a chat stays in view while it grows, unless the reader has gone up.

const NEAR = 48; // pixels from the end that still count as being there

export class Scroller {
  constructor(area, button) {
    this.area = area;
    this.button = button;
    this.following = true;
    area.addEventListener("scroll", () => this.moved(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    // Pictures that get their size, or a keyboard that opens on a phone, change what is in view as well.
    const observer = new ResizeObserver(() => {
      this.follow();
      this.moved(); // what shrinks may bring the end into view without a scroll
    });
    observer.observe(area);
    observer.observe(area.querySelector("#turns"));
  }

  moved() {
    const { scrollHeight, scrollTop, clientHeight } = this.area;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.button.hidden = this.following;
  }

  /** Show the end if the reader was there. */
  follow() {
    if (this.following) this.area.scrollTop = this.area.scrollHeight;
  }

  toEnd() {
    this.following = true;
    this.button.hidden = true;
    this.follow();
  }
}
