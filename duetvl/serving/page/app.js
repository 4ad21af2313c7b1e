// The page: one talk is open; what the user does to it is here.

import { Answers, endInterrupted } from "./answers.js";
import { modelNames } from "./api.js";
import { Composer } from "./composer.js";
import { announce, el, newId, toast } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { Scroller } from "./scroller.js";
import { closeOutside, Key, lastSettings, remember, remembered, Sheet } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Talks } from "./talks.js";
import { turnView } from "./turns.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor(talks) {
    this.talks = talks;
    this.key = new Key();
    this.scroller = new Scroller(byId("scroller"), byId("to-end"));
    this.views = new Map(); // id of a turn of the open talk -> its view
    this.addresses = new Map(); // id of a picture -> its blob: address
    this.answers = new Answers({ talks, key: () => this.key.value, onchange: (talk, turn) => this.changed(talk, turn) });
    this.sidebar = new Sidebar({ talks, running: (talk) => this.answers.has(talk), actions: {
      rename: (talk, title) => this.rename(talk, title), remove: (talk) => this.removeTalk(talk) } });
    this.sheet = new Sheet({ changed: (settings) => this.setSettings(settings) });
    this.composer = new Composer({ send: (message) => this.send(message), stop: () => this.answers.stop(this.talk),
      editLast: () => this.editLast() });
    this.drawing = false;
    this.listen();
  }

  listen() {
    addEventListener("hashchange", () => this.openAddressed());
    byId("model").addEventListener("change", (event) => remember("model", event.target.value));
    byId("theme").addEventListener("click", () => dispatchEvent(new Event("switch-theme")));
    byId("open-sheet").addEventListener("click", () => this.sheet.open());
    byId("new-talk").addEventListener("click", () => this.newTalk());
    byId("new-talk-narrow").addEventListener("click", () => this.newTalk());
    byId("show-keys").addEventListener("click", () => byId("keys-dialog").showModal());
    byId("open-sidebar").addEventListener("click", () => this.showSidebar(true));
    for (const id of ["close-sidebar", "scrim"]) byId(id).addEventListener("click", () => this.showSidebar(false));
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
    this.talks.busy = (id) => this.answers.running.has(id);
    this.talks.onchange = (id) => this.changedElsewhere(id);
    this.talks.onfull = () => toast("The browser's store is full: what is new here is not kept. Delete old talks.");
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

  // -- which talk is open --------------------------------------------------------------------------------------------

  /** Open the talk that the address names, or a new one. */
  openAddressed() {
    this.show(this.talks.all.get(location.hash.slice(1)) ?? this.talks.fresh(lastSettings()));
  }

  newTalk() {
    history.pushState(null, "", "#");
    this.show(this.talks.fresh(lastSettings()));
    this.composer.text.focus();
  }

  show(talk) {
    const another = talk.id !== this.talk?.id;
    if (another) {
      this.composer.cancelEdit();
      for (const address of this.addresses.values()) address.then((url) => url && URL.revokeObjectURL(url));
      this.addresses.clear();
    }
    this.talk = talk;
    this.views.clear();
    byId("turns").replaceChildren();
    for (const turn of talk.turns) this.append(turn);
    this.sheet.show(talk.settings);
    this.showSidebar(false);
    this.refresh();
    if (another) this.scroller.toEnd();
  }

  /** What depends on the open talk as a whole. */
  refresh() {
    const { talk } = this;
    byId("welcome").hidden = talk.turns.length > 0;
    byId("talk-title").textContent = talk.title;
    document.title = talk.turns.length ? `${talk.title} · duetvl` : "duetvl";
    this.composer.setAnswering(this.answers.has(talk));
    this.sidebar.show(talk.id);
  }

  append(turn) {
    const actions = {
      edit: (one) => this.edit(one),
      remove: (one) => this.removeTurn(one),
      retry: (one) => this.retry(one),
      pick: (one, nth) => this.pick(one, nth),
      open: (address, name) => this.view(address, name),
    };
    const view = turnView(turn, actions, (id) => this.address(id));
    this.views.set(turn.id, view);
    byId("turns").append(view.element);
  }

  /** The blob: address of a picture; null where the store has lost it. */
  address(id) {
    if (!this.addresses.has(id)) {
      this.addresses.set(id, this.talks.medium(id).then((blob) => blob && URL.createObjectURL(blob)));
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
    document.body.classList.toggle("sidebar-open", open);
    if (open) byId("close-sidebar").focus();
  }

  // -- asking and answering ------------------------------------------------------------------------------------------

  async send({ text, media, edited }) {
    const { talk } = this;
    this.composer.setAnswering(true);
    const replaced = edited ? talk.turns.findIndex((turn) => turn.id === edited.id) : -1;
    if (replaced >= 0) this.undoable("Your message was replaced", () => talk.turns.splice(replaced));
    const about = media.map(({ id, kind, name, width, height }) => ({ id, kind, name, width, height }));
    const question = { id: newId(), role: "user", text, media: about };
    talk.turns.push(question);
    if (!talk.named && talk.turns.length === 1) talk.title = titleOf(text, media);
    talk.changed = Date.now();
    await this.talks.save(talk); // before the pictures: another tab drops those that no talk has
    for (const medium of media) if (medium.blob) await this.talks.keepMedium(medium.id, medium.blob);
    if (this.talk === talk) {
      history.replaceState(null, "", `#${talk.id}`);
      this.show(talk);
    }
    await this.ask(talk);
  }

  async ask(talk) {
    const turn = { id: newId(), role: "assistant", versions: [], shown: 0 };
    talk.turns.push(turn);
    await this.answer(talk, turn);
  }

  async answer(talk, turn) {
    const making = this.answers.make(talk, turn, byId("model").value);
    if (this.talk === talk) {
      if (!this.views.has(turn.id)) this.append(turn);
      this.refresh();
      this.scroller.toEnd();
    }
    announce("Answering");
    const error = await making;
    if (this.talk === talk) announce(error ? error.message : "The answer is complete");
    if (error?.status === 401 && (await this.key.ask(error.message))) {
      await this.connect();
      await this.answer(talk, turn);
    }
  }

  retry(turn) {
    if (turn === this.talk.turns.at(-1) && !this.answers.has(this.talk)) this.answer(this.talk, turn);
  }

  /** More of an answer is there, or its state is another. At most once for each picture that the screen shows. */
  changed(talk, turn) {
    if (talk !== this.talk) {
      if (!this.answers.has(talk)) this.sidebar.show(this.talk.id);
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
        if (this.talk === talk) this.draw(turn);
      });
    }
  }

  draw(turn) {
    this.views.get(turn.id)?.update();
    this.scroller.follow();
  }

  // -- changing what was said ----------------------------------------------------------------------------------------

  async edit(turn) {
    if (this.answers.has(this.talk)) return;
    const media = await Promise.all(turn.media.map(async (medium) => ({ ...medium, address: await this.address(medium.id) })));
    this.composer.edit(turn, media);
  }

  editLast() {
    const last = this.talk.turns.findLast((turn) => turn.role === "user");
    if (last) this.edit(last);
  }

  pick(turn, nth) {
    turn.shown = nth;
    this.views.get(turn.id).update();
    this.talks.save(this.talk);
  }

  removeTurn(turn) {
    const { turns } = this.talk;
    const at = turns.indexOf(turn);
    const many = turn.role === "user" && turns[at + 1]?.role === "assistant" ? 2 : 1;
    this.answers.stop(this.talk);
    this.undoable(many === 2 ? "Message and answer deleted" : "Deleted", () => turns.splice(at, many));
    this.talks.save(this.talk);
    this.show(this.talk);
  }

  /** Change the open talk's turns, and offer for a while to take that back. */
  undoable(text, change) {
    const { talk } = this;
    const before = [...talk.turns];
    change();
    toast(text, "Undo", () => {
      this.answers.stop(talk);
      talk.turns = before;
      this.talks.save(talk);
      if (this.talk === talk) this.show(talk);
    });
  }

  rename(talk, title) {
    Object.assign(talk, { title, named: true });
    this.talks.save(talk);
    this.refresh();
  }

  async removeTalk(talk) {
    this.answers.stop(talk);
    await this.talks.remove(talk.id);
    if (talk === this.talk) this.newTalk();
    this.refresh();
    toast(`“${talk.title}” deleted`, "Undo", async () => {
      await this.talks.save(talk);
      location.hash = talk.id;
      this.refresh();
    });
  }

  setSettings(settings) {
    this.talk.settings = settings;
    if (this.talks.all.has(this.talk.id)) this.talks.save(this.talk);
  }

  changedElsewhere(id) {
    const talk = this.talks.all.get(id);
    if (id === this.talk.id && talk) this.show(talk);
    else this.sidebar.show(this.talk.id);
  }
}

function titleOf(text, media) {
  const line = text.split("\n")[0].trim();
  if (!line) return media[0].name;
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

const talks = await Talks.open();
for (const talk of talks.all.values()) endInterrupted(talk);
const page = new Page(talks);
page.openAddressed();
if (!talks.kept) toast("This browser keeps nothing: talks end when the page is closed.");
page.composer.text.focus();
await page.connect();
