/** The server's key, if it wants one: held for this tab alone, where a reload finds it again. */

const NAME = `key ${new URL(".", document.baseURI).pathname}`; // under another path is another server
let store = {}; // for a browser that stores nothing: until the reload
try {
  store = sessionStorage;
} catch {}

export const heldKey = () => store[NAME] ?? "";
/** The fields take none that a header cannot carry. */
export const holdKey = (key) => (store[NAME] = key.trim());
export const authorization = () => (heldKey() ? { Authorization: `Bearer ${heldKey()}` } : {});
