/** The form, the address bar and the request body: three views of the same settings. */

const NUMBERS = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p"];
const ALTERNATIVES = 5;

export class Settings {
  constructor(form) {
    this.fields = form.elements;
    for (const name of NUMBERS) {
      const [number, slider] = this.#inputs(name);
      number.addEventListener("input", () => (slider.value = number.value));
      slider.addEventListener("input", () => (number.value = slider.value));
    }
  }

  /** Takes limits and defaults from /info. */
  configure({ model, limits, defaults, vocabulary }) {
    Object.assign(this, { model, defaults });
    for (const input of this.#inputs("max_new_tokens")) input.max = limits.max_new_tokens;
    for (const input of this.#inputs("top_k")) input.max = vocabulary.length;
    this.fields.prompt.maxLength = limits.prompt_characters;
  }

  set(name, value) {
    this.fields[name].value = value;
    this.fields[name].dispatchEvent(new Event("input"));
  }

  /** What POST /generate is sent: the default for an empty number, disabled_experts only where some are. */
  body(seed, silenced = []) {
    const body = { prompt: this.fields.prompt.value };
    for (const name of NUMBERS) {
      const { value, valueAsNumber } = this.fields[name];
      body[name] = value ? valueAsNumber : this.defaults[name];
    }
    if (seed) body.seed = Number(seed);
    if (silenced.length) body.disabled_experts = silenced;
    return { ...body, unknown_characters: "fold", return_routed_experts: true, logprobs: ALTERNATIVES };
  }

  /** Settings stand behind the #, so that the prompt in a shared link reaches no server's log. */
  toAddress(body, view) {
    const changed = NUMBERS.filter((name) => body[name] !== this.defaults[name]).map((name) => [name, body[name]]);
    const query = new URLSearchParams([["prompt", body.prompt], ...changed, ...Object.entries(view)]);
    if (body.seed !== undefined) query.set("seed", body.seed);
    history.replaceState(null, "", `#${query}`);
  }

  /** Fills the form from the address, with defaults for what it does not name, and returns the rest of it. */
  fromAddress() {
    const query = new URLSearchParams(location.hash.slice(1));
    for (const name of ["prompt", "seed"]) this.set(name, query.get(name) ?? this.fields[name].defaultValue);
    for (const name of NUMBERS) this.set(name, query.get(name) ?? this.defaults[name]);
    const pairs = (query.get("silenced") ?? "").split("_").filter((pair) => this.#isExpert(pair));
    const silenced = pairs.map((pair) => pair.split(".").map(Number).join(".")); // 00.01 is 0.1
    return { silenced, layer: Number(query.get("layer")), numbers: query.get("numbers"), view: query.get("view") };
  }

  /** Whether "layer.expert" names one of this model's. */
  #isExpert(pair) {
    const [layer, expert] = pair.split(".").map(Number);
    return /^\d+\.\d+$/.test(pair) && layer < this.model.num_layers && expert < this.model.num_experts;
  }

  #inputs(name) {
    return this.fields[name].parentElement.querySelectorAll("input");
  }
}
