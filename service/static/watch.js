/** Asks what the server's experts do, again and again, for as long as somebody looks. */

import { fetchFacts } from "./service.js";

const WINDOW_S = 60;
const PAUSE_MS = 2000;

export class Watch {
  /** isWanted says whether to ask; show is given counts by layer and expert, or null, and words where there is trouble. */
  constructor(isWanted, show) {
    Object.assign(this, { isWanted, show, turn: null });
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** To be called when what isWanted says may have changed. */
  async look() {
    clearTimeout(this.turn?.timer);
    const turn = (this.turn = {});
    if (!this.isWanted() || document.hidden) return;
    this.show(...(await ask()));
    if (turn === this.turn) turn.timer = setTimeout(() => this.look(), PAUSE_MS);
  }
}

async function ask() {
  try {
    const { layers } = await fetchFacts(`experts?window=${WINDOW_S}`);
    const counts = layers.map(({ prefill, decode }) => prefill.map((count, expert) => count + decode[expert]));
    return [counts, layers.some((layer) => layer.routed_tokens) ? "" : "The server has done nothing in the last minute."];
  } catch {
    return [null, "The server does not tell at the moment; asking again …"];
  }
}
