// The sheet of settings, which belong to a chat; the key of the server; what is remembered from one visit to the next.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const EMPTY = { temperature: null, top_p: null, max_tokens: null, seed: null, system: "" };

/** A value that outlives the page, or null. */
export function remembered(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // nothing is stored here, or something that is not ours
  }
}

/** Keep a value for the next visit, where the browser does. */
export function remember(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage is off or full: it lasts as long as the page.
  }
}

/** What a new chat begins with: the settings that were changed last. */
export function lastSettings() {
  return { ...EMPTY, ...remembered("settings") };
}

export class Sheet {
  /** `changed(settings)` is called whenever a field has a new value that is in its bounds. */
  constructor({ changed }) {
    this.changed = changed;
    this.dialog = document.getElementById("sheet");
    this.form = document.getElementById("settings");
    this.settings = { ...EMPTY };
    this.form.addEventListener("input", (event) => this.take(event.target));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.show(EMPTY);
      this.store();
    });
    closeOutside(this.dialog);
  }

  show(settings) {
    this.settings = { ...EMPTY, ...settings };
    for (const [name, value] of Object.entries(this.settings)) {
      const field = this.form.elements[name];
      field.value = value ?? "";
      this.mark(field);
    }
  }

  open() {
    this.dialog.showModal();
  }

  take(field) {
    this.mark(field);
    if (!field.validity.valid) return; // what was valid before stays in force
    const number = field.value === "" ? null : Number(field.value);
    this.settings[field.name] = NUMBERS.includes(field.name) ? number : field.value;
    this.store();
  }

  mark(field) {
    const kind = field.step === "1" ? "A whole number" : "A number";
    const problem = field.validity.valid ? "" : `${kind} from ${field.min} to ${field.max}.`;
    const line = document.getElementById(`${field.id}-problem`);
    if (line) line.textContent = problem;
    field.setAttribute("aria-invalid", String(!field.validity.valid));
  }

  store() {
    remember("settings", this.settings);
    this.changed({ ...this.settings });
  }
}

/** The key of the server: asked for once, forgotten with the tab unless the user wants it remembered. */
export class Key {
  constructor() {
    this.dialog = document.getElementById("key-dialog");
    this.value = remembered("key") ?? sessionKey();
    this.asking = null;
    document.getElementById("forget-key").addEventListener("click", () => this.forget());
    this.showForget();
  }

  /** Ask for it, with the server's reason. Resolves to whether one was given. */
  ask(reason) {
    this.asking ??= this.answered(reason).finally(() => (this.asking = null));
    return this.asking;
  }

  answered(reason) {
    const form = this.dialog.querySelector("form");
    document.getElementById("key-problem").textContent = this.value ? reason : "";
    form.reset();
    this.dialog.returnValue = "";
    this.dialog.showModal();
    return new Promise((resolve) => {
      this.dialog.addEventListener("close", () => {
        const given = this.dialog.returnValue === "use" && form.elements.key.value.trim();
        if (given) this.keep(given, form.elements.remember.checked);
        form.reset();
        resolve(Boolean(given));
      }, { once: true });
    });
  }

  keep(value, always) {
    this.value = value;
    try {
      sessionStorage.setItem("key", value);
    } catch {
      // It lasts as long as the page.
    }
    if (always) remember("key", value);
    this.showForget();
  }

  forget() {
    this.value = null;
    remember("key", null);
    try {
      sessionStorage.removeItem("key");
    } catch {
      // Nothing was stored.
    }
    this.showForget();
  }

  showForget() {
    document.getElementById("forget-key").hidden = !this.value;
  }
}

function sessionKey() {
  try {
    return sessionStorage.getItem("key");
  } catch {
    return null;
  }
}

/** Close a dialog by a press beside it. */
export function closeOutside(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
