/** One text on the page and the request that writes it: over lost connections, to its end, and on from there. */

import { heldKey } from "./key.js";
import { Trouble } from "./service.js";
import { survivingStream } from "./stream.js";

export class Reading {
  /** page is told what happens: began, started, wrote, drew, ended, said, locked. */
  constructor(text, page) {
    Object.assign(this, { text, page, request: null });
    this.forget();
  }

  get isRunning() {
    return this.request !== null;
  }

  /** What was asked for, with its seed once that is known; null where there is no text. */
  get body() {
    return this.place?.body ?? null;
  }

  get numTokens() {
    return this.text.tokens.length;
  }

  get canGoOn() {
    return !this.isRunning && this.numTokens > 0 && !this.isOver;
  }

  /** Leaves what is being written, and has no text any more. */
  forget() {
    this.request?.controller.abort();
    this.text.container.classList.remove("writing");
    Object.assign(this, { request: null, place: null, words: "", isTrouble: false, isOver: false });
    Object.assign(this, { counts: null, numRouted: null, askedAt: 0, firstAt: 0, pace: null, tokensPerS: null });
  }

  /** The same, seen. */
  clear() {
    this.forget();
    this.text.begin("");
  }

  write(body) {
    this.forget();
    this.place = { body, id: null, numTokens: 0, hasBegun: false };
    this.askedAt = performance.now();
    this.text.begin(body.prompt);
    this.page.began(this);
    return this.#read("Waiting for the first token …");
  }

  /** Goes on as if the text had been asked for in this length: the place and the seed make it the same text. */
  goOn(numTokens) {
    this.place = { ...this.place, body: { ...this.place.body, max_new_tokens: numTokens }, hasBegun: false };
    this.numRouted = null;
    // A text that ends inside a character ends in U+FFFD. Longer it has the character, so that token is asked for again.
    if (this.text.tokens.at(-1).text.endsWith("\ufffd")) {
      this.text.dropLast();
      const [fingerprint] = this.place.id.split(":");
      Object.assign(this.place, { numTokens: this.numTokens, id: `${fingerprint}:${this.numTokens - 1}` });
    }
    return this.#read("Going on …");
  }

  stop() {
    if (!this.isRunning) return;
    this.request.controller.abort();
    this.#end(`Stopped after ${this.numTokens} tokens.`);
  }

  async #read(words) {
    const request = (this.request = { controller: new AbortController() });
    this.pace = null;
    this.text.container.classList.add("writing");
    this.#say(words);
    try {
      for await (const { name, data } of survivingStream(this.place, request.controller.signal, () => this.#lose())) {
        if (this.request === request) this.#on[name]?.(data);
        if (this.request !== request) return;
      }
    } catch (error) {
      if (this.request !== request) return;
      this.#end(this.#inWords(error), true);
      if (error.status === 401) this.page.locked(this.words);
    }
  }

  #on = {
    start: ({ prompt_used = this.body.prompt }) => {
      this.text.begin(prompt_used);
      this.page.started(this, prompt_used);
    },

    token: (token) => {
      const now = performance.now();
      this.firstAt ||= now;
      this.pace ??= { index: token.index, at: now };
      this.counts ??= token.routed_experts.map(() => []);
      this.text.tokens.push(token);
      token.routed_experts.forEach((experts, layer) => experts.forEach((expert) => this.#count(layer, expert)));
      this.page.wrote(this, token);
      this.frame ??= requestAnimationFrame(() => this.#draw());
      this.#say("Writing …");
    },

    done: ({ finish_reason, timings, routing }) => {
      Object.assign(this, { isOver: finish_reason === "eos", counts: routing.counts, numRouted: routing.tokens });
      this.pace = null;
      this.tokensPerS = timings.tokens_per_s ?? this.tokensPerS;
      const isLate = finish_reason === "timeout";
      this.#end(isLate ? "The time for this request was over; the text ends here." : "Done.", isLate);
    },

    error: ({ error }) => this.#end(`${new Trouble(error.message).message} The text ends here.`, true),
  };

  #count(layer, expert) {
    this.counts[layer][expert] = (this.counts[layer][expert] ?? 0) + 1;
  }

  /** Once a frame while tokens come: all that arrived meanwhile is shown together. */
  #draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.text.show();
    const seconds = this.pace ? (performance.now() - this.pace.at) / 1000 : 0;
    if (seconds > 0.2) this.tokensPerS = (this.numTokens - 1 - this.pace.index) / seconds;
    this.page.drew(this);
  }

  /** The connection was lost, and the next try is due in a moment. */
  #lose() {
    Object.assign(this, { pace: null, tokensPerS: null }); // measured anew: a gap is not slow writing
    this.#draw();
    this.#say(`${this.#lossInWords()}; picking it up again …`, true);
  }

  #end(words, isTrouble = false) {
    this.request = null;
    this.text.container.classList.remove("writing");
    this.#say(words, isTrouble);
    this.#draw();
    this.page.ended(this);
  }

  #say(words, isTrouble = false) {
    if (words === this.words) return;
    Object.assign(this, { words, isTrouble });
    this.page.said();
  }

  #inWords(error) {
    const known = error.status === 401 ? refusal() : error instanceof Trouble && error.message;
    const reason = known || "The service cannot be reached. Is it running?";
    const lead = this.place.hasBegun ? `${this.#lossInWords()}. ` : "";
    return this.numTokens ? `${lead}${reason} What arrived is kept.` : reason;
  }

  #lossInWords() {
    return `The connection was lost after ${this.numTokens} tokens`;
  }
}

export const refusal = () => (heldKey() ? "The server refuses this key." : "This server needs a key.");
