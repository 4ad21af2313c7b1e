// Colours for code, by what all languages have alike: comments, strings, numbers and words that most of them reserve.

import { el } from "./dom.js";

const MOST = 20000; // characters; longer code stays plain, so that an answer that grows stays quick
const WORDS = new Set(`abstract as assert async await break case catch class const continue def default del do done elif
  else end enum except export extends False false fi finally fn for from func function global go if impl implements
  import in interface is lambda let match mod mut new nil None not null or and package pass private protected pub public
  raise return self static struct super switch then this throw trait True true try type typeof undefined union use using
  var void where while with yield`.split(/\s+/));
const SQL = new Set(`and as by case create delete distinct drop else end from group having in inner insert into is join
  left limit not null on or order outer right select set table then union update values when where with`.split(/\s+/));
const STRING = [
  String.raw`"""[^]*?(?:"""|$)`, String.raw`'''[^]*?(?:'''|$)`, String.raw`"(?:\\.|[^"\\\n])*"?`,
  String.raw`'(?:\\.|[^'\\\n])*'`, "`(?:\\\\.|[^`\\\\])*`?",
].join("|");
const REST = String.raw`\b\d[\w.]*|[A-Za-z_$][\w$]*`;
const COMMENTS = {
  hash: "#[^\n]*",
  slash: String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`,
  dash: String.raw`--[^\n]*|\/\*[^]*?(?:\*\/|$)`,
  markup: "<!--[^]*?(?:-->|$)",
};
const KINDS = {
  hash: "python py bash sh shell zsh console yaml yml toml ruby rb r perl dockerfile makefile make ini",
  slash: "javascript js typescript ts jsx tsx json c cpp c++ cc h cs csharp java kotlin swift go rust rs scala php dart css",
  dash: "sql lua haskell",
  markup: "html xml svg",
};
const KIND_OF = new Map(Object.entries(KINDS).flatMap(([kind, names]) => names.split(" ").map((name) => [name, kind])));
const PATTERNS = Object.fromEntries(Object.entries(COMMENTS).map(
  ([kind, comment]) => [kind, new RegExp(`(${comment})|(${STRING})|(${REST})`, "g")]));

/** The nodes of some code; plain text where the language is not known. */
export function highlighted(code, language) {
  const name = language.toLowerCase();
  const kind = KIND_OF.get(name);
  if (!kind || code.length > MOST) return [code];
  const words = name === "sql" ? SQL : WORDS;
  const nodes = [];
  let plain = 0;
  for (const match of code.matchAll(PATTERNS[kind])) {
    const [text, comment, string, word] = match;
    const style = comment ? "comment" : string ? "string" : styleOf(word, words, name);
    if (!style) continue;
    nodes.push(code.slice(plain, match.index), el("span", { class: style }, text));
    plain = match.index + text.length;
  }
  nodes.push(code.slice(plain));
  return nodes;
}

function styleOf(word, words, language) {
  if (/^\d/.test(word)) return "number";
  return words.has(language === "sql" ? word.toLowerCase() : word) ? "keyword" : null;
}
