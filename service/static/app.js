/** The page: wires the parts together and lives one request at a time. */

import { Card } from "./card.js";
import { byId, make } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { heldKey, holdKey } from "./key.js";
import { asCurl, fetchInfo, Trouble } from "./service.js";
import { Settings } from "./settings.js";
import { survivingStream } from "./stream.js";
import { Speaker, Text } from "./text.js";

const settings = new Settings(byId("form"));
const text = new Text(byId("text"));
const heatmap = new Heatmap(byId("heat"), byId("legend"));
const card = new Card(byId("card"), byId("told"), text);
const speaker = new Speaker(byId("spoken"));
let current = null; // the request being read, if any
let lastSeed = "";
let hearKey = null; // goes on once the reader has given a key

// One request

async function generate(seed) {
  if (byId("generate").disabled || !byId("form").reportValidity()) return;
  stop();
  const request = { controller: new AbortController(), body: settings.body(seed), askedAt: performance.now() };
  begin(request);
  try {
    for await (const { name, data } of survivingStream(request.body, request.controller.signal, () => wait(request))) {
      if (current === request) on[name]?.(request, data);
      if (current !== request) return;
    }
  } catch (error) {
    if (current !== request) return;
    end(inWords(error), true);
    if (error.status === 401) askForKey(inWords(error)).then(readyInfo).then(() => lock(false, "Ready."));
  }
}

const on = {
  start(request, { seed, prompt_used = request.body.prompt }) {
    lastSeed = String(seed);
    byId("used-seed").textContent = lastSeed;
    byId("again").disabled = false;
    text.begin(prompt_used);
    tellFolding(request.body.prompt, prompt_used);
    remember();
  },

  token(request, token) {
    request.firstAt ??= performance.now();
    request.pace ??= { index: token.index, at: performance.now() };
    text.tokens.push(token);
    heatmap.add(token);
    speaker.hear(token.text);
    request.frame ??= requestAnimationFrame(() => draw(request));
    say("Writing …");
  },

  done(request, { finish_reason, timings, routing }) {
    const isLate = finish_reason === "timeout";
    end(isLate ? "The time for this request was over; the text ends here." : "Done.", isLate);
    heatmap.show(routing.counts);
    byId("heat-note").textContent = `In percent, over all ${routing.tokens} tokens read and written.`;
    if (timings.tokens_per_s) tellSpeed(timings.tokens_per_s);
  },

  error(request, { error }) {
    end(`${new Trouble(error.message).message} The text ends here.`, true);
  },
};

function begin(request) {
  current = request;
  card.close();
  text.begin(request.body.prompt);
  heatmap.begin();
  speaker.begin();
  for (const id of ["ttft", "rate", "count", "used-seed"]) byId(id).textContent = "–";
  byId("heat-note").textContent = "In percent, over the tokens written so far.";
  byId("folded").hidden = true;
  byId("stop").disabled = false;
  byId("text").classList.add("writing");
  say("Waiting for the first token …");
}

/** Once a frame while tokens come: all that arrived meanwhile is shown together. */
function draw(request) {
  request.frame = null;
  if (current !== request || !request.firstAt) return;
  text.show();
  heatmap.show();
  byId("ttft").textContent = `${Math.round(request.firstAt - request.askedAt)} ms`;
  byId("count").textContent = `${text.tokens.length} tokens`;
  const { index, at } = request.pace ?? {};
  const seconds = (performance.now() - at) / 1000;
  if (seconds > 0.2) tellSpeed((text.tokens.length - 1 - index) / seconds);
}

/** The connection was lost, and the next try is due in a moment. */
function wait(request) {
  request.pace = null; // the speed is measured anew when tokens come again: a gap is not slow writing
  byId("rate").textContent = "–";
  say(`${lossInWords()}; picking it up again …`, true);
}

function end(words, isTrouble = false) {
  draw(current);
  current = null;
  speaker.finish();
  byId("stop").disabled = true;
  byId("text").classList.remove("writing");
  say(words, isTrouble);
}

function stop() {
  if (!current) return;
  current.controller.abort();
  end(`Stopped after ${text.tokens.length} tokens.`);
}

function inWords(error) {
  const known = error.status === 401 ? refusal() : error instanceof Trouble && error.message;
  const reason = known || "The service cannot be reached. Is it running?";
  return text.tokens.length ? `${lossInWords()}. ${reason} What arrived is kept.` : reason;
}

const lossInWords = () => `The connection was lost after ${text.tokens.length} tokens`;

function tellFolding(prompt, used) {
  const foreign = [...new Set(prompt)].filter((character) => !used.includes(character));
  byId("folded").hidden = used === prompt;
  byId("folded").textContent = `Not in the model’s alphabet: ${foreign.slice(0, 10).join(" ")}. It read: ${used || "(nothing)"}`;
}

function tellSpeed(tokensPerSecond) {
  byId("rate").textContent = `${Math.round(tokensPerSecond)} tokens/s`;
}

function say(words, isTrouble = false) {
  if (byId("state").textContent !== words) byId("state").textContent = words;
  byId("state").classList.toggle("bad", isTrouble);
}

// The page around it

const chosenSeed = () => byId("seed").value;
const remember = () => settings.toAddress(lastSeed || chosenSeed(), text.layer); // the link makes the text shown

function chooseLayer(layer) {
  byId(`layer-${layer}`).checked = true;
  card.close();
  text.setLayer(layer);
  heatmap.setLayer(layer);
}

function layerChoice(layer) {
  const input = make("input", { type: "radio", name: "layer", id: `layer-${layer}` });
  input.addEventListener("change", () => [chooseLayer(layer), remember()]);
  return make("label", { className: "choice" }, input, make("span", {}, layer));
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

function setUp(info) {
  describe(info.model);
  byId("layers").append(...[...Array(info.model.num_layers).keys()].map(layerChoice));
  heatmap.build(info.model);
  settings.configure(info);
  restore();
  if (info.model.num_experts > 8) byId("numbers").click(); // tints repeat then
  document.body.classList.toggle("many", info.model.num_experts > 10); // numbers of two digits and more
  lock(false, "Ready.");
}

function restore() {
  const layer = settings.fromAddress();
  lastSeed = chosenSeed();
  chooseLayer(byId(`layer-${layer}`) ? layer : 0);
}

async function copyCurl() {
  const command = asCurl(settings.body(chosenSeed() || lastSeed));
  byId("command").textContent = command;
  byId("command").hidden = false;
  const isCopied = await navigator.clipboard?.writeText(command).then(() => true, () => false);
  say(isCopied ? "Copied." : "Select the command below to copy it.");
}

const PHASES = {
  loading: "The model is being loaded …",
  warming: "The model is being warmed up …",
  draining: "The service is shutting down.",
  failed: "The model could not be loaded; the service’s log says why.",
};

const refusal = () => (heldKey() ? "The server refuses this key." : "This server needs a key.");

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
    const info = await fetchInfo().catch(({ status }) => ({ phase: status === 401 ? "locked" : "silent" }));
    if (info.phase === "ready") return info;
    if (info.phase === "locked") {
      await askForKey(refusal());
      continue;
    }
    say(PHASES[info.phase] ?? "The service does not answer yet; trying again …", info.phase === "failed");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

byId("settings").open = matchMedia("(min-width: 56rem)").matches;
byId("settings").addEventListener("invalid", () => (byId("settings").open = true), true);
byId("form").addEventListener("submit", (event) => [event.preventDefault(), generate(chosenSeed())]);
byId("ask").addEventListener("submit", (event) => [event.preventDefault(), hearKey?.()]);
byId("stop").addEventListener("click", stop);
byId("again").addEventListener("click", () => generate(lastSeed));
byId("curl").addEventListener("click", copyCurl);
byId("heat").addEventListener("click", ({ target }) => {
  const layer = target.closest("tbody tr")?.sectionRowIndex;
  if (layer !== undefined) byId(`layer-${layer}`).click();
});
byId("numbers").addEventListener("change", ({ target }) => byId("text").classList.toggle("numbered", target.checked));
byId("prompt").addEventListener("keydown", ({ key, ctrlKey, metaKey }) => {
  if (key === "Enter" && (ctrlKey || metaKey)) byId("form").requestSubmit();
});
for (const button of document.querySelectorAll(".starts button")) {
  button.addEventListener("click", () => settings.set("prompt", button.textContent));
}
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape") current ? stop() : card.close();
});
setUp(await readyInfo());
addEventListener("hashchange", restore);
