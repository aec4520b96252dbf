/** The page: wires the parts together. One text, or two from one seed when experts are silenced. */

import { Card } from "./card.js";
import { asCurl, asPython } from "./commands.js";
import { Comparison } from "./comparison.js";
import { byId, choice } from "./dom.js";
import { Door } from "./door.js";
import { Heatmap, nameOfExpert } from "./heatmap.js";
import { Reading } from "./reading.js";
import { fetchFacts } from "./service.js";
import { Settings } from "./settings.js";
import { Speaker, Text } from "./text.js";
import { Watch } from "./watch.js";

const settings = new Settings(byId("form"));
const silenced = new Set(); // "layer.expert"
const speaker = new Speaker(byId("spoken"));
const door = new Door(say);
const watch = new Watch(() => heatmap.view === "server", showServer);
let info = null;
let serverTrouble = "";
let pointedAt; // the expert that is described, as [layer, expert]

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
    if (!reading.place.id.startsWith(info.fingerprint)) meetAnew();
    tellFolding(reading.body.prompt, used);
    if (silenced.size && !isComparing()) writeWithout(whole.body); // silenced while this had no seed yet
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
    describeExpert(pointedAt);
  },

  said() {
    const told = readings();
    const first = told.find((each) => each.isTrouble) ?? told.find((each) => each.isRunning) ?? told.at(-1);
    const isFull = whole.numTokens >= info.limits.max_new_tokens;
    byId("stop").disabled = !isBusy();
    byId("again").disabled = whole.body?.seed === undefined;
    byId("more").disabled = isBusy() || isFull || !told.some((each) => each.canGoOn);
    say(first.words || "Ready.", first.isTrouble);
  },

  locked(words) {
    door.askForKey(words).then(() => door.whenReady()).then(() => door.open());
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
const hasText = () => whole.body?.seed !== undefined && (whole.isRunning || whole.numTokens > 0);

// What the reader does

function generate(seed) {
  if (byId("generate").disabled || !byId("form").reportValidity()) return;
  without.forget();
  const body = settings.body(seed || (silenced.size ? drawSeed() : "")); // two texts need the same
  if (silenced.size) writeWithout(body);
  else layOut();
  whole.write(body);
}

const drawSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
const stop = () => readings().forEach((reading) => reading.stop());

/** Both texts go on to the same length, as if they had been asked for in it. */
function goOn() {
  if (!byId("form").reportValidity()) return;
  const more = byId("max_new_tokens").valueAsNumber || info.defaults.max_new_tokens;
  const length = Math.min(whole.numTokens + more, info.limits.max_new_tokens);
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
  else if (silenced.size && !isBusy()) say("Generate writes two texts: with all experts, and without these.");
}

function applySilence() {
  heatmap.showSilenced();
  byId("restore").hidden = !silenced.size;
  without.clear();
  const length = whole.isRunning ? whole.body.max_new_tokens : whole.numTokens;
  if (silenced.size && hasText()) writeWithout({ ...whole.body, max_new_tokens: length });
  else showWhole();
  describeExpert(pointedAt);
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
  speaker.begin(); // what was told of the other text is no beginning of this one
  showFigures();
  if (whole.counts) heatmap.setCounts("text", whole.counts);
  else heatmap.clear();
  page.said();
}

function layOut() {
  document.body.classList.toggle("comparing", isComparing());
  byId("without").hidden = byId("whole-title").hidden = !isComparing();
  byId("verdict").textContent = "";
  cards.forEach((card) => card.close());
  tellWork();
}

/** [layer, expert] of each, in order. */
function silencedPairs() {
  const pairs = [...silenced].map((pair) => pair.split(".").map(Number));
  return pairs.sort((one, other) => one[0] - other[0] || one[1] - other[1]);
}

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
  if (!info) return; // not connected yet
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
  watch.look();
}

// What the page tells

function say(words, isTrouble = false) {
  if (byId("state").textContent !== words) byId("state").textContent = words;
  byId("state").classList.toggle("bad", isTrouble);
}

function showFigures() {
  const { firstAt, askedAt, numTokens, tokensPerS, body } = shown();
  byId("ttft").textContent = firstAt ? `${Math.round(firstAt - askedAt)} ms` : "–";
  byId("rate").textContent = tokensPerS ? `${Math.round(tokensPerS)} tokens/s` : "–";
  byId("count").textContent = numTokens ? `${numTokens} tokens` : "–";
  byId("used-seed").textContent = body?.seed ?? "–";
  tellWork();
}

/** Where nothing is left of a prompt, or there is none, the model reads a line break. */
function tellFolding(prompt, used) {
  const foreign = [...new Set(prompt)].filter((character) => !used.includes(character));
  byId("folded").hidden = used === prompt || prompt === "";
  const read = used === "\n" ? "(nothing)" : used;
  byId("folded").textContent = `Not in the model’s alphabet: ${foreign.slice(0, 10).join(" ")}. It read: ${read}`;
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
  text: () => `In percent, over ${shown().numRouted ? `all ${shown().numRouted} tokens read and written` : "the tokens written so far"}.`,
  server: () => "In percent, over all requests of the last minute.",
  cost: () => "Rise of perplexity on the validation text without this one expert, in percent. Pale figures may be chance.",
  likes: () => "The characters that each expert takes most beyond its share, on the validation text.",
};

function tellWork() {
  const words = heatmap.view === "server" && serverTrouble ? serverTrouble : WORK[heatmap.view]();
  if (byId("heat-note").textContent !== words) byId("heat-note").textContent = words;
}

function showServer(counts, trouble) {
  serverTrouble = trouble;
  if (counts) heatmap.setCounts("server", counts);
  tellWork();
}

/** What is known of the expert at [layer, expert], which the reader points at. */
function describeExpert(place, isByKeyboard = false) {
  pointedAt = place;
  const words = place ? heatmap.describe(...place) : "";
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

// Coming in

const VIEWS = [["text", "This text"], ["server", "Server"], ["cost", "Cost"], ["likes", "Likes"]];

/** Another process answers. With another model there is another page to build. */
async function meetAnew() {
  const now = await fetchFacts("info").catch(() => info);
  if (JSON.stringify(now.model) !== JSON.stringify(info.model)) location.reload();
  info = now;
}

async function setUp() {
  info = await door.whenReady();
  const report = await fetchFacts("experts/report").catch(() => ({}));
  const known = { text: true, server: true, cost: report.causal_map, likes: report.favourites };
  describe(info.model);
  for (const layer of Array(info.model.num_layers).keys()) {
    byId("layers").append(choice("layer", layer, layer, () => [chooseLayer(layer), remember()]));
  }
  for (const [view, words] of VIEWS.filter(([view]) => known[view])) {
    byId("views").append(choice("view", view, words, () => [chooseView(view), remember()]));
  }
  heatmap.build(info.model, report);
  settings.configure(info);
  document.body.classList.toggle("many", info.model.num_experts > 10); // numbers of two digits and more
  restore();
  door.open();
}

function restore() {
  const { layer, silenced: pairs, numbers, view } = settings.fromAddress();
  byId("numbers").checked = numbers === "on" || info.model.num_experts > 8; // tints repeat then
  showNumbers();
  silenced.clear();
  pairs.forEach((pair) => silenced.add(pair));
  for (const reading of [whole, without]) reading.clear();
  applySilence();
  page.began(whole);
  chooseLayer(byId(`layer-${layer}`) ? layer : 0);
  chooseView(byId(`view-${view}`) ? view : "text");
  remember(); // what was there before is remembered on the way
}

function showNumbers() {
  for (const { text } of [whole, without]) text.container.classList.toggle("numbered", byId("numbers").checked);
}

byId("settings").open = matchMedia("(min-width: 100rem)").matches;
byId("settings").addEventListener("invalid", () => (byId("settings").open = true), true);
byId("form").addEventListener("submit", (event) => [event.preventDefault(), generate(byId("seed").value)]);
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
document.addEventListener("keydown", ({ key, isComposing }) => {
  if (key === "Escape" && !isComposing) isBusy() ? stop() : cards.forEach((card) => card.close());
});
await setUp();
addEventListener("hashchange", restore);
