/** The form, the address bar and the request body: three views of the same settings. */

const NUMBERS = ["max_new_tokens", "temperature", "top_k", "top_p"];

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
  configure({ limits, defaults, vocabulary }) {
    this.defaults = defaults;
    for (const input of this.#inputs("max_new_tokens")) input.max = limits.max_new_tokens;
    for (const input of this.#inputs("top_k")) input.max = vocabulary.length;
  }

  set(name, value) {
    this.fields[name].value = value;
    this.fields[name].dispatchEvent(new Event("input"));
  }

  /** What POST /generate is sent. */
  body(seed) {
    const body = { prompt: this.fields.prompt.value };
    for (const name of NUMBERS) body[name] = this.fields[name].valueAsNumber;
    if (seed) body.seed = Number(seed);
    return { ...body, unknown_characters: "fold", return_routed_experts: true };
  }

  /** Settings stand behind the #, so that the prompt in a shared link reaches no server's log. */
  toAddress(seed, layer) {
    const body = this.body(seed);
    const changed = NUMBERS.filter((name) => body[name] !== this.defaults[name]).map((name) => [name, body[name]]);
    const query = new URLSearchParams([["prompt", body.prompt], ...changed, ["layer", layer]]);
    if (seed) query.set("seed", seed);
    history.replaceState(null, "", `#${query}`);
  }

  /** Fills the form from the address, with defaults for what it does not name, and returns the layer it names. */
  fromAddress() {
    const query = new URLSearchParams(location.hash.slice(1));
    for (const name of ["prompt", "seed"]) this.set(name, query.get(name) ?? this.fields[name].defaultValue);
    for (const name of NUMBERS) this.set(name, query.get(name) ?? this.defaults[name]);
    return Number(query.get("layer"));
  }

  #inputs(name) {
    return this.fields[name].parentElement.querySelectorAll("input");
  }
}
