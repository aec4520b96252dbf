/** A text, letter by letter: shows, tints, and remembers every layer's experts. Knows nothing of HTTP. */

import { make, tint } from "./dom.js";

export class Text {
  constructor(container) {
    Object.assign(this, { container, layer: 0, tokens: [], numShown: 0 });
  }

  begin(prompt) {
    this.line = make("div", {}, make("span", { className: "given" }, prompt));
    Object.assign(this, { tokens: [], numShown: 0 });
    this.container.replaceChildren(this.line);
  }

  /** Shows the tokens that came since the last call, and follows the end if the reader is there. */
  show() {
    const { scrollTop, clientHeight, scrollHeight } = this.container;
    for (const token of this.tokens.slice(this.numShown)) {
      token.letter = make("span", { data: { index: token.index } }, token.text);
      this.#tint(token);
      this.line.append(token.letter);
      // Without an element for each line the browser would lay out the whole text anew with every letter.
      if (token.text.endsWith("\n")) this.container.append((this.line = make("div")));
    }
    this.numShown = this.tokens.length;
    if (scrollTop + clientHeight > scrollHeight - 60) this.container.scrollTop = this.container.scrollHeight;
  }

  /** Takes the last token back, which is shown. */
  dropLast() {
    this.tokens.pop().letter.remove();
    this.numShown = this.tokens.length;
  }

  setLayer(layer) {
    this.layer = layer;
    for (const token of this.tokens.slice(0, this.numShown)) this.#tint(token);
  }

  #tint(token) {
    const [[expert]] = ranked(token, this.layer);
    token.letter.className = `letter ${tint(expert)}${token.text.endsWith("\n") ? " break" : ""}`;
    token.letter.dataset.expert = expert;
  }
}

/** A token's [expert, gate weight] pairs in a layer, the largest weight first. */
export function ranked({ routed_experts, expert_weights }, layer) {
  const pairs = routed_experts[layer].map((expert, place) => [expert, expert_weights[layer][place]]);
  return pairs.sort(([, a], [, b]) => b - a);
}

const SENTENCES = /^[^]*(?:[.!?]["')]*\s|\n\n)/;
const WORDS = /^[^]*\s|^[^]+/;
const LONGEST = 500; // letters without a sentence's end, past which a listener is told words, and searching would be slow

/** Hands whole sentences to a live region: a screen reader should not be told letters. */
export class Speaker {
  constructor(region) {
    Object.assign(this, { region, rest: "" });
  }

  begin() {
    this.rest = "";
    this.region.replaceChildren();
  }

  hear(text) {
    this.rest += text;
    this.#say((this.rest.length > LONGEST ? WORDS : SENTENCES).exec(this.rest)?.[0]);
  }

  finish() {
    this.#say(this.rest);
  }

  #say(words = "") {
    if (words) this.region.append(make("p", {}, words));
    this.rest = this.rest.slice(words.length);
  }
}
