/** Two texts from one seed, with and without some experts: marks where they differ and says how much. */

import { percent } from "./dom.js";

export class Comparison {
  constructor(original, other) {
    Object.assign(this, { original, other, numCompared: 0 });
    this.begin();
  }

  begin() {
    for (const { letter } of this.original.tokens.slice(0, this.numCompared)) {
      for (const mark of ["differs", "fork"]) delete letter?.dataset[mark];
    }
    Object.assign(this, { numCompared: 0, numDifferent: 0, forkedAt: -1 });
  }

  /** Marks what both texts show by now and did not when last asked. */
  follow() {
    const end = Math.min(this.original.numShown, this.other.numShown);
    for (; this.numCompared < end; this.numCompared++) {
      const pair = [this.original, this.other].map((text) => text.tokens[this.numCompared]);
      if (pair[0].text === pair[1].text) continue;
      if (this.forkedAt < 0) pair.forEach(({ letter }) => (letter.dataset.fork = ""));
      this.forkedAt = this.forkedAt < 0 ? this.numCompared : this.forkedAt;
      this.numDifferent++;
      for (const { letter } of pair) letter.dataset.differs = "";
    }
  }

  /** Brings the place where they part into sight, in both. */
  showFork() {
    for (const { tokens, container } of [this.original, this.other]) {
      const { letter } = tokens[Math.max(this.forkedAt, 0)] ?? {};
      const [wanted, shown] = [letter, container].map((each) => each?.getBoundingClientRect().top);
      if (letter) container.scrollTop += wanted - shown - 80;
    }
  }

  inWords() {
    if (!this.numCompared) return "";
    if (this.forkedAt < 0) return `The two texts are the same, letter for letter, over ${this.numCompared} tokens.`;
    const after = this.numCompared - this.forkedAt;
    const start = this.forkedAt ? `The same for ${plural(this.forkedAt)}; of the ${after} from there on` : `Of ${after}`;
    return `${start}, ${percent(this.numDifferent / after)} differ (underlined).`;
  }
}

const plural = (count) => `${count} ${count === 1 ? "token" : "tokens"}`;
