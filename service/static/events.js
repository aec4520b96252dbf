/** Reads server-sent events from a response body. Knows the wire format, not what the events mean. */

/** Yields {id, name, data} for each event, however its bytes were cut into chunks; a lone comment has none of them. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const blocks = (rest + decoder.decode(chunk.value, { stream: true })).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader who leaves early closes the connection
  }
}

function parse(block) {
  const fields = Object.fromEntries(block.split(/\r?\n/).map((line) => line.split(/: ?([^]*)/)));
  return { id: fields.id, name: fields.event, data: fields.data && JSON.parse(fields.data) };
}
