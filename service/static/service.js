/** Talks to the service and says in words what went wrong. Knows addresses and statuses, not the page. */

/** Something the reader should be told, in a sentence. */
export class Trouble extends Error {
  constructor(message) {
    super(`${message[0].toUpperCase()}${message.slice(1)}.`);
  }
}

export async function fetchInfo() {
  const response = await answered(fetch("info", { cache: "no-store" }));
  return response.json();
}

/** Asks for a stream and returns its body. */
export async function openStream(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await answered(fetch("generate", { method: "POST", headers, body: JSON.stringify(body), signal }));
  return response.body;
}

export function asCurl(body) {
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl -N ${new URL("generate", document.baseURI)} -H 'Content-Type: application/json' -d '${json}'`;
}

async function answered(request) {
  const response = await request;
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const seconds = response.headers.get("Retry-After");
  const later = seconds ? `; try again in ${seconds} s` : "";
  throw new Trouble((error?.message ?? `the service answered with status ${response.status}`) + later);
}
