/** A stream that survives its server: asks again for what is missing until the text is whole. Knows nothing of the page. */

import { readEvents } from "./events.js";
import { openStream, Trouble } from "./service.js";

const PAUSES_MS = [500, 1000, 2000, 4000, 5000];
const LONGEST_ADVICE_MS = 10_000;
const PATIENCE_MS = 120_000;
const QUIET_MS = 60_000; // a server with nothing to say sends a comment every 15 s
const PASSING = ["shutdown", "internal", "stalled"]; // errors that another try may not meet

/**
 * Yields a request's events, every token once and in order, over as many connections as that takes; calls tellLoss before
 * each new try. place is {body, id, numTokens, hasBegun}: how far the text has come, from null and 0 on, and it moves along.
 * Throws Trouble when the text cannot go on, and whatever goes wrong before the first event, to begin or to go on, as it is.
 */
export async function* survivingStream(place, signal, tellLoss) {
  let numFailures = 0;
  let lostAt = 0;
  for (;;) {
    let advisedMs = 0;
    try {
      for await (const event of goOn(place, signal)) {
        yield event;
        if (event.name === "token") numFailures = 0;
        if (event.name === "done" || event.name === "error") return;
      }
    } catch (error) {
      if (signal.aborted || !place.hasBegun) throw error;
      if (error.status === 409) throw new Trouble("the server that came back would write another text");
      if (error.status < 500 && error.status !== 429) throw error;
      // A request that breaks every step would take its neighbours' texts along each time.
      if (error.message === "internal" && numFailures > 2) throw new Trouble("the server fails at it again and again");
      advisedMs = Math.min(error.retryAfterMs || 0, LONGEST_ADVICE_MS);
    }
    if (numFailures === 0) lostAt = performance.now();
    if (performance.now() - lostAt > PATIENCE_MS) throw new Trouble("it could not be picked up again for two minutes");
    tellLoss();
    await pause(Math.max(advisedMs, PAUSES_MS[numFailures] ?? PAUSES_MS.at(-1)), signal);
    numFailures++;
  }
}

/** One connection's events, from the place on, which moves along. Throws in whatever way the connection breaks. */
async function* goOn(place, signal) {
  const silence = new AbortController();
  let timer;
  const listen = () => [clearTimeout(timer), (timer = setTimeout(() => silence.abort(), QUIET_MS))];
  try {
    if (place.id) listen(); // a first request may wait in the queue for as long as the server lets it
    const stream = await openStream(place.body, AbortSignal.any([signal, silence.signal]), place.id);
    for await (const event of readEvents(stream)) {
      listen();
      if (event.data && follow(place, event)) yield event;
    }
  } finally {
    clearTimeout(timer);
  }
  throw new Error("the stream ended in the middle");
}

/** Moves the place along; false for an event that tells nothing new. */
function follow(place, { id, name, data }) {
  const isFirst = place.id === null;
  if (name === "token" && data.index !== place.numTokens) throw new Error("a token is missing, or came twice");
  if (name === "error" && PASSING.includes(data.code)) throw new Error(data.code);
  if (name === "token") place.numTokens++;
  if (name === "start") place.body = { ...place.body, seed: data.seed };
  Object.assign(place, { id, hasBegun: true });
  return name !== "start" || isFirst;
}

/** Over at once when the signal aborts; the next step will see why. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => [setTimeout(resolve, milliseconds), signal.addEventListener("abort", resolve)]);
}
