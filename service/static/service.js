/** Talks to the service and says in words what went wrong. Knows addresses and statuses, not the page. */

import { authorization } from "./key.js";

/** Something the reader should be told, in a sentence. */
export class Trouble extends Error {
  constructor(message, response = {}) {
    super(`${message[0].toUpperCase()}${message.slice(1)}.`);
    Object.assign(this, response);
  }
}

/** What the service tells at an address: its facts, or its experts. */
export async function fetchFacts(address) {
  const response = await answered(fetch(address, { cache: "no-store", headers: authorization() }));
  return response.json();
}

/** Asks for a stream, or for the rest of one after the event lastId, and returns its body. */
export async function openStream(body, signal, lastId = null) {
  const place = lastId && { "Last-Event-ID": lastId };
  const headers = { "Content-Type": "application/json", ...authorization(), ...place };
  const response = await answered(fetch("generate", { method: "POST", headers, body: JSON.stringify(body), signal }));
  return response.body;
}

async function answered(request) {
  const response = await request;
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const seconds = response.headers.get("Retry-After");
  const later = seconds ? `; try again in ${seconds} s` : "";
  const words = error?.message.replace(/^disabled_experts/, "the silenced experts"); // as the page calls them
  const message = words ?? `the service answered with status ${response.status}`;
  throw new Trouble(message + later, { status: response.status, retryAfterMs: 1000 * seconds });
}
