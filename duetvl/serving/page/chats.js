// Chats and their pictures, kept in this browser alone (IndexedDB). Texts are in memory as well: they are small.
//
// A chat: {id, title, named, created, changed, settings, turns}. `named`: the user gave the title.
// A turn of the user: {id, role: "user", text, media: [{id, kind, name, width, height}]}.
// A turn of the model: {id, role: "assistant", versions: [...], shown}; see answers.js for a version.

import { newId } from "./dom.js";

const NAME = "duetvl";

export class Chats {
  /** Open the store. Where the browser keeps nothing (private windows of some), chats live as long as the page. */
  static async open() {
    const chats = new Chats();
    try {
      chats.database = await opened();
      for (const chat of await done(chats.store("chats").getAll())) chats.all.set(chat.id, chat);
      await chats.sweep();
    } catch {
      chats.database = null;
    }
    chats.channel.onmessage = ({ data }) => chats.reload(data);
    return chats;
  }

  constructor() {
    this.all = new Map();
    this.loose = new Map(); // pictures where there is no database
    this.database = null;
    this.channel = new BroadcastChannel(NAME);
    this.onchange = () => {}; // called with the id of a chat that another tab changed
    this.busy = () => false; // whether a chat is being answered here, where it is then newer than in other tabs
    this.onfull = () => {}; // called where something could not be kept
  }

  /** Whether chats outlive the page. */
  get kept() {
    return this.database !== null;
  }

  /** All chats, the latest first; of those that contain the words where some are given. */
  list(words = "") {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (chat) => {
      const text = textOf(chat);
      return wanted.every((word) => text.includes(word));
    };
    const all = [...this.all.values()];
    return (wanted.length ? all.filter(fits) : all).sort((a, b) => b.changed - a.changed);
  }

  /** A chat that is not kept until it is saved. */
  fresh(settings) {
    const now = Date.now();
    return { id: newId(), title: "New chat", named: false, created: now, changed: now, settings, turns: [] };
  }

  /** Keep a chat as it is now. */
  async save(chat) {
    this.all.set(chat.id, chat);
    await this.write("chats", chat);
    this.channel.postMessage(chat.id);
  }

  /** Forget a chat. Its pictures stay until the page is opened again, so that it can be put back. */
  async remove(id) {
    this.all.delete(id);
    if (this.database) await done(this.store("chats", "readwrite").delete(id));
    this.channel.postMessage(id);
  }

  async keepMedium(id, blob) {
    this.loose.set(id, blob);
    if (await this.write("media", { id, blob })) this.loose.delete(id);
  }

  /** A picture or video; null where it is gone. */
  async medium(id) {
    if (this.loose.has(id)) return this.loose.get(id);
    const record = this.database && (await done(this.store("media").get(id)));
    return record?.blob ?? null;
  }

  // -- inside --------------------------------------------------------------------------------------------------------

  store(name, mode = "readonly") {
    return this.database.transaction(name, mode).objectStore(name);
  }

  /** Whether it was written; a full disk is told. */
  async write(name, record) {
    if (!this.database) return false;
    try {
      await done(this.store(name, "readwrite").put(record));
      return true;
    } catch {
      this.onfull();
      return false;
    }
  }

  /** Another tab has changed a chat: take its version. */
  async reload(id) {
    if (this.busy(id)) return;
    const chat = this.database && (await done(this.store("chats").get(id)));
    if (chat) this.all.set(id, chat);
    else this.all.delete(id);
    this.onchange(id);
  }

  /** Drop pictures of which no chat knows any more. */
  async sweep() {
    const used = new Set([...this.all.values()].flatMap(mediaOf));
    for (const id of await done(this.store("media").getAllKeys())) {
      if (!used.has(id)) await done(this.store("media", "readwrite").delete(id));
    }
  }
}

function mediaOf(chat) {
  return chat.turns.flatMap((turn) => turn.media ?? []).map((medium) => medium.id);
}

function textOf(chat) {
  const texts = chat.turns.map((turn) => turn.text ?? turn.versions.map((version) => version.text).join("\n"));
  return [chat.title, ...texts].join("\n").toLowerCase();
}

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("media", { keyPath: "id" });
  };
  return done(request);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
