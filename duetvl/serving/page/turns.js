// How the turns of a chat look.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";

/**
 * The view of one turn: {turn, element, update(turn)}. `actions`: {edit, remove, retry, pick}, each called with the
 * turn, and open(address, name) for a picture; `addresses(id)` promises the blob: address of a picture, null if it is lost.
 */
export function turnView(turn, actions, addresses) {
  return turn.role === "user" ? new UserTurn(turn, actions, addresses) : new ModelTurn(turn, actions);
}

class UserTurn {
  constructor(turn, actions, addresses) {
    this.turn = turn;
    const media = turn.media.length ? el("div", { class: "media" }) : null;
    for (const medium of turn.media) media.append(mediumView(medium, addresses, actions.open));
    this.element = el("article", { class: "turn user", "aria-label": "You" },
      media,
      turn.text ? el("div", { class: "bubble", dir: "auto" }, turn.text) : null,
      el("div", { class: "actions" },
        iconButton("pencil", "Edit and send again", () => actions.edit(this.turn)),
        turn.text ? copyButton(() => turn.text, "Copy message") : null,
        iconButton("trash", "Delete message and answer", () => actions.remove(this.turn))));
  }

  /** What the user said does not change: an edited message is another turn. */
  update(turn) {
    this.turn = turn;
  }
}

/** A picture or video of a turn. Its bytes come from the store, so it appears a moment later. */
function mediumView(medium, addresses, open) {
  const { kind, name, width, height } = medium;
  if (kind === "video") {
    const video = el("video", { class: "medium", controls: true, preload: "metadata", "aria-label": name });
    addresses(medium.id).then((address) => (address ? (video.src = address) : video.replaceWith(lost(name))));
    return video;
  }
  const image = el("img", { alt: name, width, height, decoding: "async" });
  const label = `Show ${name} large`;
  const button = el("button", { type: "button", class: "medium", title: name, "aria-label": label }, image);
  addresses(medium.id).then((address) => {
    if (!address) return button.replaceWith(lost(name));
    image.src = address;
    button.addEventListener("click", () => open(address, name));
    return null;
  });
  return button;
}

function lost(name) {
  return el("span", { class: "lost" }, icon("alert"), `${name} is gone from this browser`);
}

class ModelTurn {
  constructor(turn, actions) {
    Object.assign(this, { turn, actions });
    this.answer = el("div", { class: "answer" });
    this.below = el("div", { class: "below" });
    this.element = el("article", { class: "turn model" }, this.answer, this.below);
    this.version = null;
    this.state = null;
    this.update(turn);
  }

  /** Show what is new in the turn. */
  update(turn) {
    this.turn = turn;
    const { versions, shown } = turn;
    const version = versions[shown];
    const answering = version.state === "answering";
    if (version !== this.version) {
      this.version = version;
      this.state = null;
      this.answer.replaceChildren();
      this.markdown = new GrowingMarkdown(this.answer);
      this.element.setAttribute("aria-label", `Answer of ${version.model}`);
    }
    this.markdown.show(version.text, answering);
    this.element.classList.toggle("answering", answering);
    this.element.classList.toggle("waiting", answering && !version.text);
    this.element.setAttribute("aria-busy", String(answering));
    if (this.state !== version.state || !answering) this.showBelow(version);
    this.state = version.state;
  }

  showBelow(version) {
    this.below.replaceChildren();
    if (version.state === "answering") return;
    const { turn, actions } = this;
    const retry = () => actions.retry(turn);
    if (version.error) {
      this.below.append(el("div", { class: "problem", role: "alert" }, icon("alert"), el("span", {}, version.error),
        el("button", { type: "button", class: "text-button only-last", onclick: retry }, "Try again")));
    }
    this.below.append(el("div", { class: "actions" },
      version.text ? copyButton(() => version.text, "Copy answer") : null,
      iconButton("redo", "Answer again", retry, { class: "icon-button only-last" }),
      turn.versions.length > 1 ? this.picker() : null,
      iconButton("trash", "Delete answer", () => actions.remove(turn)),
      statistics(version)));
  }

  /** Which of several answers is shown, and goes into what is asked next. */
  picker() {
    const { versions, shown } = this.turn;
    const pick = (nth) => this.actions.pick(this.turn, nth);
    return el("span", { class: "picker", role: "group", "aria-label": "Versions of this answer" },
      iconButton("left", "Earlier version", () => pick(shown - 1), { disabled: shown === 0 }),
      el("span", {}, `${shown + 1} / ${versions.length}`),
      iconButton("right", "Later version", () => pick(shown + 1), { disabled: shown === versions.length - 1 }));
  }
}

function statistics({ state, cut, usage, first, seconds, model }) {
  const parts = [model];
  if (state === "stopped") parts.push("stopped");
  if (cut) parts.push("cut at its token limit");
  if (usage) parts.push(`${usage.read} tokens in, ${usage.written} out`);
  // The first token's time is the prompt's; the rest tells how fast tokens are made, if there is enough of it.
  const rest = seconds - first;
  if (usage?.written > 1 && rest > 0.1) parts.push(`${rounded((usage.written - 1) / rest)} tokens/s`);
  if (first !== null) parts.push(`first after ${first.toFixed(2)} s`);
  return el("span", { class: "statistics" }, parts.join(" · "));
}

function rounded(rate) {
  return rate < 10 ? rate.toFixed(1) : Math.round(rate);
}
