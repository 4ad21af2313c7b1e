// Talks and their pictures, kept in this browser alone (IndexedDB). Texts are in memory as well: they are small.
//
// A talk: {id, title, named, created, changed, settings, turns}. `named`: the user gave the title.
// A turn of the user: {id, role: "user", text, media: [{id, kind, name, width, height}]}.
// A turn of the model: {id, role: "assistant", versions: [...], shown}; see answers.js for a version.

import { newId } from "./dom.js";

const NAME = "duetvl";

export class Talks {
  /** Open the store. Where the browser keeps nothing (private windows of some), talks live as long as the page. */
  static async open() {
    const talks = new Talks();
    try {
      talks.database = await opened();
      for (const talk of await done(talks.store("talks").getAll())) talks.all.set(talk.id, talk);
      await talks.sweep();
    } catch {
      talks.database = null;
    }
    talks.channel.onmessage = ({ data }) => talks.reload(data);
    return talks;
  }

  constructor() {
    this.all = new Map();
    this.loose = new Map(); // pictures where there is no database
    this.database = null;
    this.channel = new BroadcastChannel(NAME);
    this.onchange = () => {}; // called with the id of a talk that another tab changed
    this.busy = () => false; // whether a talk is being answered here, where it is then newer than in other tabs
    this.onfull = () => {}; // called where something could not be kept
  }

  /** Whether talks outlive the page. */
  get kept() {
    return this.database !== null;
  }

  /** All talks, the latest first; of those that contain the words where some are given. */
  list(words = "") {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (talk) => {
      const text = textOf(talk);
      return wanted.every((word) => text.includes(word));
    };
    return [...this.all.values()].filter(fits).sort((a, b) => b.changed - a.changed);
  }

  /** A talk that is not kept until it is saved. */
  fresh(settings) {
    const now = Date.now();
    return { id: newId(), title: "New talk", named: false, created: now, changed: now, settings, turns: [] };
  }

  /** Keep a talk as it is now. */
  async save(talk) {
    this.all.set(talk.id, talk);
    await this.write("talks", talk);
    this.channel.postMessage(talk.id);
  }

  /** Forget a talk. Its pictures stay until the page is opened again, so that it can be put back. */
  async remove(id) {
    this.all.delete(id);
    if (this.database) await done(this.store("talks", "readwrite").delete(id));
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

  /** Another tab has changed a talk: take its version. */
  async reload(id) {
    if (this.busy(id)) return;
    const talk = this.database && (await done(this.store("talks").get(id)));
    if (talk) this.all.set(id, talk);
    else this.all.delete(id);
    this.onchange(id);
  }

  /** Drop pictures of which no talk knows any more. */
  async sweep() {
    const used = new Set([...this.all.values()].flatMap(mediaOf));
    for (const id of await done(this.store("media").getAllKeys())) {
      if (!used.has(id)) await done(this.store("media", "readwrite").delete(id));
    }
  }
}

function mediaOf(talk) {
  return talk.turns.flatMap((turn) => turn.media ?? []).map((medium) => medium.id);
}

function textOf(talk) {
  const texts = talk.turns.map((turn) => turn.text ?? turn.versions.map((version) => version.text).join("\n"));
  return [talk.title, ...texts].join("\n").toLowerCase();
}

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("talks", { keyPath: "id" });
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
