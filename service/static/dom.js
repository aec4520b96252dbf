/** The few helpers every part of the page uses. */

export const byId = (id) => document.getElementById(id);

/** Makes an element: properties by name, data attributes under `data`, children as nodes or text. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** The class that tints an element in an expert's colour; the number beside it says the rest. */
export function tint(expert) {
  return `t${expert % 8}${Math.floor(expert / 8) % 2 ? " second" : ""}`;
}

export const percent = (share) => `${Math.round(share * 100)}\u202f%`;
