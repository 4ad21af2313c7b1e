// Markdown inside a line: code, emphasis, links, line breaks. Text becomes nodes, never HTML.
//
// Models' answers differ from documents in three ways, and so does this from CommonMark: a line break is kept (text
// that was read from a picture has its lines), emphasis also ends beside Chinese punctuation, and formulas keep their
// backslashes. Every step is linear in the text, or bounded, so that an answer cannot stall the page.

import { el } from "./dom.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;
const MATH = /\\\((?!\s*\\\))[^\n]{1,2000}?\\\)|\\\[[^]{1,4000}?\\\]|\$\$[^$]+\$\$|\$(?=[^\s$])[^$\n]*[^\s$\\]\$(?!\d)|\$[^\s$\\]\$(?!\d)/y;
const ADDRESS = /https?:\/\/[!#-;=?-_a-z~]+/iy;
const IN_BRACKETS = /<(https?:\/\/[^\s<>]+)>/iy;
const BREAK = /<br\s*\/?>/iy;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;
const MOST_NESTED = 16;

/**
 * The nodes of a text. `live` says that more of it will come: emphasis and code that are not closed yet are shown as
 * if they were, so that markers do not flash by.
 */
export function inline(text, { live = false, links = true } = {}) {
  return nodesOf(emphasised(scan(text, links, live), live));
}

/** The address if a link may lead there, else null: http and https alone. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return address.protocol === "http:" || address.protocol === "https:" ? address.href : null;
  } catch {
    return null;
  }
}

// -- a text as pieces: strings, nodes and runs of markers ----------------------------------------------------------

function scan(text, links, live) {
  const pieces = [];
  const closing = matchingBrackets(text);
  const runs = new Map(); // length of a run of backticks -> no other of this length from here on
  let plain = "";
  const put = (piece) => {
    if (plain) pieces.push(plain);
    plain = "";
    pieces.push(piece);
  };
  let at = 0;
  while (at < text.length) {
    const taken = special(text, at, { closing, runs, links, live });
    if (taken) {
      put(taken.piece);
      at = taken.end;
    } else if (text[at] === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  if (plain) pieces.push(plain);
  return pieces;
}

/** What stands at a place, as {piece, end}; null for an ordinary character. */
function special(text, at, context) {
  switch (text[at]) {
    case "`": return codeSpan(text, at, context);
    case "\\":
      if (text[at + 1] === "\n") return { piece: el("br"), end: at + 2 };
      return math(text, at);
    case "$": return math(text, at);
    case "\n": return { piece: el("br"), end: at + 1 };
    case "<": return angled(text, at, context);
    case "[": return link(text, at, at, context);
    case "!": return text[at + 1] === "[" ? link(text, at, at + 1, context) : null;
    case "h": case "H": return context.links ? bareAddress(text, at) : null;
    case "*": case "_": case "~": return markers(text, at);
    default: return null;
  }
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function codeSpan(text, at, { runs, live }) {
  const fence = match(/`+/y, text, at)[0];
  const start = at + fence.length;
  let end = runs.has(fence.length) && runs.get(fence.length) <= start ? -1 : closingRun(text, start, fence.length);
  if (end < 0) {
    runs.set(fence.length, Math.min(runs.get(fence.length) ?? start, start));
    if (!live || start === text.length) return { piece: fence, end: start };
    return { piece: el("code", {}, text.slice(start)), end: text.length };
  }
  let code = text.slice(start, end).replaceAll("\n", " ");
  if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
  return { piece: el("code", {}, code), end: end + fence.length };
}

function closingRun(text, from, length) {
  const run = /`+/g;
  run.lastIndex = from;
  for (let tick = run.exec(text); tick; tick = run.exec(text)) if (tick[0].length === length) return tick.index;
  return -1;
}

function math(text, at) {
  const formula = match(MATH, text, at);
  return formula && { piece: el("span", { class: "math", dir: "ltr" }, formula[0]), end: at + formula[0].length };
}

function angled(text, at, { links }) {
  const line = match(BREAK, text, at);
  if (line) return { piece: el("br"), end: at + line[0].length };
  const address = links && match(IN_BRACKETS, text, at);
  const href = address && safeAddress(address[1]);
  return href ? { piece: anchor(href, address[1]), end: at + address[0].length } : null;
}

function bareAddress(text, at) {
  if (at > 0 && WORD.test(text[at - 1])) return null;
  let address = match(ADDRESS, text, at)?.[0].replace(/[.,;:!?'*_~]+$/, "");
  // A closing bracket belongs to the address only if it was opened in it.
  while (address?.endsWith(")") && address.split(")").length > address.split("(").length) address = address.slice(0, -1);
  const href = address && safeAddress(address);
  return href ? { piece: anchor(href, address), end: at + address.length } : null;
}

/** [label](address), and ![label](address): a picture in an answer is never loaded, only linked to. */
function link(text, at, bracket, { closing, links }) {
  const end = closing.get(bracket);
  const target = links && end !== undefined && text[end + 1] === "(" ? match(TARGET, text, end + 1) : null;
  const href = target && safeAddress(target[1] ?? target[2]);
  if (!href) return null;
  const label = inline(text.slice(bracket + 1, end), { links: false });
  return { piece: anchor(href, label.length ? label : href), end: end + 1 + target[0].length };
}

function anchor(href, label) {
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}

function matchingBrackets(text) {
  const closing = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) closing.set(open.pop(), at);
  }
  return closing;
}

// -- emphasis --------------------------------------------------------------------------------------------------------

function markers(text, at) {
  const sign = text[at];
  let end = at;
  while (text[end] === sign) end += 1;
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  const inWord = sign === "_" && WORD.test(before) && WORD.test(after);
  const opens = !/\s/.test(after) && !inWord && !(sign === "_" && WORD.test(before));
  const closes = !/\s/.test(before) && !inWord && !(sign === "_" && WORD.test(after));
  const count = end - at;
  if ((sign === "~" && count !== 2) || !(opens || closes)) return { piece: text.slice(at, end), end };
  return { piece: { sign, count, opens, closes, ends: end === text.length }, end };
}

/** Pairs of markers become {tag, children}; those left over become text again. */
function emphasised(pieces, live) {
  const done = []; // pieces, with openers that wait for their end still among them
  const waiting = []; // places of these openers in `done`
  for (const piece of pieces) {
    if (!piece.sign) {
      done.push(piece);
      continue;
    }
    if (piece.closes) close(piece, done, waiting);
    if (piece.count && piece.opens) waiting.push(done.length);
    if (piece.count) done.push(piece);
  }
  if (live) closeWhatIsOpen(done, waiting);
  return done;
}

function close(piece, done, waiting) {
  // Markers that wait are few in a true text. Looking back over the nearest alone keeps a hostile one from taking long.
  for (let nth = waiting.length - 1; nth >= Math.max(0, waiting.length - MOST_NESTED) && piece.count; ) {
    const opener = done[waiting[nth]];
    if (!fits(opener, piece)) {
      nth -= 1;
      continue;
    }
    const used = Math.min(opener.count, piece.count, 2);
    const children = done.splice(waiting[nth] + 1);
    const depth = 1 + children.reduce((most, child) => Math.max(most, child.depth ?? 0), 0);
    if (depth > MOST_NESTED) {
      for (const child of children) done.push(child);
      return;
    }
    opener.count -= used;
    piece.count -= used;
    waiting.length = opener.count ? nth + 1 : nth;
    if (!opener.count) done.pop();
    done.push({ tag: tagOf(piece.sign, used), children, depth });
    nth = waiting.length - 1;
  }
}

function fits(opener, closer) {
  if (opener.sign !== closer.sign || (opener.sign === "~" && opener.count !== closer.count)) return false;
  const both = opener.closes || closer.opens;
  return !(both && (opener.count + closer.count) % 3 === 0 && (opener.count % 3 || closer.count % 3));
}

/** Bold text that has begun is bold before its end has come. */
function closeWhatIsOpen(done, waiting) {
  const last = done.at(-1);
  if (last?.sign && last.ends) done.pop(); // a marker of which more may come
  for (const place of waiting.reverse()) {
    const opener = done[place];
    if (opener?.sign === "*" && opener.count === 2 && place + 1 < done.length) {
      done.splice(place, done.length, { tag: "strong", children: done.slice(place + 1) });
    }
  }
}

function tagOf(sign, count) {
  if (sign === "~") return "del";
  return count === 2 ? "strong" : "em";
}

function nodesOf(pieces) {
  return pieces.map((piece) => {
    if (piece.tag) return el(piece.tag, {}, nodesOf(piece.children));
    if (piece.sign) return piece.sign.repeat(piece.count);
    return piece;
  });
}
