// The open comparison as a table of its scores, and as text to copy in TSV or LaTeX.

/** The scores of the current units as a table, filled when it is open. */
function showTable() {
  byId("table").open = state.table === "1";
  if (state.table !== "1") return;
  const kept = keptOf(open), known = "known" in channels;
  const names = ["response", "no.", state.unit, ...scorers, "selected", ...(known ? ["known"] : [])];
  byId("table-about").textContent = pooledHow() ? `Each score is ${pooledHow()}.` : "";
  byId("table-head").replaceChildren(...names.map((name) => element("th", { scope: "col", textContent: name })));
  byId("table-rows").replaceChildren(...open.responses.flatMap((response, side) => {
    const pooled = scorers.map((name) => pooledUnits(response, channels[name], state.unit, state.pool));
    return pooled[0].map(({ groups, places }, number) => {
      const eos = isClosing(response, places[0]);
      const text = eos ? data.names[response.ids[places[0]]] || "eos" : quoted(response, groups);
      const part = places.filter((i) => kept[side][i]).length;
      const value = known ? [shown(pool(places.map((i) => response.values.known[i]), "mean"), 2, "known")] : [];
      const cells = [String(number + 1), text, ...pooled.map((units, k) => shown(units[number].value, 3, scorers[k])),
        places.length === 1 ? (part ? "yes" : "no") : `${part} of ${places.length}`, ...value];
      return element("tr", {}, element("th", { scope: "row", textContent: SIDES[side] }),
        ...cells.map((cell) => visible(element("td", { dir: "auto" }), cell)));
    });
  }));
}

/** All tokens with their raw numbers, tab-separated, below a header line. */
function asTsv() {
  const names = data.channels.filter(({ kind }) => kind !== "noise").map(({ name }) => name);
  const kept = keptOf(open);
  const escaped = (text) => text.replace(/[\\\t\n\r]/g, (char) => ({ "\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r" })[char]);
  const lines = open.responses.flatMap((response, side) => Array.from(response.ids, (id, i) => {
    const text = isClosing(response, i) ? data.names[id] || "" : pieceOf(response, i);
    const numbers = names.map((name) => Number(response.values[name][i].toPrecision(7)));
    return [SIDES[side], i + 1, id, escaped(text), ...numbers, kept[side][i] ? 1 : 0];
  }));
  return [["response", "position", "id", "token", ...names, "selected"], ...lines].map((line) => line.join("\t")).join("\n") + "\n";
}

const LATEX = {
  "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
  "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "{": "\\{", "}": "\\}", $: "\\$", "&": "\\&", "#": "\\#", _: "\\_", "%": "\\%",
};
const INKS = { up: [63, 143, 214], down: [240, 138, 36] }; // as on the light page

function inLatex(text) {
  return text.replace(/[\\~^{}$&#_%<>|]/g, (char) => LATEX[char]);
}

/** A token on its background. White space around it stays outside the box, so that lines can break there. */
function latexToken(text, shade, kept) {
  const [, before, core, after] = /^(\s*)(.*?)(\s*)$/s.exec(text);
  const space = (gap) => (gap.includes("\n") ? "\\par\n" : gap && " ");
  const share = Math.min(Math.abs(shade) || 0, 1), ink = INKS[shade > 0 ? "up" : "down"];
  const ground = ink.map((part) => Math.round(share * part + (1 - share) * 255));
  const body = core ? inLatex(core.replace(/\s+/g, " ")) : before.includes("\n") ? "$\\hookleftarrow$" : "~";
  const box = `\\tokenscore{${ground}}{${kept ? `\\underline{${body}}` : body}}`;
  return core ? space(before) + box + space(after) : box + (before.includes("\n") ? "\\par\n" : "\\allowbreak ");
}

/** The open comparison with its current shades, and a macro for them. Selected tokens are underlined. */
function asLatex() {
  const kept = keptOf(open), { zero } = channels[state.scorer], limit = limitOf(channels[state.scorer]);
  const scale = state.scale === "run" ? `strongest at a distance of ${shown(limit)}` : `scale: ${state.scale}`;
  const parts = SIDES.map((side, number) => {
    const response = open.responses[number];
    const tokens = shaded(number, state.scorer).flatMap(({ groups, shade }) => groups.map((group) => {
      const places = response.groups[group], eos = isClosing(response, places[0]);
      const text = eos ? data.names[response.ids[places[0]]] || "eos" : places.map((i) => pieceOf(response, i)).join("");
      return latexToken(text, shade, places.some((i) => kept[number][i]));
    }));
    return `\\noindent\\textbf{${NAMES[number]}} (${shown(total(response.values[state.scorer]))})\\par\n\\noindent ${tokens.join("")}\\par\n`;
  });
  return [
    "% \\usepackage{xcolor}",
    `% ${state.scorer}${pooledHow() && `, ${pooledHow()}`}: blue raises, orange lowers, no colour at ${shown(zero)}, ${scale}; underlined: selected`,
    "\\newcommand{\\tokenscore}[2]{{\\setlength{\\fboxsep}{1pt}\\colorbox[RGB]{#1}{\\strut #2}}}",
    ...open.prompt.map(({ role, content }) => `\\noindent\\textbf{${inLatex(role)}} ${inLatex(content)}\\par\n`),
    ...parts,
  ].join("\n").replaceAll("−", "-");
}

/** Copy text to the clipboard. If the browser does not allow it, the text is shown and selected. */
async function copy(name, text) {
  const box = byId("copied");
  box.hidden = false;
  box.value = text;
  box.focus();
  box.select();
  let message = `${name} copied.`;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or no clipboard on a page of this kind
    message = `${name} is selected below: copy it with Ctrl-C.`;
  }
  byId("copy-status").textContent = message;
}
