/** The page: wires the parts together. One text, or two from one seed when experts are silenced. */

import { Card } from "./card.js";
import { asCurl, asPython } from "./commands.js";
import { Comparison } from "./comparison.js";
import { byId, choice } from "./dom.js";
import { Heatmap, nameOfExpert } from "./heatmap.js";
import { heldKey, holdKey } from "./key.js";
import { Reading, refusal } from "./reading.js";
import { fetchFacts } from "./service.js";
import { Settings } from "./settings.js";
import { Speaker, Text } from "./text.js";

const SERVER_WINDOW_S = 60;
const SERVER_POLL_MS = 2000;

const settings = new Settings(byId("form"));
const silenced = new Set(); // "layer.expert"
const speaker = new Speaker(byId("spoken"));
let info = null;
let hearKey = null; // goes on once the reader has given a key

// What happens to a text

const page = {
  began(reading) {
    comparison.begin();
    if (reading !== shown()) return;
    speaker.begin();
    heatmap.clear();
    byId("folded").hidden = true;
    showFigures();
  },

  started(reading, used) {
    tellFolding(reading.body.prompt, used);
    remember();
  },

  wrote(reading, { text }) {
    if (reading === shown()) speaker.hear(text);
  },

  drew(reading) {
    if (isComparing()) comparison.follow();
    if (reading !== shown()) return;
    showFigures();
    if (reading.counts) heatmap.setCounts("text", reading.counts);
  },

  ended(reading) {
    if (reading === shown()) speaker.finish();
    if (isComparing() && !isBusy()) tellDifference();
  },

  said() {
    const told = readings();
    const { words, isTrouble } = told.find((each) => each.isTrouble) ?? told.find((each) => each.isRunning) ?? told.at(-1);
    byId("stop").disabled = !isBusy();
    byId("again").disabled = whole.body?.seed === undefined;
    byId("more").disabled = isBusy() || !told.some((each) => each.canGoOn) || whole.numTokens >= info.limits.max_new_tokens;
    say(words, isTrouble);
  },

  locked(words) {
    askForKey(words).then(readyInfo).then(() => lock(false, "Ready."));
  },
};

const whole = new Reading(new Text(byId("text")), page);
const without = new Reading(new Text(byId("text-without")), page);
const comparison = new Comparison(whole.text, without.text);
const cards = [whole, without].map(({ text }) => new Card(byId("card"), byId("told"), text));
const heatmap = new Heatmap({
  table: byId("heat"),
  legend: byId("legend"),
  silenced,
  onPick: (layer) => [chooseLayer(layer), remember()],
  onSilence: (layer, expert) => toggle(layer, expert),
  onDescribe: describeExpert,
});

const isComparing = () => without.body !== null;
const readings = () => (isComparing() ? [whole, without] : [whole]);
const isBusy = () => readings().some((reading) => reading.isRunning);
const shown = () => readings().at(-1);

// What the reader does

function generate(seed) {
  if (byId("generate").disabled || !byId("form").reportValidity()) return;
  const drawn = seed || (silenced.size ? String(crypto.getRandomValues(new Uint32Array(1))[0]) : ""); // both need the same
  without.forget();
  const body = settings.body(drawn);
  if (silenced.size) writeWithout(body);
  else layOut();
  whole.write(body);
}

const stop = () => readings().forEach((reading) => reading.stop());

/** Both texts go on to the same length, as if they had been asked for in it. */
function goOn() {
  const length = Math.min(whole.numTokens + byId("max_new_tokens").valueAsNumber, info.limits.max_new_tokens);
  for (const reading of readings()) if (reading.canGoOn && reading.numTokens < length) reading.goOn(length);
  remember();
}

/** Silences an expert or lets it speak again, and writes the text that is shown once more, from its seed. */
function toggle(layer, expert) {
  const pair = `${layer}.${expert}`;
  const numLeft = info.model.num_experts - [...silenced].filter((each) => each.startsWith(`${layer}.`)).length;
  if (!silenced.has(pair) && numLeft <= info.model.experts_per_token) {
    say(`Layer ${layer} cannot do with fewer than ${info.model.experts_per_token} experts.`, true);
    return;
  }
  silenced.delete(pair) || silenced.add(pair);
  applySilence();
  if (isComparing()) byId("whole-title").scrollIntoView({ block: "nearest" }); // on a phone it is far up
  const { seed } = whole.body ?? {};
  if (seed === undefined) say(silenced.size ? "Generate writes the text twice: with all experts, and without these." : "Ready.");
}

function applySilence() {
  heatmap.showSilenced();
  byId("restore").hidden = !silenced.size;
  const { body } = whole;
  without.forget();
  if (silenced.size && body?.seed !== undefined) writeWithout(whole.isRunning ? body : { ...body, max_new_tokens: whole.numTokens || body.max_new_tokens });
  else showWhole();
  remember();
}

function writeWithout(body) {
  const pairs = silencedPairs();
  without.write({ ...body, disabled_experts: pairs });
  byId("without-title").textContent = `Without ${pairs.map(nameOfExpert).join(", ")}`;
  layOut();
}

/** One text again, which was there all the time. */
function showWhole() {
  layOut();
  comparison.begin();
  showFigures();
  if (whole.counts) heatmap.setCounts("text", whole.counts);
  if (whole.body) page.said();
}

function layOut() {
  document.body.classList.toggle("comparing", isComparing());
  byId("without").hidden = byId("whole-title").hidden = !isComparing();
  byId("verdict").textContent = "";
  cards.forEach((card) => card.close());
  tellWork();
}

const silencedPairs = () => [...silenced].map((pair) => pair.split(".").map(Number)).sort((a, b) => a[0] - b[0] || a[1] - b[1]);

async function copy(command) {
  byId("command").textContent = command;
  byId("command").hidden = false;
  const isCopied = await navigator.clipboard?.writeText(command).then(() => true, () => false);
  say(isCopied ? "Copied." : "Select what stands below the text to copy it.");
}

/** The body of the text that is shown, or of the one that Generate would write. */
const shownBody = () => shown().body ?? settings.body(byId("seed").value, silencedPairs());

/** The link makes the text shown. */
function remember() {
  const view = { layer: whole.text.layer };
  if (silenced.size) view.silenced = silencedPairs().map((pair) => pair.join(".")).join("_");
  if (byId("numbers").checked) view.numbers = "on";
  if (heatmap.view !== "text") view.view = heatmap.view;
  settings.toAddress(whole.body ?? settings.body(byId("seed").value), view);
}

function chooseLayer(layer) {
  byId(`layer-${layer}`).checked = true;
  cards.forEach((card) => card.close());
  for (const { text } of [whole, without]) text.setLayer(layer);
  heatmap.setLayer(layer);
}

function chooseView(view) {
  byId(`view-${view}`).checked = true;
  heatmap.setView(view);
  tellWork();
  watchServer();
}

// What the page tells

function say(words, isTrouble = false) {
  if (byId("state").textContent !== words) byId("state").textContent = words;
  byId("state").classList.toggle("bad", isTrouble);
}

function showFigures() {
  const { firstAt, askedAt, numTokens, tokensPerS, body } = shown();
  byId("ttft").textContent = firstAt ? `${Math.round(firstAt - askedAt)} ms` : "–";
  byId("rate").textContent = tokensPerS ? `${Math.round(tokensPerS).toLocaleString("en")} tokens/s` : "–";
  byId("count").textContent = numTokens ? `${numTokens} tokens` : "–";
  byId("used-seed").textContent = body?.seed ?? "–";
  tellWork();
}

function tellFolding(prompt, used) {
  const foreign = [...new Set(prompt)].filter((character) => !used.includes(character));
  byId("folded").hidden = used === prompt;
  byId("folded").textContent = `Not in the model’s alphabet: ${foreign.slice(0, 10).join(" ")}. It read: ${used || "(nothing)"}`;
}

/** In one sentence: how far the texts agree, and what the causal map says of the silenced experts. */
function tellDifference() {
  const costs = silencedPairs().map(([layer, expert]) => heatmap.costInWords(layer, expert));
  const measured = costs.length === 1 && costs[0] ? ` On the validation text, ${costs[0]}.` : "";
  byId("verdict").textContent = comparison.inWords() + measured;
  byId("told").textContent = byId("verdict").textContent;
  comparison.showFork();
}

const WORK = {
  text: () => (shown().numRouted ? `In percent, over all ${shown().numRouted} tokens read and written.` : "In percent, over the tokens written so far."),
  server: () => "In percent, over all requests of the last minute.",
  cost: () => "How much perplexity rises on the validation text without this one expert, in percent. Pale figures may be chance.",
  likes: () => "The characters that each expert takes most beyond its share, on the validation text.",
};

function tellWork() {
  const words = heatmap.view === "server" && serverTrouble ? serverTrouble : WORK[heatmap.view]();
  if (byId("heat-note").textContent !== words) byId("heat-note").textContent = words;
}

function describeExpert(words, isByKeyboard) {
  byId("expert").textContent = words || byId("expert").dataset.hint;
  if (isByKeyboard) byId("told").textContent = words;
}

function describe({ name, corpus, parameters, active_parameters, num_layers, num_experts, experts_per_token }) {
  const millions = (count) => `${(count / 1e6).toFixed(1)} million`;
  const subject = /shakespeare/.test(corpus ?? "") ? "Shakespeare’s plays" : corpus;
  const schooling = subject ? `Trained on ${subject}, it` : "It";
  byId("about").textContent =
    `The model “${name}” has ${millions(parameters)} parameters, ${millions(active_parameters)} of them at work ` +
    `on any one token. ${schooling} continues a text; it is not a chatbot and knows no facts.`;
  byId("hint").textContent =
    `In each of ${num_layers} layers a router gives every token to ${experts_per_token} of ${num_experts} experts; ` +
    "its colour is the one with the larger weight. Point at a letter, or go there with the arrow keys, to see them all.";
}

// The server's own work, while somebody looks

let serverTrouble = "";
let watch = null;

async function watchServer() {
  clearTimeout(watch?.timer);
  const mine = (watch = {});
  if (heatmap.view !== "server" || document.hidden) return;
  try {
    const { layers } = await fetchFacts(`experts?window=${SERVER_WINDOW_S}`);
    heatmap.setCounts("server", layers.map(({ prefill, decode }) => prefill.map((count, expert) => count + decode[expert])));
    serverTrouble = layers.some(({ routed_tokens }) => routed_tokens) ? "" : "The server has done nothing in the last minute.";
  } catch {
    serverTrouble = "The server does not tell at the moment; asking again …";
  }
  tellWork();
  if (mine === watch) mine.timer = setTimeout(watchServer, SERVER_POLL_MS);
}

// Coming and going

const PHASES = {
  loading: "The model is being loaded …",
  warming: "The model is being warmed up …",
  draining: "The service is shutting down.",
  failed: "The model could not be loaded; the service’s log says why.",
};

/** Over when the reader has given a key; whether it is the right one, the next request tells. */
async function askForKey(words) {
  lock(true, words);
  await new Promise((resolve) => (hearKey = resolve));
  holdKey(byId("key").value);
  byId("ask").reset();
  say("Trying the key …");
}

/** The key's field takes the place of the buttons, and the focus if they had it; or the other way round. */
function lock(isLocked, words) {
  const [gone, focused] = isLocked ? ["actions", "key"] : ["lock", "generate"];
  const hadFocus = byId(gone).contains(document.activeElement); // asked first: a disabled button may lose it at once
  byId("generate").disabled = isLocked;
  byId("lock").hidden = byId("actions").hidden = false;
  if (hadFocus) byId(focused).focus();
  byId(gone).hidden = true;
  say(words, isLocked && heldKey() !== "");
}

async function readyInfo() {
  for (;;) {
    const told = await fetchFacts("info").catch(({ status }) => ({ phase: status === 401 ? "locked" : "silent" }));
    if (told.phase === "ready") return told;
    if (told.phase === "locked") {
      await askForKey(refusal());
      continue;
    }
    say(PHASES[told.phase] ?? "The service does not answer yet; trying again …", told.phase === "failed");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

const VIEWS = [["text", "This text"], ["server", "Server"], ["cost", "Cost"], ["likes", "Likes"]];

async function setUp() {
  info = await readyInfo();
  const report = await fetchFacts("experts/report").catch(() => ({}));
  const known = { text: true, server: true, cost: report.causal_map, likes: report.favourites };
  describe(info.model);
  const layers = [...Array(info.model.num_layers).keys()];
  byId("layers").append(...layers.map((layer) => choice("layer", layer, layer, () => [chooseLayer(layer), remember()])));
  const views = VIEWS.filter(([view]) => known[view]);
  byId("views").append(...views.map(([view, words]) => choice("view", view, words, () => [chooseView(view), remember()])));
  heatmap.build(info.model, report);
  settings.configure(info);
  document.body.classList.toggle("many", info.model.num_experts > 10); // numbers of two digits and more
  restore();
  lock(false, "Ready.");
}

function restore() {
  const { layer, silenced: pairs, numbers, view } = settings.fromAddress();
  byId("numbers").checked = numbers === "on" || info.model.num_experts > 8; // tints repeat then
  showNumbers();
  silenced.clear();
  pairs.forEach((pair) => silenced.add(pair));
  heatmap.showSilenced();
  byId("restore").hidden = !silenced.size;
  without.forget();
  layOut();
  chooseLayer(byId(`layer-${layer}`) ? layer : 0);
  chooseView(byId(`view-${view}`) ? view : "text");
}

function showNumbers() {
  for (const { text } of [whole, without]) text.container.classList.toggle("numbered", byId("numbers").checked);
}

byId("settings").open = matchMedia("(min-width: 100rem)").matches;
byId("settings").addEventListener("invalid", () => (byId("settings").open = true), true);
byId("form").addEventListener("submit", (event) => [event.preventDefault(), generate(byId("seed").value)]);
byId("ask").addEventListener("submit", (event) => [event.preventDefault(), hearKey?.()]);
byId("stop").addEventListener("click", stop);
byId("more").addEventListener("click", goOn);
byId("again").addEventListener("click", () => generate(String(whole.body.seed)));
byId("restore").addEventListener("click", () => [silenced.clear(), applySilence()]);
byId("curl").addEventListener("click", () => copy(asCurl(shownBody())));
byId("python").addEventListener("click", () => copy(asPython(shownBody())));
byId("link").addEventListener("click", () => [remember(), copy(location.href)]);
byId("numbers").addEventListener("change", () => [showNumbers(), remember()]);
byId("prompt").addEventListener("keydown", ({ key, ctrlKey, metaKey }) => {
  if (key === "Enter" && (ctrlKey || metaKey)) byId("form").requestSubmit();
});
for (const button of document.querySelectorAll(".starts button")) {
  button.addEventListener("click", () => settings.set("prompt", button.textContent));
}
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape") isBusy() ? stop() : cards.forEach((card) => card.close());
});
document.addEventListener("visibilitychange", watchServer);
await setUp();
addEventListener("hashchange", restore);
