// Where a message is written, and pictures and videos are added to it.

import { el, hasKeyboard, icon, iconButton, newId } from "./dom.js";
import { attachment, LIMITS } from "./media.js";

export class Composer {
  /** `send({text, media})` gets a message; media are as attachment() makes them. `stop()` ends the answer. */
  constructor({ send, stop, editLast }) {
    Object.assign(this, { send, stop, editLast });
    this.form = document.getElementById("composer");
    this.text = document.getElementById("message");
    this.button = document.getElementById("send");
    this.thumbnails = document.getElementById("thumbnails");
    this.note = document.getElementById("note");
    this.media = []; // attachments, or {id, name, file, pending: true} while they are read
    this.editing = null; // {turn, draft}: the turn that is written anew, and what was being written before
    this.answering = false;
    this.listen();
    this.refresh();
  }

  listen() {
    const picker = document.getElementById("files");
    document.getElementById("attach").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      this.add([...picker.files]);
      picker.value = "";
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.text.addEventListener("input", () => this.refresh());
    this.text.addEventListener("keydown", (event) => this.pressed(event));
    document.getElementById("cancel-edit").addEventListener("click", () => this.cancelEdit());
    document.addEventListener("paste", (event) => this.pasted(event));
    this.listenForDrops();
  }

  listenForDrops() {
    const veil = document.getElementById("drop");
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) veil.hidden = true;
    });
    addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      veil.hidden = true;
      this.add([...event.dataTransfer.files]);
    });
  }

  pressed(event) {
    // While a word is being composed (Chinese, Japanese, Korean), Enter belongs to the input method.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && hasKeyboard()) {
      event.preventDefault();
      if (!this.answering) this.submit();
    } else if (event.key === "ArrowUp" && !this.text.value && !this.media.length && !this.editing) {
      event.preventDefault();
      this.editLast();
    }
  }

  pasted(event) {
    const files = [...event.clipboardData.files];
    // Office programs put a picture of the text beside the text: the text is meant.
    if (!files.length || event.clipboardData.getData("text/plain") || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    this.add(files);
  }

  // -- pictures and videos -------------------------------------------------------------------------------------------

  async add(files) {
    this.tell("");
    const room = LIMITS.count - this.media.length;
    const taken = files.slice(0, Math.max(0, room));
    const waiting = taken.map((file) => ({ id: newId(), name: file.name, pending: true, file }));
    if (files.length > waiting.length) this.tell(`A message holds at most ${LIMITS.count} pictures and videos.`);
    this.setMedia([...this.media, ...waiting]);
    this.focus();
    // One after another: a decoded photo of 50 megapixels takes 200 MB.
    for (const medium of waiting) await this.prepare(medium);
  }

  async prepare(medium) {
    try {
      Object.assign(medium, await attachment(medium.file));
      medium.address = URL.createObjectURL(medium.blob);
    } catch (error) {
      medium.refused = true;
      this.tell(error.message);
    }
    medium.pending = false;
    delete medium.file;
    this.setMedia(this.media);
  }

  setMedia(media) {
    this.media = media.filter((medium) => !medium.refused);
    this.thumbnails.replaceChildren(...this.media.map((medium) => this.thumbnail(medium)));
    this.thumbnails.hidden = !this.media.length;
    this.refresh();
  }

  thumbnail(medium) {
    const remove = () => {
      if (medium.blob) URL.revokeObjectURL(medium.address); // without a blob it belongs to a turn that is edited
      this.setMedia(this.media.filter((other) => other !== medium));
      this.focus();
    };
    let view = el("span", { class: "spinner", role: "img", "aria-label": `Reading ${medium.name}` });
    if (medium.kind === "image") view = el("img", { src: medium.address, alt: medium.name });
    if (medium.kind === "video") {
      view = el("video", { src: medium.address, muted: true, preload: "metadata", "aria-label": medium.name });
    }
    const film = medium.kind === "video" ? icon("film") : null;
    return el("li", { title: medium.name }, view, film, iconButton("close", `Remove ${medium.name}`, remove));
  }

  // -- sending -------------------------------------------------------------------------------------------------------

  submit() {
    const text = this.text.value.trim();
    if (this.answering) {
      this.stop();
      return;
    }
    if (!this.ready) return;
    const message = { text, media: this.media, edited: this.editing?.turn ?? null };
    const draft = this.editing?.draft;
    this.editing = null;
    this.fill(draft ?? { text: "", media: [] });
    this.send(message);
  }

  get ready() {
    return Boolean((this.text.value.trim() || this.media.length) && !this.media.some((medium) => medium.pending));
  }

  /** Write a turn anew: its text and media come back into the composer. */
  edit(turn, media) {
    const draft = this.editing?.draft ?? { text: this.text.value, media: this.media };
    this.editing = { turn, draft };
    this.fill({ text: turn.text, media });
    this.text.focus();
    this.text.setSelectionRange(turn.text.length, turn.text.length);
  }

  cancelEdit() {
    if (!this.editing) return;
    const { draft } = this.editing;
    this.editing = null;
    this.fill(draft);
    this.focus();
  }

  /** Be ready to write, where that hides nothing. */
  focus() {
    if (hasKeyboard()) this.text.focus();
  }

  fill({ text, media }) {
    this.text.value = text;
    this.tell("");
    this.setMedia(media);
  }

  /** Begin a message with a line that fits to a picture, for which the user is asked if there is none. */
  suggest(text) {
    this.text.value = text;
    this.refresh();
    this.text.focus();
    if (!this.media.length) document.getElementById("files").click();
  }

  setAnswering(answering) {
    this.answering = answering;
    this.refresh();
  }

  /** A line above the message: what could not be added, and why. */
  tell(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  refresh() {
    document.getElementById("editing").hidden = !this.editing;
    const label = this.answering ? "Stop" : "Send";
    this.button.replaceChildren(icon(this.answering ? "stop" : "send"));
    this.button.title = label;
    this.button.setAttribute("aria-label", label);
    this.button.disabled = !this.answering && !this.ready;
    // As high as its text; browsers that know field-sizing need no help.
    if (!CSS.supports("field-sizing", "content")) {
      this.text.style.height = "auto";
      this.text.style.height = `${this.text.scrollHeight}px`;
    }
  }
}
