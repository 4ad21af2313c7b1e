// The page: one chat is open; what the user does to it is here.

import { Answers, endInterrupted } from "./answers.js";
import { modelNames } from "./api.js";
import { Composer } from "./composer.js";
import { announce, el, newId, toast } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { Scroller } from "./scroller.js";
import { closeOutside, Key, lastSettings, remember, remembered, Sheet } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Chats } from "./chats.js";
import { turnView } from "./turns.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor(chats) {
    this.chats = chats;
    this.key = new Key();
    this.scroller = new Scroller(byId("scroller"), byId("to-end"));
    this.views = new Map(); // id of a turn of the open chat -> its view
    this.addresses = new Map(); // id of a picture -> its blob: address
    const onchange = (chat, turn) => this.changed(chat, turn);
    this.answers = new Answers({ chats, key: () => this.key.value, onchange });
    this.sidebar = new Sidebar({ chats, running: (chat) => this.answers.has(chat), actions: {
      rename: (chat, title) => this.rename(chat, title), remove: (chat) => this.removeChat(chat) } });
    this.sheet = new Sheet({ changed: (settings) => this.setSettings(settings) });
    this.composer = new Composer({ send: (message) => this.send(message), stop: () => this.answers.stop(this.chat),
      editLast: () => this.editLast() });
    this.drawing = false;
    this.listen();
  }

  listen() {
    addEventListener("hashchange", () => this.openAddressed());
    byId("model").addEventListener("change", (event) => remember("model", event.target.value));
    byId("theme").addEventListener("click", () => dispatchEvent(new Event("switch-theme")));
    byId("open-sheet").addEventListener("click", () => this.sheet.open());
    byId("new-chat").addEventListener("click", () => this.newChat());
    byId("new-chat-narrow").addEventListener("click", () => this.newChat());
    byId("show-keys").addEventListener("click", () => byId("keys-dialog").showModal());
    byId("open-sidebar").addEventListener("click", () => this.showSidebar(true));
    for (const id of ["close-sidebar", "scrim"]) byId(id).addEventListener("click", () => this.showSidebar(false));
    byId("chats").addEventListener("click", ({ target }) => {
      if (target.closest("a")) this.showSidebar(false); // also where the chat is the open one
    });
    for (const button of document.querySelectorAll("[data-close]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
    for (const button of document.querySelectorAll("#welcome button")) {
      button.addEventListener("click", () => this.composer.suggest(button.textContent));
    }
    byId("notice").querySelector("button").addEventListener("click", () => this.connect());
    byId("viewer").addEventListener("click", () => byId("viewer").close());
    closeOutside(byId("keys-dialog"));
    listenToKeys(this);
    this.chats.busy = (id) => this.answers.running.has(id);
    this.chats.onchange = (id) => this.changedElsewhere(id);
    this.chats.onfull = () => toast("The browser's store is full: what is new here is not kept. Delete old chats.");
  }

  // -- the server ----------------------------------------------------------------------------------------------------

  /** Ask which models there are; ask for a key where the server wants one. */
  async connect() {
    byId("notice").hidden = true;
    try {
      this.showModels(await modelNames(this.key.value));
    } catch (error) {
      if (error.status === 401 && (await this.key.ask(error.message))) return this.connect();
      this.notice(error.message);
    }
    return null;
  }

  showModels(names) {
    const last = remembered("model");
    byId("model").replaceChildren(...names.map((name) => el("option", { value: name, selected: name === last }, name)));
  }

  notice(text) {
    byId("notice").querySelector("span").textContent = text;
    byId("notice").hidden = false;
  }

  // -- which chat is open --------------------------------------------------------------------------------------------

  /** Open the chat that the address names, or a new one. */
  openAddressed() {
    this.show(this.chats.all.get(location.hash.slice(1)) ?? this.chats.fresh(lastSettings()));
  }

  newChat() {
    history.pushState(null, "", "#");
    this.show(this.chats.fresh(lastSettings()));
    this.composer.focus();
  }

  show(chat) {
    const another = chat.id !== this.chat?.id;
    if (another) {
      this.composer.cancelEdit();
      for (const address of this.addresses.values()) address.then((url) => url && URL.revokeObjectURL(url));
      this.addresses.clear();
      this.views.clear();
      byId("turns").replaceChildren();
    }
    this.chat = chat;
    this.sheet.show(chat.settings);
    this.showSidebar(false);
    this.refresh();
    if (another) this.scroller.toEnd();
  }

  /** What depends on the open chat as a whole. */
  refresh() {
    const { chat } = this;
    this.showTurns(chat.turns);
    byId("welcome").hidden = chat.turns.length > 0;
    byId("chat-title").textContent = chat.title;
    document.title = chat.turns.length ? `${chat.title} · duetvl` : "duetvl";
    this.composer.setAnswering(this.answers.has(chat));
    this.sidebar.show(chat.id);
  }

  /** Show these turns; the views of those that were there already stay as they are. */
  showTurns(turns) {
    const ids = new Set(turns.map((turn) => turn.id));
    for (const [id, view] of this.views) {
      if (ids.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    let place = byId("turns").firstElementChild;
    for (const turn of turns) {
      const view = this.views.get(turn.id) ?? this.viewOf(turn);
      if (view.element === place) place = place.nextElementSibling;
      else byId("turns").insertBefore(view.element, place);
      if (view.turn !== turn) view.update(turn); // another tab's version of it
    }
  }

  viewOf(turn) {
    const actions = {
      edit: (one) => this.edit(one),
      remove: (one) => this.removeTurn(one),
      retry: (one) => this.retry(one),
      pick: (one, nth) => this.pick(one, nth),
      open: (address, name) => this.view(address, name),
    };
    const view = turnView(turn, actions, (id) => this.address(id));
    this.views.set(turn.id, view);
    return view;
  }

  /** The blob: address of a picture; null where the store has lost it. */
  address(id) {
    if (!this.addresses.has(id)) {
      this.addresses.set(id, this.chats.medium(id).then((blob) => blob && URL.createObjectURL(blob)));
    }
    return this.addresses.get(id);
  }

  view(address, name) {
    const image = byId("viewer").querySelector("img");
    image.src = address;
    image.alt = name;
    byId("viewer").showModal();
  }

  showSidebar(open) {
    const covers = open && matchMedia("(max-width: 52rem)").matches; // on a wide screen it is there always
    document.body.classList.toggle("sidebar-open", covers);
    if (covers) byId("close-sidebar").focus();
  }

  // -- asking and answering ------------------------------------------------------------------------------------------

  async send({ text, media, edited }) {
    const { chat } = this;
    this.composer.setAnswering(true);
    const replaced = edited ? chat.turns.findIndex((turn) => turn.id === edited.id) : -1;
    if (replaced >= 0) this.undoable("Your message was replaced", () => chat.turns.splice(replaced));
    for (const medium of media) this.addresses.set(medium.id, Promise.resolve(medium.address));
    const about = media.map(({ id, kind, name, width, height }) => ({ id, kind, name, width, height }));
    const question = { id: newId(), role: "user", text, media: about };
    chat.turns.push(question);
    if (!chat.named && chat.turns.length === 1) chat.title = titleOf(text, media);
    chat.changed = Date.now();
    await this.chats.save(chat); // before the pictures: another tab drops those that no chat has
    for (const medium of media) if (medium.blob) await this.chats.keepMedium(medium.id, medium.blob);
    if (this.chat === chat) {
      history.replaceState(null, "", `#${chat.id}`);
      this.refresh();
    }
    await this.ask(chat);
  }

  async ask(chat) {
    const turn = { id: newId(), role: "assistant", versions: [], shown: 0 };
    chat.turns.push(turn);
    await this.answer(chat, turn);
  }

  async answer(chat, turn) {
    const making = this.answers.make(chat, turn, byId("model").value);
    if (this.chat === chat) {
      this.refresh();
      this.scroller.toEnd();
    }
    announce("Answering");
    const error = await making;
    if (!error && this.chat === chat) announce("The answer is complete"); // an error is an alert by itself
    if (error?.status === 401 && (await this.key.ask(error.message))) {
      await this.connect();
      await this.answer(chat, turn);
    }
  }

  retry(turn) {
    if (turn !== this.chat.turns.at(-1) || this.answers.has(this.chat)) return;
    this.answer(this.chat, turn);
    this.composer.focus(); // the button that had the focus is gone
  }

  /** More of an answer is there, or its state is another. At most once for each picture that the screen shows. */
  changed(chat, turn) {
    if (chat !== this.chat) {
      if (!this.answers.has(chat)) this.sidebar.show(this.chat.id);
      return;
    }
    const version = turn.versions[turn.shown];
    if (version.state !== "answering") {
      this.draw(turn);
      this.refresh();
    } else if (!this.drawing) {
      this.drawing = true;
      requestAnimationFrame(() => {
        this.drawing = false;
        if (this.chat === chat) this.draw(turn);
      });
    }
  }

  draw(turn) {
    this.views.get(turn.id)?.update(turn);
    this.scroller.follow();
  }

  // -- changing what was said ----------------------------------------------------------------------------------------

  async edit(turn) {
    if (this.answers.has(this.chat)) return;
    const withAddress = async (medium) => ({ ...medium, address: await this.address(medium.id) });
    const media = await Promise.all(turn.media.map(withAddress));
    this.composer.edit(turn, media);
  }

  editLast() {
    const last = this.chat.turns.findLast((turn) => turn.role === "user");
    if (last) this.edit(last);
  }

  pick(turn, nth) {
    turn.shown = nth;
    this.views.get(turn.id).update(turn);
    this.chats.save(this.chat);
  }

  removeTurn(turn) {
    const { turns } = this.chat;
    const at = turns.indexOf(turn);
    const many = turn.role === "user" && turns[at + 1]?.role === "assistant" ? 2 : 1;
    this.answers.stop(this.chat);
    this.undoable(many === 2 ? "Message and answer deleted" : "Deleted", () => turns.splice(at, many));
    this.chats.save(this.chat);
    this.refresh();
    this.composer.focus();
  }

  /** Change the open chat's turns, and offer for a while to take that back. */
  undoable(text, change) {
    const { chat } = this;
    const before = [...chat.turns];
    change();
    toast(text, "Undo", () => {
      this.answers.stop(chat);
      chat.turns = before;
      this.chats.save(chat);
      if (this.chat === chat) this.refresh();
    });
  }

  async rename(chat, title) {
    Object.assign(chat, { title, named: true });
    await this.chats.save(chat);
    this.refresh();
  }

  async removeChat(chat) {
    this.answers.stop(chat);
    await this.chats.remove(chat.id);
    if (chat === this.chat) this.newChat();
    this.refresh();
    toast(`“${chat.title}” deleted`, "Undo", async () => {
      await this.chats.save(chat);
      location.hash = chat.id;
      this.refresh();
    });
  }

  setSettings(settings) {
    this.chat.settings = settings;
    if (this.chats.all.has(this.chat.id)) this.chats.save(this.chat);
  }

  changedElsewhere(id) {
    const chat = this.chats.all.get(id);
    if (id === this.chat.id && chat) this.show(chat);
    else this.sidebar.show(this.chat.id);
  }
}

function titleOf(text, media) {
  const line = text.split("\n")[0].trim();
  if (!line) return media[0].name;
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

const chats = await Chats.open();
for (const chat of chats.all.values()) endInterrupted(chat);
const page = new Page(chats);
page.openAddressed();
if (!chats.kept) toast("This browser keeps nothing: chats end when the page is closed.");
page.composer.focus();
await page.connect();
