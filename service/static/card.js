/** The card beside a letter: its experts and gate weights in every layer, and what else might have stood there. */

import { make, nameOf, percent, signOf, tint } from "./dom.js";
import { ranked } from "./text.js";

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

/** Follows the pointer and the arrow keys over one text; several texts may share the element. */
export class Card {
  constructor(element, told, text) {
    Object.assign(this, { element, told, text, index: -1, token: undefined });
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
    const token = this.text.tokens[index];
    Object.assign(this, { index, token });
    const rows = token.routed_experts.map((_, layer) => this.#row(token, layer));
    this.element.replaceChildren(make("h2", {}, title(token)), ...rows, ...alternatives(token));
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
    const from = tokens[this.index] === this.token ? this.index : -1; // another text begins anew
    const index = Math.max(0, Math.min(numShown - 1, from + step));
    tokens[index].letter.scrollIntoView({ block: "nearest" });
    this.open(index);
    const experts = ranked(tokens[index], layer).map(([expert, weight]) => `expert ${expert} ${percent(weight)}`);
    const likely = (tokens[index].top_logprobs ?? []).map((each) => `${nameOf(each.text)} ${chance(each)}`);
    const odds = likely.length ? `; likeliest here: ${likely.join(", ")}` : "";
    this.told.textContent = `${title(tokens[index])}: ${experts.join(", ")} in layer ${layer}${odds}`;
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
    const { letter } = this.text.tokens[this.index] ?? {};
    if (letter?.dataset.current === undefined) return; // the card is another text's by now
    const { left, top, bottom } = letter.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    style.left = `${Math.max(8, Math.min(left - 24, document.documentElement.clientWidth - width - 8))}px`;
    style.top = `${bottom + height + 16 < innerHeight ? bottom + 8 : Math.max(8, top - height - 8)}px`;
  }
}

/** The likeliest tokens of this place, before temperature and filters; the one that was drawn stands out. */
function alternatives({ token_id, top_logprobs = [], ...drawn }) {
  if (!top_logprobs.length) return [];
  const isAmong = top_logprobs.some((each) => each.token_id === token_id);
  const shown = isAmong ? top_logprobs : [...top_logprobs, { token_id, ...drawn }];
  const items = shown.map((each) => {
    const item = make("li", {}, make("b", {}, signOf(each.text)), chance(each));
    item.classList.toggle("drawn", each.token_id === token_id);
    return item;
  });
  return [make("h3", {}, "Likeliest here"), make("ul", { className: "likely" }, ...items)];
}

function chance({ logprob }) {
  const share = Math.exp(logprob);
  return share < 0.005 ? "<\u202f1\u202f%" : percent(share);
}

const title = ({ text, index }) => `${nameOf(text)}, token ${index + 1}`;
