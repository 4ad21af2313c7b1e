// The list of chats: find, open, rename, delete.

import { el, iconButton } from "./dom.js";

export class Sidebar {
  /** `actions`: {rename(chat, title), remove(chat)}; `running(chat)` says whether an answer is being made. */
  constructor({ chats, actions, running }) {
    Object.assign(this, { chats, actions, running });
    this.list = document.getElementById("chats");
    this.search = document.getElementById("search");
    this.search.addEventListener("input", () => this.show(this.current));
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.list.querySelector("a")?.click();
    });
  }

  /** Draw the list anew; `current` is the id of the open chat. */
  show(current) {
    this.current = current;
    const chats = this.chats.list(this.search.value);
    if (this.list.querySelector("input")) return; // a title is being typed
    this.list.replaceChildren(...chats.map((chat) => this.entry(chat)));
    document.getElementById("no-chats").hidden = chats.length > 0 || !this.search.value;
  }

  entry(chat) {
    const open = chat.id === this.current;
    const link = el("a", { href: `#${chat.id}`, dir: "auto", title: chat.title, "aria-current": open ? "page" : null },
      chat.title);
    const item = el("li", { class: this.running(chat) ? "running" : null }, link,
      iconButton("pencil", `Rename ${chat.title}`, () => this.rename(chat, item)),
      iconButton("trash", `Delete ${chat.title}`, () => this.actions.remove(chat)));
    return item;
  }

  rename(chat, item) {
    const input = el("input", { type: "text", "aria-label": "Title", maxlength: "120", dir: "auto" });
    input.value = chat.title;
    let ended = false; // the field loses its focus when it goes, which would end it again
    const end = (title) => {
      if (ended) return;
      ended = true;
      input.remove();
      if (title) this.actions.rename(chat, title);
      else this.show(this.current);
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
