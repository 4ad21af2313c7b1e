// Markdown as models write it: paragraphs, headings, lists, quotes, tables, code. Nodes are made, never HTML: what
// looks like a tag is shown as it is written.

import { copyButton, el } from "./dom.js";
import { highlighted } from "./highlight.js";
import { inline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const UNDERLINE = /^ {0,3}(={2,}|-{2,})[ \t]*$/; // one sign alone is a list that begins
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ ]+)(.*)|)$/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12; // quotes and lists below are shown as text

// -- blocks ----------------------------------------------------------------------------------------------------------

/** The blocks of some lines, in order; each has `line`, the number of its first. */
export function blocksOf(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    blocks.push({ ...block, line: at });
    at = block.end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (FENCE.test(line)) return fence(lines, at);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2] ?? "", end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && startsList(line)) return list(lines, at, depth);
  return table(lines, at) ?? paragraph(lines, at, depth);
}

function startsList(line) {
  const item = ITEM.exec(line);
  return item !== null && item[1].length < 4;
}

function fence(lines, at) {
  const [, indent, marks, language] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const inside = lines.slice(at + 1, end).map((line) => withoutIndent(line, indent.length));
  return { kind: "code", language, text: inside.join("\n"), end: Math.min(end + 1, lines.length) };
}

function withoutIndent(line, most) {
  let width = 0;
  while (width < most && line[width] === " ") width += 1;
  return line.slice(width);
}

function quote(lines, at, depth) {
  let end = at;
  const inside = [];
  while (end < lines.length && (QUOTE.test(lines[end]) || continues(lines, end, inside))) {
    inside.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return { kind: "quote", blocks: blocksOf(inside, depth + 1), end };
}

/** A line that goes on with the paragraph above it, although it lacks the mark or the indent of what it stands in. */
function continues(lines, at, above) {
  const last = above.at(-1);
  return Boolean(last?.trim()) && Boolean(lines[at].trim()) && !FENCE.test(last) && !startsBlock(lines[at]);
}

function startsBlock(line) {
  return interrupts(line) || startsList(line);
}

/** Whether a line ends the paragraph above it. "1986. A good year" does not: lists begin with 1. */
function interrupts(line) {
  const begins = startsList(line) && /^ *(?:[-*+]|1[.)])/.test(line);
  return begins || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[2].length > 1;
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const begin = afterBlanks(lines, end);
    const item = begin < lines.length && !RULE.test(lines[begin]) ? ITEM.exec(lines[begin]) : null;
    if (!item || item[1].length > first[1].length + 3 || item[2].at(-1) !== first[2].at(-1)) break;
    loose ||= begin > end && items.length > 0;
    const inside = itemLines(lines, begin, item);
    items.push(itemOf(inside.lines, depth));
    loose ||= inside.lines.some((line, nth) => !line.trim() && nth > 0 && !itemOnly(inside.lines, nth));
    end = inside.end;
  }
  return { kind: "list", ordered, first: ordered ? parseInt(first[2], 10) : null, loose, items, end };
}

/** Whether a blank line of an item stands inside of something nested, which it does not loosen. */
function itemOnly(lines, nth) {
  return lines.slice(0, nth).some((line) => FENCE.test(line) || ITEM.test(line));
}

function afterBlanks(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

/** The lines of one item without its indent, and the line after it. */
function itemLines(lines, at, item) {
  const [, indent, mark, gap, rest] = item;
  const own = indent.length;
  const width = own + mark.length + (gap && gap.length <= 4 ? gap.length : 1);
  const inside = [rest ?? ""];
  let end = at + 1;
  while (end < lines.length) {
    const next = afterBlanks(lines, end);
    if (next === lines.length) break;
    const line = lines[next].replace(/^[ \t]+/, (blank) => blank.replaceAll("\t", "    "));
    const depth = line.length - line.trimStart().length;
    // Two spaces are enough for what stands below an item: many models write no more, below "1." too.
    const below = depth >= Math.min(width, own + 2);
    if (!below && (next > end || !continues(lines, next, inside))) break;
    while (end < next) inside.push(lines[end++]);
    inside.push(withoutIndent(line, width));
    end = next + 1;
  }
  return { lines: inside, end };
}

function itemOf(lines, depth) {
  const task = /^\[([ xX])\][ ]+(?=\S)/.exec(lines[0]);
  const inside = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
  return { done: task ? task[1] !== " " : null, blocks: blocksOf(inside, depth + 1) };
}

function table(lines, at) {
  if (!lines[at].includes("|") || !DIVIDER.test(lines[at + 1] ?? "")) return null;
  const head = cells(lines[at]);
  const divider = cells(lines[at + 1]);
  if (head.length !== divider.length) return null;
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|") && !startsBlock(lines[end])) {
    const row = cells(lines[end]);
    rows.push(head.map((_, nth) => row[nth] ?? ""));
    end += 1;
  }
  return { kind: "table", align: divider.map(alignment), head, rows, end };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignment(cell) {
  if (cell.startsWith(":") && cell.endsWith(":")) return "center";
  if (cell.endsWith(":")) return "end";
  return null;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    const under = UNDERLINE.exec(lines[end]);
    if (under) {
      const text = textOf(lines.slice(at, end));
      return { kind: "heading", level: under[1][0] === "=" ? 1 : 2, text, end: end + 1 };
    }
    if (interrupts(lines[end]) && (depth < DEEPEST || FENCE.test(lines[end]))) break;
    if (table(lines, end)) break;
    end += 1;
  }
  return { kind: "paragraph", text: textOf(lines.slice(at, end)), end };
}

function textOf(lines) {
  return lines.map((line) => line.trim()).join("\n");
}

// -- nodes -----------------------------------------------------------------------------------------------------------

const NODES = {
  // An answer stands below the page's own headings.
  heading: (block, live) => el(`h${Math.min(block.level + 2, 6)}`, { class: `h${block.level}`, dir: "auto" },
    inline(block.text, { live })),
  paragraph: (block, live) => el("p", { dir: "auto" }, inline(block.text, { live })),
  rule: () => el("hr"),
  quote: (block, live) => el("blockquote", { dir: "auto" }, nodes(block.blocks, live)),
  code: codeNode,
  list: listNode,
  table: tableNode,
};

function nodes(blocks, live) {
  return blocks.map((block, nth) => NODES[block.kind](block, live && nth === blocks.length - 1));
}

function codeNode({ language, text }) {
  return el("figure", { class: "code", dir: "ltr" },
    el("figcaption", {}, el("span", {}, language || "text"), copyButton(() => text, "Copy code")),
    el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, highlighted(text, language))));
}

function listNode({ ordered, first, loose, items }, live) {
  const list = el(ordered ? "ol" : "ul", { dir: "auto", start: ordered && first !== 1 ? first : null });
  items.forEach((item, nth) => list.append(itemNode(item, loose, live && nth === items.length - 1)));
  return list;
}

function itemNode({ done, blocks }, loose, live) {
  const node = el("li", { class: done === null ? "" : "task" });
  const label = done ? "done" : "to do";
  if (done !== null) node.append(el("span", { role: "img", "aria-label": label }, done ? "☑" : "☐"), " ");
  blocks.forEach((block, nth) => {
    const growing = live && nth === blocks.length - 1;
    if (block.kind === "paragraph" && !loose) for (const part of inline(block.text, { live: growing })) node.append(part);
    else node.append(NODES[block.kind](block, growing));
  });
  return node;
}

function tableNode({ align, head, rows }) {
  const row = (tag, texts) => el("tr", {}, texts.map((text, nth) =>
    el(tag, { class: align[nth] ? `align-${align[nth]}` : null }, inline(text))));
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    el("table", { dir: "auto" },
      el("thead", {}, row("th", head)), el("tbody", {}, rows.map((texts) => row("td", texts)))));
}

// -- a text that grows -----------------------------------------------------------------------------------------------

/** Shows a Markdown text that grows in `root`. Only what can still change is made anew: the last block, as a rule. */
export class GrowingMarkdown {
  constructor(root) {
    this.root = root;
    this.settled = 0; // up to here the text is shown for good
    this.open = []; // the nodes of what comes after
  }

  /** Show `text`, which begins with what was shown before. `live` says that more of it will come. */
  show(text, live = false) {
    const raw = text.slice(this.settled).split("\n");
    const blocks = blocksOf(raw.map((line) => line.replace(/\r$/, "")));
    const fresh = nodes(blocks, live);
    for (const node of this.open) node.remove();
    for (const node of fresh) this.root.append(node);
    const keep = openFrom(blocks, raw.length);
    this.open = fresh.slice(keep);
    if (keep) this.settled += offsetOf(raw, blocks[keep].line);
  }
}

/** The number of blocks that no further text can change. */
function openFrom(blocks, lines) {
  // What a line begins is certain when the line is whole. Until then it may still belong to the block before it.
  const last = blocks.length - 1;
  const whole = last >= 0 && blocks[last].line < lines - 1;
  return Math.max(0, whole ? last : last - 1);
}

function offsetOf(lines, line) {
  return lines.slice(0, line).reduce((sum, text) => sum + text.length + 1, 0);
}
