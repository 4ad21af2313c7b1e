// Elements are made here and nowhere from strings of markup: text becomes text nodes, whatever is in it.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `on…` properties are listeners, booleans switch an attribute, null leaves it out. Children are nodes,
 * strings, lists of them (of any length) and null.
 */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/** One of the drawings at the top of index.html. Screen readers pass over it: its button has a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon alone; the label is its tooltip as well. */
export function iconButton(name, label, onclick, more = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...more },
    icon(name));
}

/** A button that copies what `text()` returns, and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "alert"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    announce(copied ? "Copied" : "The browser does not let this page copy");
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Refused by the browser's settings: the older way may still be open.
    }
  }
  // Plain http on a local network is no "secure context": such pages have no navigator.clipboard.
  const area = el("textarea", { class: "off-screen", "aria-hidden": "true", readonly: true });
  area.value = text;
  const before = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return copied;
}

/** Whether there is a mouse, and with it a keyboard: on a phone, a field with the focus covers half of the page. */
export function hasKeyboard() {
  return matchMedia("(hover: hover)").matches;
}

/** Says one line to screen readers. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A short line at the bottom, with something to press where `action` is given. */
export function toast(text, label = null, action = null) {
  const box = document.getElementById("toasts");
  const line = el("div", { class: "toast" }, el("span", {}, text));
  if (action) {
    line.append(el("button", { type: "button", onclick: () => (line.remove(), action()) }, label));
  }
  box.replaceChildren(line);
  announce(text);
  setTimeout(() => line.remove(), 8000);
}

/** A name that no other has. `crypto.randomUUID` is missing on plain http. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
