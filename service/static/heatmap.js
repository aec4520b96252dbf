/** Layers by experts: the counts of one request as a table, and the chosen layer's row as the legend. */

import { make, percent, tint } from "./dom.js";

export class Heatmap {
  constructor(table, legend) {
    Object.assign(this, { table, legend, layer: 0 });
  }

  build({ num_layers, num_experts }) {
    const experts = [...Array(num_experts).keys()];
    this.cells = Array.from({ length: num_layers }, () => experts.map(() => make("td")));
    this.shares = experts.map(() => make("span"));
    const heads = ["Layer", ...experts].map((title) => make("th", { scope: "col" }, title));
    this.rows = this.cells.map((cells, layer) => make("tr", {}, make("th", { scope: "row" }, layer), ...cells));
    this.table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...this.rows));
    const entry = (expert) => make("li", { className: tint(expert) }, make("b", {}, expert), this.shares[expert]);
    this.legend.replaceChildren(...experts.map(entry));
    this.begin();
  }

  begin() {
    this.show(this.cells.map((cells) => cells.map(() => 0)));
  }

  /** Counts one token event. */
  add({ routed_experts }) {
    routed_experts.forEach((experts, layer) => experts.forEach((expert) => this.counts[layer][expert]++));
  }

  show(counts = this.counts) {
    this.counts = counts;
    counts.map(sharesOf).forEach((row, layer) => row.forEach((share, e) => paint(this.cells[layer][e], share, row.length)));
    this.setLayer(this.layer);
  }

  setLayer(layer) {
    this.layer = layer;
    this.rows.forEach((row, index) => row.classList.toggle("chosen", index === layer));
    sharesOf(this.counts[layer]).forEach((share, expert) => (this.shares[expert].textContent = share ? percent(share) : ""));
  }
}

function sharesOf(row) {
  const total = row.reduce((sum, count) => sum + count, 0);
  return row.map((count) => (total ? count / total : 0));
}

function paint(cell, share, numExperts) {
  cell.textContent = share ? Math.round(share * 100) : "";
  // Full colour at two and a half times the fair share: balance looks even, an excess stands out.
  cell.style.setProperty("--heat-share", Math.min(1, (share * numExperts) / 2.5));
}
