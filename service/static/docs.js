// The API reference: asks for the key if the server wants one, then hands the schema to Swagger UI.

import { heldKey, holdKey } from "./key.js";

/* global SwaggerUIBundle */

const ask = document.getElementById("ask");
const key = document.getElementById("key");
const status = document.getElementById("status");

async function show(bearer) {
  status.textContent = "";
  try {
    const answer = await fetch("openapi.json", { headers: bearer ? { Authorization: `Bearer ${bearer}` } : {} });
    ask.hidden = answer.status !== 401;
    if (answer.ok) holdKey(bearer);
    if (answer.ok) draw(await answer.json(), bearer);
    else if (ask.hidden || bearer) status.textContent = (await answer.json()).error.message;
  } catch {
    status.textContent = "The server does not answer; reload the page to try again.";
  }
}

function draw(schema, bearer) {
  schema.openapi = "3.0.3"; // this Swagger UI knows no later version, and draws what ours says all the same
  schema.servers = [{ url: new URL(".", location).href.replace(/\/$/, "") }]; // also behind a path prefix
  const reference = SwaggerUIBundle({
    spec: schema,
    dom_id: "#reference",
    deepLinking: true,
    onComplete: () => bearer && reference.preauthorizeApiKey("key", bearer),
  });
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  show(key.value);
});
show(heldKey());
