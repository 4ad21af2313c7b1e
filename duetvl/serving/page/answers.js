// Answers while they are made. They go on when another chat is looked at.
//
// A version of an answer: {text, model, state, error, cut, usage, first, seconds}; state is "answering", "done",
// "stopped" or "failed"; first and seconds are the times in s until the first and the last piece came.

import { answer } from "./api.js";
import { dataAddress } from "./media.js";

const SAVE_EVERY = 1000; // ms: what a page that is closed in mid-answer may lose

export class Answers {
  /** `key()` gives the key of the server; `onchange(chat, turn)` is called whenever more of an answer is there. */
  constructor({ chats, key, onchange }) {
    Object.assign(this, { chats, key, onchange });
    this.running = new Map(); // id of a chat -> AbortController
  }

  has(chat) {
    return this.running.has(chat.id);
  }

  /** End the answer of a chat; what came is kept. */
  stop(chat) {
    this.running.get(chat.id)?.abort();
  }

  /** Make a version of `turn`, the last of its chat. Returns the error that it ended with, or null. */
  async make(chat, turn, model) {
    const version = {
      text: "", model, state: "answering", error: null, cut: false, usage: null, first: null, seconds: null,
    };
    // A failure without a word is replaced.
    turn.versions = turn.versions.filter((old) => old.text || old.state === "done");
    turn.shown = turn.versions.push(version) - 1;
    const stop = new AbortController();
    this.running.set(chat.id, stop);
    const stopSaving = this.saveRegularly(chat, version);
    this.onchange(chat, turn);
    try {
      await this.receive(chat, turn, version, stop.signal);
      version.state = "done";
      return null;
    } catch (error) {
      version.state = stop.signal.aborted ? "stopped" : "failed";
      version.error = stop.signal.aborted ? null : error.message;
      return stop.signal.aborted ? null : error;
    } finally {
      stopSaving();
      this.running.delete(chat.id);
      chat.changed = Date.now();
      await this.chats.save(chat);
      this.onchange(chat, turn);
    }
  }

  async receive(chat, turn, version, signal) {
    await this.chats.save(chat);
    const messages = await this.messagesBefore(chat, turn);
    const request = { model: version.model, messages, ...parameters(chat.settings) };
    const began = performance.now();
    for await (const event of answer(request, this.key(), signal)) {
      if (event.text) {
        version.text += event.text;
        version.seconds = (performance.now() - began) / 1000;
        version.first ??= version.seconds;
        this.onchange(chat, turn);
      }
      if (event.finish) version.cut = event.finish === "length";
      if (event.usage) version.usage = { read: event.usage.prompt_tokens, written: event.usage.completion_tokens };
    }
  }

  /** Keep what has come every second. Returns what ends this. */
  saveRegularly(chat, version) {
    let length = 0;
    const timer = setInterval(() => {
      if (version.text.length === length) return;
      length = version.text.length;
      this.chats.save(chat);
    }, SAVE_EVERY);
    return () => clearInterval(timer);
  }

  async messagesBefore(chat, turn) {
    const system = chat.settings.system ? [{ role: "system", content: chat.settings.system }] : [];
    const turns = chat.turns.slice(0, chat.turns.indexOf(turn));
    const messages = await Promise.all(turns.map((before) => this.messageOf(before)));
    return [...system, ...messages.filter((message) => message.content.length)];
  }

  async messageOf(turn) {
    if (turn.role === "assistant") return { role: "assistant", content: turn.versions[turn.shown].text };
    if (!turn.media.length) return { role: "user", content: turn.text };
    const parts = await Promise.all(turn.media.map((medium) => this.partOf(medium)));
    return { role: "user", content: turn.text ? [...parts, { type: "text", text: turn.text }] : parts };
  }

  async partOf({ id, kind, name }) {
    const blob = await this.chats.medium(id);
    if (!blob) throw new Error(`${name} is gone from this browser. Delete its message, or edit it and add it anew.`);
    return { type: `${kind}_url`, [`${kind}_url`]: { url: await dataAddress(blob) } };
  }
}

/** The settings that were set; for all others the server has the model's own. */
function parameters({ temperature, top_p, max_tokens, seed }) {
  const all = { temperature, top_p, max_tokens, seed };
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== null && value !== undefined));
}

/** An answer that was being made when its page was closed. */
export function endInterrupted(chat) {
  for (const version of chat.turns.flatMap((turn) => turn.versions ?? [])) {
    if (version.state !== "answering") continue;
    version.state = "failed";
    version.error = "The page was closed before the answer was complete.";
  }
}
