// The list of talks: find, open, rename, delete.

import { el, iconButton } from "./dom.js";

export class Sidebar {
  /** `actions`: {rename(talk, title), remove(talk)}; `running(talk)` says whether an answer is being made. */
  constructor({ talks, actions, running }) {
    Object.assign(this, { talks, actions, running });
    this.list = document.getElementById("talks");
    this.search = document.getElementById("search");
    this.search.addEventListener("input", () => this.show(this.current));
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.list.querySelector("a")?.click();
    });
  }

  /** Draw the list anew; `current` is the id of the open talk. */
  show(current) {
    this.current = current;
    const talks = this.talks.list(this.search.value);
    if (this.list.querySelector("input")) return; // a title is being typed
    this.list.replaceChildren(...talks.map((talk) => this.entry(talk)));
    document.getElementById("no-talks").hidden = talks.length > 0 || !this.search.value;
  }

  entry(talk) {
    const open = talk.id === this.current;
    const link = el("a", { href: `#${talk.id}`, dir: "auto", title: talk.title, "aria-current": open ? "page" : null },
      talk.title);
    const item = el("li", { class: this.running(talk) ? "running" : null }, link,
      iconButton("pencil", `Rename ${talk.title}`, () => this.rename(talk, item)),
      iconButton("trash", `Delete ${talk.title}`, () => this.actions.remove(talk)));
    return item;
  }

  rename(talk, item) {
    const input = el("input", { type: "text", "aria-label": "Title", maxlength: "120", dir: "auto" });
    input.value = talk.title;
    const end = (title) => {
      if (!input.isConnected) return;
      input.remove();
      if (title) this.actions.rename(talk, title);
      this.show(this.current);
    };
    input.addEventListener("blur", () => end(input.value.trim()));
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(input.value.trim());
      if (event.key === "Escape") {
        event.stopPropagation();
        end(null);
      }
    });
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}
