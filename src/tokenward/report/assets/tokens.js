// Responses as text with shaded tokens.

const LEVELS = 10;
// Characters that are invisible or change the direction of text are shown as a mark with their name.
const HIDDEN = /([\u0000-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;
const HIDDEN_OR_SPACE = new RegExp(HIDDEN.source.replace("[", "[ "));
const MARKS = { "\n": "↵", "\t": "⇥" };

function unpack(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer);
}

/** A response with unpacked numbers, and with tokens grouped into whole characters. */
function unpacked(raw) {
  const response = { text: raw.text, eos: raw.eos, values: {} };
  response.ids = unpack(raw.ids, Int32Array);
  response.ends = unpack(raw.ends, Int32Array);
  if (raw.starts) response.starts = unpack(raw.starts, Int32Array);
  if (raw.joint) response.joint = unpack(raw.joint, Int32Array);
  response.breaks = unpack(raw.breaks, Uint8Array);
  for (const name in raw.values) response.values[name] = unpack(raw.values[name], Float32Array);
  response.groups = groupsOf(response);
  let word = -1;
  response.wordOf = Array.from(response.breaks, (bits, i) => (isClosing(response, i) ? -1 : (word += bits & 1)));
  response.twins = new Map(); // from the number of a word to that of the same word in the other response
  return response;
}

/** A pair whose responses know which words they share. */
function withTwins(pair) {
  const [one, other] = pair.responses;
  for (const [first, second, count] of pair.shared) {
    for (let k = 0; k < count; k++) {
      one.twins.set(first + k, second + k);
      other.twins.set(second + k, first + k);
    }
  }
  return pair;
}

/** The tokens of a word, as places. */
function wordPlaces(response, word) {
  return [...response.wordOf.keys()].filter((i) => response.wordOf[i] === word);
}

function pieceOf(response, i) {
  return response.text.slice(startOf(response, i), response.ends[i]);
}

function endBefore(response, i) {
  return i ? response.ends[i - 1] : 0;
}

/** The start of a token: the end of the token before it, unless there is context between them. */
function startOf(response, i) {
  return response.starts ? Math.max(response.starts[i], endBefore(response, i)) : endBefore(response, i);
}

/** Text before a token that the model reads but that is not scored, such as a message of others. */
function contextBefore(response, i) {
  return response.text.slice(endBefore(response, i), startOf(response, i));
}

function isClosing(response, i) {
  return i >= response.ids.length - response.eos;
}

/** Groups of tokens that share a character: lists of positions, in order. */
function groupsOf(response) {
  const groups = [];
  let shown = true;
  for (let i = 0; i < response.ids.length; i++) {
    const piece = pieceOf(response, i), last = groups[groups.length - 1];
    const joins = last && !isClosing(response, i) && (piece === "" || !shown);
    if (joins) last.push(i);
    else groups.push([i]);
    shown = (joins && shown) || piece !== "" || isClosing(response, i);
  }
  return groups;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawing(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  made.textContent = text;
  return made;
}

/** Add text with marks for invisible characters, never read as markup. Text without marks stays one node, for speed. */
function visible(target, text, dots = false) {
  text.split(dots ? HIDDEN_OR_SPACE : HIDDEN).forEach((part, place) => {
    if (place % 2 === 0) { if (part) target.append(part); }
    else if (part in MARKS) target.append(element("span", { className: "mark", textContent: MARKS[part] }), part);
    else if (part === " ") target.append(element("span", { className: "dot", textContent: " " }));
    else target.append(element("span", { className: "pill", textContent: codeOf(part) }));
  });
  return target;
}

function codeOf(char) {
  return `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** CSS classes of a shade: its direction and strength, and whether it is beyond the scale. */
function shadeClasses(shade) {
  const level = Math.min(Math.round(Math.abs(shade) * LEVELS), LEVELS);
  if (!level) return [];
  const clipped = Math.abs(shade) > 1 + 1e-6 ? ["clipped"] : [];
  return [shade > 0 ? "up" : "down", `l${level}`, ...clipped];
}

/** The tokens of a response as spans, one per group, with the number of the group in `data-group`. */
function tokenSpans(response, names, dots) {
  return response.groups.map((group, number) => {
    const span = element("span", { className: "token", tabIndex: -1 });
    span.dataset.group = number;
    if (isClosing(response, group[0])) {
      span.className = "token pill";
      span.textContent = names[response.ids[group[0]]] || `[${response.ids[group[0]]}]`;
    } else {
      visible(span, group.map((i) => pieceOf(response, i)).join(""), dots);
    }
    return span;
  });
}

/** The spans of a response's tokens, with the context between them. */
function withContext(response, spans) {
  return response.groups.flatMap(([first], number) => {
    const text = contextBefore(response, first);
    if (!text) return [spans[number]];
    const title = first ? "context, read but not scored" : "written by the chat template before the reply, read but not scored";
    return [visible(element("span", { className: "context", title }), text), spans[number]];
  });
}

const SPACED_WORD = /^ \S{1,30}$/;

/** Spans in one block per line, so that a browser draws only what is near the screen. */
function inParagraphs(spans) {
  const paragraphs = [[]];
  for (const span of spans) {
    // Break before a word's space, not after it: otherwise half of the word's frame would stay on the line above.
    if (SPACED_WORD.test(span.textContent)) {
      span.classList.add("whole");
      paragraphs[paragraphs.length - 1].push(element("wbr"));
    }
    paragraphs[paragraphs.length - 1].push(span);
    if (span.textContent.endsWith("\n")) paragraphs.push([]);
  }
  return paragraphs.map((part) => element("div", { className: "paragraph" }, ...part));
}
