/** Layers by experts, one grid for four views: a text's work, the server's, what silence costs, what each likes. */

import { make, nameOf, percent, signOf, tint } from "./dom.js";

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const MANY = 10; // experts past which a cell has no room for words

export const nameOfExpert = ([layer, expert]) => `expert ${expert} of layer ${layer}`;

export class Heatmap {
  /** silenced has pairs as "layer.expert"; onDescribe is told what the reader points at, and whether by the keyboard. */
  constructor({ table, legend, silenced, onPick, onSilence, onDescribe }) {
    Object.assign(this, { table, legend, silenced, onDescribe, layer: 0, view: "text", shares: {}, report: {} });
    const at = ({ target }) => this.places.get(target.closest("button"));
    table.addEventListener("click", (event) => {
      const layer = event.target.closest("tbody tr")?.sectionRowIndex;
      if (layer !== undefined) onPick(layer);
      if (at(event)) onSilence(...at(event));
    });
    table.addEventListener("keydown", (event) => this.#step(event, at(event)));
    table.addEventListener("focusin", (event) => at(event) && this.#enter(at(event)));
    table.addEventListener("pointerover", (event) => onDescribe(at(event), false));
    table.addEventListener("pointerleave", () => onDescribe(undefined, false));
    table.addEventListener("focusout", () => onDescribe(undefined, false));
  }

  build({ num_layers, num_experts }, report) {
    const experts = [...Array(num_experts).keys()];
    Object.assign(this, { report, places: new Map(), numExperts: num_experts });
    this.cells = Array.from({ length: num_layers }, (_, layer) => experts.map((expert) => this.#button(layer, expert)));
    this.percents = experts.map(() => make("span"));
    const entry = (expert) => make("li", { className: tint(expert) }, make("b", {}, expert), this.percents[expert]);
    this.entries = experts.map(entry);
    this.rows = this.cells.map((cells, layer) => {
      const head = make("th", { scope: "row", title: `Show layer ${layer}` }, layer);
      return make("tr", {}, head, ...cells.map((cell) => make("td", {}, cell)));
    });
    const heads = ["Layer", ...experts].map((title) => make("th", { scope: "col" }, title));
    this.table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...this.rows));
    this.legend.replaceChildren(...this.entries);
    this.cells[0][0].tabIndex = 0;
    const costs = report.causal_map?.cost.flat() ?? [];
    this.highestRise = Math.max(...costs.map(Math.expm1), 1e-9);
    this.clear();
  }

  /** Tokens by layer and expert, of the text or of the server. */
  setCounts(name, counts) {
    this.shares[name] = counts.map((row) => sharesOf(row, this.numExperts));
    if (name === this.view) this.#paint();
    if (name === "text") this.#paintLegend();
  }

  /** No text has been written yet. */
  clear() {
    this.setCounts("text", this.cells.map(() => []));
  }

  setView(view) {
    this.view = view;
    this.#paint();
  }

  setLayer(layer) {
    this.layer = layer;
    this.rows.forEach((row, index) => row.classList.toggle("chosen", index === layer));
    this.#paintLegend();
  }

  /** After a change of the silenced ones. */
  showSilenced() {
    for (const [cell, place] of this.places) cell.setAttribute("aria-pressed", this.silenced.has(place.join(".")));
    this.#paintLegend();
  }

  /** All that is known of an expert, in a sentence. */
  describe(layer, expert) {
    const facts = [`${percent(this.shares.text[layer][expert])} of this text’s work`];
    if (this.shares.server) facts.push(`${percent(this.shares.server[layer][expert])} of the server’s`);
    const liked = this.report.favourites?.[layer][expert].map(({ token }) => nameOf(token));
    if (liked?.length) facts.push(`likes ${liked.join(", ")}`);
    const cost = this.costInWords(layer, expert);
    if (cost) facts.push(cost);
    const silent = this.silenced.has(`${layer}.${expert}`) ? ", silenced" : "";
    return `Expert ${expert} of layer ${layer}${silent}: ${facts.join("; ")}.`;
  }

  costInWords(layer, expert) {
    const { cost, standard_error } = this.report.causal_map ?? {};
    if (!cost) return "";
    const isNoise = isChance(cost[layer][expert], standard_error[layer][expert]);
    const found = `perplexity by ${rise(cost[layer][expert])}\u202f%`;
    return isNoise ? `silencing it moves ${found}, which may be chance` : `silencing it raises ${found}`;
  }

  #button(layer, expert) {
    const label = `Expert ${expert} of layer ${layer}`;
    const button = make("button", { type: "button", tabIndex: -1, ariaLabel: label, ariaPressed: "false" });
    this.places.set(button, [layer, expert]);
    return button;
  }

  #paint() {
    const show = { text: this.#share, server: this.#share, cost: this.#cost, likes: this.#likes }[this.view];
    for (const [cell, [layer, expert]] of this.places) {
      const { words, heat, isFaint = false } = show.call(this, layer, expert);
      if (cell.textContent !== words) cell.textContent = words;
      if (cell.heat !== heat) cell.style.setProperty("--heat-share", (cell.heat = heat));
      cell.classList.toggle("faint", isFaint);
    }
    this.table.dataset.view = this.view;
  }

  #share(layer, expert) {
    const share = this.shares[this.view]?.[layer][expert] ?? 0;
    // Full colour at two and a half times the fair share: balance looks even, an excess stands out.
    const heat = Math.min(1, Math.round((share * this.numExperts * 100) / 2.5) / 100);
    return { words: share && this.numExperts <= MANY ? `${Math.round(share * 100)}` : "", heat };
  }

  #cost(layer, expert) {
    const { cost, standard_error } = this.report.causal_map;
    const isFaint = isChance(cost[layer][expert], standard_error[layer][expert]);
    const heat = Math.max(0, Math.expm1(cost[layer][expert]) / this.highestRise);
    return { words: this.numExperts <= MANY ? rise(cost[layer][expert]) : "", heat: isFaint ? 0 : heat, isFaint };
  }

  #likes(layer, expert) {
    const signs = this.report.favourites[layer][expert].slice(0, 3).map(({ token }) => signOf(token));
    return { words: this.numExperts <= MANY ? signs.join("\u200a") : "", heat: 0 };
  }

  #paintLegend() {
    this.shares.text[this.layer].forEach((share, expert) => {
      const isSilent = this.silenced.has(`${this.layer}.${expert}`);
      this.percents[expert].textContent = isSilent ? "silent" : share ? percent(share) : "";
      this.entries[expert].classList.toggle("silent", isSilent);
    });
  }

  #enter([layer, expert]) {
    for (const cell of this.places.keys()) if (cell.tabIndex === 0) cell.tabIndex = -1;
    this.cells[layer][expert].tabIndex = 0;
    this.onDescribe([layer, expert], true);
  }

  #step(event, place) {
    const step = STEPS[event.key];
    if (!place || !step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.cells[place[0] + step[0]]?.[place[1] + step[1]]?.focus();
  }
}

function sharesOf(row, numExperts) {
  const total = row.reduce((sum, count) => sum + count, 0);
  return Array.from({ length: numExperts }, (_, expert) => (row[expert] ?? 0) / (total || 1));
}

/** A cost in nats per token as a rise of perplexity, in percent. */
const rise = (cost) => (100 * Math.expm1(cost)).toFixed(1).replace("-0.0", "0.0").replace("-", "\u2212");

const isChance = (cost, error) => error === null || Math.abs(cost) < 2 * error;
