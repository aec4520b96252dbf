/** The card beside a letter: its experts and gate weights in every layer. Follows the pointer and the arrow keys. */

import { make, percent, tint } from "./dom.js";
import { ranked } from "./text.js";

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
const NAMES = { " ": "space", "\n": "line break" };

export class Card {
  constructor(element, told, text) {
    Object.assign(this, { element, told, text, index: -1 });
    const { container } = text;
    container.addEventListener("pointerover", ({ target }) => this.open(Number(target.dataset.index ?? -1)));
    container.addEventListener("pointerleave", () => this.close());
    container.addEventListener("blur", () => this.close());
    container.addEventListener("scroll", () => this.element.hidden || this.#place());
    container.addEventListener("keydown", (event) => this.#step(event));
  }

  open(index) {
    this.close();
    if (!(index >= 0 && index < this.text.numShown)) return;
    this.index = index;
    const token = this.text.tokens[index];
    const rows = token.routed_experts.map((_, layer) => this.#row(token, layer));
    this.element.replaceChildren(make("h2", {}, title(token)), ...rows);
    this.element.hidden = false;
    token.letter.dataset.current = "";
    this.#place();
  }

  close() {
    delete this.text.tokens[this.index]?.letter?.dataset.current;
    this.element.hidden = true;
  }

  #step(event) {
    const step = STEPS[event.key];
    const { numShown, tokens, layer } = this.text;
    if (!step || !numShown || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(numShown - 1, this.index + step));
    tokens[index].letter.scrollIntoView({ block: "nearest" });
    this.open(index);
    const experts = ranked(tokens[index], layer).map(([expert, weight]) => `expert ${expert} ${percent(weight)}`);
    this.told.textContent = `${title(tokens[index])}: ${experts.join(", ")} in layer ${layer}`;
  }

  #row(token, layer) {
    const parts = ranked(token, layer).map(([expert, weight]) => {
      const part = make("span", { className: tint(expert) }, make("b", {}, expert), percent(weight));
      part.style.flexGrow = weight;
      return part;
    });
    const row = make("div", { className: "row" }, `Layer ${layer}`, make("div", { className: "bar" }, ...parts));
    row.classList.toggle("chosen", layer === this.text.layer);
    return row;
  }

  #place() {
    const { left, top, bottom } = this.text.tokens[this.index].letter.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    style.left = `${Math.max(8, Math.min(left - 24, document.documentElement.clientWidth - width - 8))}px`;
    style.top = `${bottom + height + 16 < innerHeight ? bottom + 8 : Math.max(8, top - height - 8)}px`;
  }
}

const title = ({ text, index }) => `${NAMES[text] ?? `“${text}”`}, token ${index + 1}`;
