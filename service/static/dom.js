/** The few helpers every part of the page uses. */

export const byId = (id) => document.getElementById(id);

/** Makes an element: properties by name, data attributes under `data`, children as nodes or text. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** One choice of several, as a round field that looks like a button. */
export function choice(name, value, words, onChoose) {
  const input = make("input", { type: "radio", name, value, id: `${name}-${value}` });
  input.addEventListener("change", () => onChoose(value));
  return make("label", { className: "choice" }, input, make("span", {}, words));
}

/** The class that tints an element in an expert's colour; the number beside it says the rest. */
export function tint(expert) {
  return `t${expert % 8}${Math.floor(expert / 8) % 2 ? " second" : ""}`;
}

export const percent = (share) => `${Math.round(share * 100)}\u202f%`;

// Maps, since a token may be called constructor.
const NAMES = new Map([[" ", "space"], ["\n", "line break"], ["", "part of a character"]]);
const SIGNS = new Map([[" ", "\u2423"], ["\n", "\u21b5"], ["", "\u2026"]]);

/** A token in words, and in as little room as it takes. Isolated: it may turn the direction of writing. */
export const nameOf = (text) => NAMES.get(text) ?? `“\u2068${text}\u2069”`;
export const signOf = (text) => SIGNS.get(text) ?? text;
