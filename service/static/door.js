/** Waits until the service is ready to write, and asks the reader for its key where it wants one. */

import { byId } from "./dom.js";
import { heldKey, holdKey } from "./key.js";
import { refusal } from "./reading.js";
import { fetchFacts } from "./service.js";

const PHASES = {
  loading: "The model is being loaded …",
  warming: "The model is being warmed up …",
  draining: "The service is shutting down.",
  failed: "The model could not be loaded; the service’s log says why.",
};

export class Door {
  /** say tells the reader a sentence, and whether it is of trouble. */
  constructor(say) {
    Object.assign(this, { say, hearKey: null });
    byId("ask").addEventListener("submit", (event) => [event.preventDefault(), this.hearKey?.()]);
  }

  /** What the service says of itself, once it can write. */
  async whenReady() {
    for (;;) {
      const info = await fetchFacts("info").catch(({ status }) => ({ phase: status === 401 ? "locked" : "silent" }));
      if (info.phase === "ready") return info;
      if (info.phase === "locked") {
        await this.askForKey(refusal());
        continue;
      }
      this.say(PHASES[info.phase] ?? "The service does not answer yet; trying again …", info.phase === "failed");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }

  /** Over when the reader has given a key; whether it is the right one, the next request tells. */
  async askForKey(words) {
    this.#lock(true, words);
    await new Promise((resolve) => (this.hearKey = resolve));
    holdKey(byId("key").value);
    byId("ask").reset();
    this.say("Trying the key …");
  }

  open() {
    this.#lock(false, "Ready.");
  }

  /** The key's field takes the place of the buttons, and the focus if they had it; or the other way round. */
  #lock(isLocked, words) {
    const [gone, focused] = isLocked ? ["actions", "key"] : ["lock", "generate"];
    const hadFocus = byId(gone).contains(document.activeElement); // asked first: a disabled button may lose it at once
    byId("generate").disabled = isLocked;
    byId("lock").hidden = byId("actions").hidden = false;
    if (hadFocus) byId(focused).focus();
    byId(gone).hidden = true;
    this.say(words, isLocked && heldKey() !== "");
  }
}
