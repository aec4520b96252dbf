// The API reference: asks for the key if the server wants one, then hands the schema to Swagger UI.

import { byId } from "./dom.js";
import { heldKey, holdKey } from "./key.js";
import { fetchFacts, Trouble } from "./service.js";

/* global SwaggerUIBundle */

async function show() {
  let trouble = {};
  try {
    draw(await fetchFacts("openapi.json"));
  } catch (error) {
    trouble = error instanceof Trouble ? error : { message: "The server does not answer; reload the page to try again." };
  }
  byId("ask").hidden = trouble.status !== 401;
  byId("status").textContent = trouble.message ?? "";
}

function draw(schema) {
  schema.openapi = "3.0.3"; // this Swagger UI knows no later version, and draws what ours says all the same
  schema.servers = [{ url: new URL(".", location).href.replace(/\/$/, "") }]; // also behind a path prefix
  const reference = SwaggerUIBundle({
    spec: schema,
    dom_id: "#reference",
    deepLinking: true,
    onComplete: () => heldKey() && reference.preauthorizeApiKey("key", heldKey()),
  });
}

byId("ask").addEventListener("submit", (event) => [event.preventDefault(), holdKey(byId("key").value), show()]);
show();
