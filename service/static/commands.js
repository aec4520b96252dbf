/** The request that makes a text, for other programs. The server's key stays out: they take it from the environment. */

import { heldKey } from "./key.js";

const address = () => new URL("generate", document.baseURI).href;

/** What the text depends on: what is only told about it has no place in a program. */
function essence({ logprobs, return_routed_experts, ...body }) {
  return JSON.stringify(body);
}

export function asCurl(body) {
  const key = heldKey() && ` -H "Authorization: Bearer $MOESCOPE_API_KEY"`;
  const json = essence(body).replaceAll("'", "'\\''");
  return `curl -N '${address()}'${key} -H 'Content-Type: application/json' -d '${json}'`;
}

/** Standard library only. JSON without true, false and null is Python as it stands. */
export function asPython(body) {
  const key = heldKey() ? `headers["Authorization"] = "Bearer " + os.environ["MOESCOPE_API_KEY"]\n` : "";
  return `import json
${key && "import os\n"}import urllib.request

body = ${essence(body)}
headers = {"Content-Type": "application/json"}
${key}request = urllib.request.Request("${address()}", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as stream:
    for line in stream:
        event = json.loads(line[6:]) if line.startswith(b"data: ") else {}
        if "token_id" in event:  # the first event repeats what was asked, the last one has the whole text
            print(event["text"], end="", flush=True)
        if "error" in event:
            raise SystemExit(event["error"]["message"])
`;
}
