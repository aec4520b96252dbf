# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A mixture of experts, piece by piece
#
# This page takes a language model apart. It is a real one: every piece comes from this repository's `model/` and
# `training/`, the same code that trains and serves. We compute each piece a second time, by hand, and an `assert`
# checks that both agree. If a cell runs through, what it claims is true.
#
# You need Python and a little linear algebra: matrix products, and what a probability is. The model reads characters
# of Shakespeare and guesses the next one. Near the end we train it for about two minutes and then switch off its
# experts, one at a time, to see what each was good for.
#
# `STEPS` is how long we train. 800 steps take about two minutes. Set the environment variable `STEPS` to 20 to see the
# whole page run in seconds, with a model that has learned almost nothing.
#
# Open this page as a notebook (`docs/walkthrough.ipynb`), or run it from the repository: `python
# docs/walkthrough.py`.

# %%
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path.cwd().parent if Path.cwd().name == "docs" else Path.cwd()))

# %%
from model.attention import Rotary, attend_in_window, window_mask
from model.config import ModelConfig
from model.generate import generate, sampling_options
from model.router import Routing
from model.routing import expert_counts, max_load_ratio
from model.sampling import draw, uniform
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training import balance, corpora
from training.baselines import bigram_loss
from training.chance import chance_in, noise_weights

# %%
from training.config import TrainingConfig
from training.evaluate import evaluate, spread_windows
from training.initialise import initialise
from training.objective import objective
from training.report.experts import causal_map, count_choices, favourites, window_losses
from training.sample import stream
from training.trainer import Trainer

STEPS = int(os.environ.get("STEPS", "800"))
torch.set_num_threads(1)  # our model is too small to be shared between processor cores
same = torch.testing.assert_close  # raises an error unless two tensors are equal up to rounding

# %% [markdown]
# ## 1. Text becomes numbers
#
# Tiny Shakespeare is a million characters. Our tokenizer gives every different character a number; there are 65. Nine
# tenths of the text are for training. The rest is for validation: the model never learns from it, so its loss there
# tells whether it learned the language or only the text.

# %%
corpus = corpora.load("tinyshakespeare")
tokenizer = Tokenizer.of_characters(corpus.train + corpus.validation)
text = "ROMEO:\nWhat light"
ids = torch.tensor(tokenizer.encode(text))  # T numbers
print(f"{len(corpus.train):,} characters to train on, {tokenizer.vocab_size} different ones")
print(ids.tolist())

assert tokenizer.decode(ids.tolist()) == text

# %% [markdown]
# The sizes of our model. It is small, so that two minutes are enough: 3 layers, vectors of 96 numbers, 3 attention
# heads of 32, and 8 experts in each layer, of which every character uses 2. Letters in comments: T characters, C = 96
# channels, D = 32 numbers per head, E = 8 experts, K = 2 experts per token, V = 65 characters in the vocabulary.

# %%
SHAPE = {"hidden_size": 96, "num_layers": 3, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32}
SHAPE |= {"num_experts": 8, "experts_per_token": 2, "expert_size": 96, "context_length": 64}
CONFIG = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)

torch.manual_seed(1)
model = Transformer(CONFIG).requires_grad_(False)  # random weights: it knows nothing yet
layer = model.layers[0]
x = layer.attention_norm(model.embedding(ids[None]))  # (1, T, C): one vector for every character

assert x.shape == (1, len(ids), CONFIG.hidden_size)
same(x.square().mean(-1), torch.ones(1, len(ids)), rtol=1e-3, atol=0)  # the norm makes the mean square of each vector 1

# %% [markdown]
# ## 2. Attention: looking back
#
# A character alone says little, so it looks back at those before it. Each character makes three vectors from its own:
# a **query** (what am I looking for?), a **key** (what am I?) and a **value** (what do I tell whoever looks at me?).
# The score of a pair is the dot product of one's query and the other's key. Softmax turns a character's scores into
# weights that sum to 1, and what it receives is the weighted sum of the values.
#
# One head, by hand:

# %%
attention = layer.attention
positions = torch.arange(len(ids))
rotary = Rotary.at(positions[None], CONFIG.head_dim, CONFIG.rope_theta)


def head(number: int) -> tuple[Tensor, Tensor]:
    """What one head looks at (T, T), and what it receives (T, D)."""
    mine = slice(number * CONFIG.head_dim, (number + 1) * CONFIG.head_dim)
    queries = rotary.rotate(attention.query_norm(attention.query(x)[..., mine]))[0, 0]  # (T, D)
    keys = rotary.rotate(attention.key_norm(attention.key(x)[..., mine]))[0, 0]
    scores = queries @ keys.T / math.sqrt(CONFIG.head_dim)  # (T, T)
    scores[positions[:, None] < positions] = -math.inf  # nobody looks at what comes after
    weights = scores.softmax(-1)
    return weights, weights @ attention.value(x)[0, :, mine]


# %% [markdown]
# The first five characters, and how much each looks at each. The upper right is zero: looking ahead would be
# cheating, since the next character is what the model has to guess. All heads side by side, times one last matrix,
# are the output.

# %%
weights, _ = head(0)
for row, character in enumerate("ROMEO"):
    print(character, " ".join(f"{weight:.2f}" for weight in weights[row, :5].tolist()))

same(weights.sum(-1), torch.ones(len(ids)))
assert (weights.triu(1) == 0).all()

by_hand = torch.cat([head(number)[1] for number in range(CONFIG.num_heads)], dim=-1) @ attention.out.weight.T
attend = attend_in_window(CONFIG.context_length, len(ids), ids.device)
same(by_hand, attention(x, rotary, attend)[0])

# %% [markdown]
# ### Where is it? RoPE
#
# That nobody looks ahead tells a character who comes before it, but not how far back. `rotary.rotate`, already at work
# in the head above, brings that in: RoPE turns every query and key by an angle that grows with its position. The
# numbers of a vector are taken in pairs, and each pair turns like the hand of a clock: the first pair one radian per
# character, the later ones more and more slowly.

# %%
vector = torch.randn(CONFIG.head_dim)


def turned(vector: Tensor, position: int) -> Tensor:
    """The vector (D) as it is at this position."""
    return Rotary.at(torch.tensor([[position]]), CONFIG.head_dim, CONFIG.rope_theta).rotate(vector[None])[0, 0, 0]


first, its_partner = vector[0], vector[CONFIG.head_dim // 2]  # the halves of the vector are paired
same(turned(vector, 7)[0], first * math.cos(7) - its_partner * math.sin(7))
same(turned(vector, 7).norm(), vector.norm())  # turning changes no length

# %% [markdown]
# Why turn? A dot product depends on the lengths of two vectors, which turning leaves alone, and on the angle between
# them. Turn both by the same amount and it stays. So the score of a pair depends on how far apart they are, not on
# where they are in the text.

# %%
query, key = torch.randn(2, CONFIG.head_dim)


def score(query_position: int, key_position: int) -> Tensor:
    return turned(query, query_position) @ turned(key, key_position)


same(score(5, 3), score(1005, 1003), rtol=1e-3, atol=1e-4)  # two apart here, two apart there
assert (score(5, 3) - score(5, 4)).abs() > 1e-3  # one apart is something else

# %% [markdown]
# ### How far back? The window
#
# A character looks at itself and the 63 before it, no farther. So a text may go on for ever at the same cost per
# character. A later layer still hears of older things: what it looks at has itself looked back. Here is a window of 4
# as a picture, and then the real one.

# %%
for row in window_mask(torch.arange(8), torch.arange(8), context_length=4):
    print("".join("#" if may_look else "." for may_look in row.tolist()))

long = torch.tensor(tokenizer.encode(corpus.train[:100]))
rotary_long = Rotary.at(torch.arange(100)[None], CONFIG.head_dim, CONFIG.rope_theta)
vectors = model.embedding(long[None])
changed = vectors.clone()
changed[0, 0] += 1  # another first character
attend_long = attend_in_window(CONFIG.context_length, 100, long.device)
before, after = (attention(each, rotary_long, attend_long)[0] for each in (vectors, changed))
difference = (before - after).abs().amax(-1)
assert (difference[:64] > 1e-6).all()  # the first 64 positions see it
assert (difference[64:] < 1e-6).all()  # no later one does

# %% [markdown]
# ## 3. One expert
#
# After looking around, a character's vector is worked on by itself. In an ordinary model one small network does this
# for all. In ours there are eight of them, the **experts**. They have the same form and different weights.
#
# An expert has three matrices. `gate` and `up` each make 96 new numbers from the vector. The first go through silu(z)
# = z * sigmoid(z), which is nearly 0 for negative z and nearly z for positive z: a soft switch. They decide how much
# of the second come through. `down` leads back to the 96 channels. This form is called SwiGLU.

# %%
looked_around = model.embedding(ids[None]) + attention(x, rotary, attend)
tokens = layer.moe_norm(looked_around)[0]  # (T, C)
experts = layer.moe.experts


def expert(number: int, token: Tensor) -> Tensor:
    """What one expert makes of one vector: (C) -> (C)"""
    gate, up = experts.gate_up[number]
    return experts.down[number] @ (F.silu(gate @ token) * (up @ token))


z = torch.linspace(-5, 5, 11)
same(F.silu(z), z * z.sigmoid())
to_expert_3 = Routing(torch.zeros(1, CONFIG.num_experts), torch.tensor([[3]]), expert_weights=torch.ones(1, 1))
same(expert(3, tokens[0]), experts(tokens[:1], to_expert_3)[0])

# %% [markdown]
# ## 4. The router
#
# Who works on which character? The router has one row of 96 numbers for each expert. Its dot product with the vector
# is the expert's **logit**: how well they fit. The two highest win. The softmax of these two logits gives the
# **weights** with which the two outputs are added.

# %%
router = layer.moe.router
logits = tokens @ router.weight.T  # (T, E)
best, expert_ids = logits.topk(2)
expert_weights = best.softmax(-1)
for character, chosen, share in zip(text[:5], expert_ids.tolist(), expert_weights.tolist(), strict=False):
    print(f"{character} goes to experts {chosen} with weights {share[0]:.2f} and {share[1]:.2f}")

routing = router(tokens)
same(routing.expert_weights, expert_weights)
assert torch.equal(routing.expert_ids, expert_ids)

# %% [markdown]
# The same said in another way: take the probabilities over all eight, keep the two largest, and scale them so that
# they sum to 1. And a question: how does the router learn, if picking the best two is not a smooth function? Through
# the weights. They are a smooth function of the two logits, so the loss tells the router which of the two deserved
# more.

# %%
kept = logits.softmax(-1).topk(2).values
same(kept / kept.sum(-1, keepdim=True), expert_weights)

trainable = router.weight.clone().requires_grad_()
(tokens[0] @ trainable.T).topk(2).values.softmax(-1)[0].backward()
felt_it = trainable.grad.abs().sum(-1).nonzero().flatten()
assert sorted(felt_it.tolist()) == sorted(expert_ids[0].tolist())  # and nobody else: the others got no gradient

# %% [markdown]
# ## 5. Noise
#
# The last line shows a danger. An expert that is not chosen learns nothing, so it gets no better, so it is not
# chosen. Early luck decides, and a few experts end up with all the work.
#
# Shazeer et al. (2017, eq. 3-5) answer with noise. While training, every logit gets a random number on top:
#
#     H(x)_i = (x W_g)_i + standard normal * softplus((x W_noise)_i)
#     G(x)   = softmax(the two largest of H(x), minus infinity for the rest)
#
# Now the third best expert is tried now and then, and if it does well it hears about it. How loud the noise is, for
# each expert and each character, the matrix W_noise learns. It starts at zero: softplus(0) = ln 2.

# %%
noisy = TrainingConfig(router_noise="gaussian", shape=SHAPE)
w_noise = noise_weights(noisy, CONFIG, ids.device)
chance = chance_in(noisy, w_noise, step=0, x=ids[None])
routing = router(tokens, chance=chance.layer(0))

(first_layer, *_) = w_noise.values()
same(routing.noise.std, F.softplus(tokens @ first_layer.T))
same(routing.noise.std, torch.full_like(logits, math.log(2)))
same(routing.logits, logits + routing.noise.added)
same(routing.expert_weights, routing.logits.topk(2).values.softmax(-1))
assert not torch.equal(routing.expert_ids, expert_ids)  # the noise changed somebody's mind

# %% [markdown]
# How often is each expert tried? We send the same character 4,000 times. Without noise two experts would get all of
# it. The paper also gives a formula for the probability that expert i is among the best K (appendix A);
# `balance.load` sums it over the characters. It agrees with our counting.

# %%
crowd = tokens[:1].expand(4000, -1)
chance = chance_in(noisy, w_noise, step=0, x=torch.zeros(1, 4000))
routing = router(crowd, chance=chance.layer(0))
tried = routing.expert_ids.flatten().bincount(minlength=CONFIG.num_experts) / 4000
formula = balance.load(routing) / 4000
for number in range(CONFIG.num_experts):
    print(f"expert {number}: logit {logits[0, number]:5.2f}, tried {tried[number]:.1%}, formula {formula[number]:.1%}")

assert (tried > 0).sum() > 2
same(tried, formula, rtol=0, atol=0.03)

# %% [markdown]
# When the model is used there is no noise: the same text always meets the same experts. Our own training does without
# noise too. A term of the loss keeps the experts busy, and we come to it in section 8.
#
# ## 6. The sparse block
#
# Router and experts together. For every character, its two experts' outputs, each times its weight, added up:

# %%
moe = layer.moe
y, routing = moe(tokens)
rows = []
for token, chosen, share in zip(tokens, routing.expert_ids.tolist(), routing.expert_weights, strict=True):
    rows.append(share[0] * expert(chosen[0], token) + share[1] * expert(chosen[1], token))

same(torch.stack(rows), y)

# %% [markdown]
# This is why it is called sparse: all eight experts' weights are there, but a character is multiplied with two of
# them. The model knows as much as its size allows and costs as little as its active part. (The real code does not
# loop over characters. It sorts them by expert and multiplies group by group, which gives the same sums faster.)

# %%
print(f"{CONFIG.num_parameters:,} parameters, {CONFIG.num_active_parameters:,} of them at work for a character")

assert sum(parameter.numel() for parameter in model.parameters()) == CONFIG.num_parameters
one_expert = 3 * CONFIG.hidden_size * CONFIG.expert_size  # gate, up and down
idle = CONFIG.num_layers * (CONFIG.num_experts - CONFIG.experts_per_token) * one_expert
assert CONFIG.num_parameters - CONFIG.num_active_parameters == idle

# %% [markdown]
# ## 7. The whole model
#
# Characters become vectors (the embedding). Each layer adds something to them, twice: what attention brought and what
# the experts made of it. It adds, it does not replace, so nothing gets lost on the way. At the end a matrix, the
# head, turns each vector into 65 logits: one for every character that may come next.

# %%
attend = attend_in_window(CONFIG.context_length, len(ids), ids.device)
stream_of_vectors = model.embedding(ids[None])  # (1, T, C)
for block in model.layers:
    stream_of_vectors = stream_of_vectors + block.attention(block.attention_norm(stream_of_vectors), rotary, attend)
    stream_of_vectors = stream_of_vectors + block.moe(block.moe_norm(stream_of_vectors))[0]
next_logits = model.head(model.norm(stream_of_vectors))  # (1, T, V)

same(next_logits, model(ids[None])[0])

# %% [markdown]
# Every position guesses its own next character, and none can see it. Change the last character, and only the last
# guess changes. So one pass over a text trains all its positions at once.

# %%
other = ids.clone()
other[-1] = (other[-1] + 1) % CONFIG.vocab_size
other_logits, _ = model(other[None])

same(other_logits[0, :-1], next_logits[0, :-1])
assert not torch.allclose(other_logits[0, -1], next_logits[0, -1])

# %% [markdown]
# ## 8. Training
#
# The loss is -ln(probability that the model gave to the character that really came), averaged: 0 if it is always sure
# and right. Training starts from weights chosen so that the head says nothing at all. Then all 65 characters are
# equally likely, and the loss is ln 65 = 4.17. We measure on 96 windows of 64 characters of the validation text.

# %%
trained = TrainingConfig(corpus="tinyshakespeare", steps=STEPS, batch_size=24, warmup_steps=10, shape=SHAPE)
trainer = Trainer(trained, corpus, run=Path("runs/walkthrough"), device=torch.device("cpu"))
model = trainer.model
inputs, targets = spread_windows(trainer.validation_ids, CONFIG.context_length, most=96)
before = float(window_losses(model, inputs, targets).mean())
print(f"before: {before:.4f}")

assert abs(before - math.log(65)) < 1e-5
twin = Transformer(CONFIG)
initialise(twin, trained.seed)  # the same seed, the same first weights
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

# %% [markdown]
# One more term keeps the experts busy. Switch Transformer's balance loss (Fedus et al. 2021, eq. 4-6) is E * sum over
# experts of (share of the work it gets) * (mean probability the router gives it). Even work gives 1. If the same K
# experts get all of it, each has a share of 1/K, and it gives E/K. Training presses it down with a small weight, 0.01
# per layer. A second small term, z, keeps the router's logits from growing.

# %%
x, y = trainer.batch(step=0)  # 24 windows, and the same moved on by one character
logits, routings = model(x)
loss, cross_entropy = objective(logits, y, routings, trained)

correct = logits.log_softmax(-1).gather(-1, y[..., None])  # ln(probability of what really came)
same(cross_entropy, -correct.mean())
total = cross_entropy.clone()
for routing in routings:
    work = routing.expert_ids.flatten().bincount(minlength=CONFIG.num_experts) / routing.expert_ids.numel()
    switch = CONFIG.num_experts * (work * routing.logits.softmax(-1).mean(0)).sum()
    total += trained.balance_weight * switch + trained.z_weight * routing.logits.logsumexp(-1).square().mean()
same(loss, total)

# %% [markdown]
# The two ends of the balance loss, checked with one expert per character: a router that spreads the work, and one that
# gives all to expert 0. With K = 1 that is E.

# %%
even = Routing(torch.zeros(8, 8), expert_ids=torch.arange(8)[:, None], expert_weights=torch.ones(8, 1))
one_for_all = torch.zeros(8, 8)
one_for_all[:, 0] = 100.0
collapsed = Routing(one_for_all, expert_ids=torch.zeros(8, 1, dtype=torch.int64), expert_weights=torch.ones(8, 1))

same(balance.switch_loss(even), torch.tensor(1.0))
same(balance.switch_loss(collapsed), torch.tensor(8.0))

# %% [markdown]
# Now train. A step takes 24 windows from the training text, computes the loss, lets PyTorch find how each weight
# changes it, and moves all weights a little downhill. How far is a matter of its own: the matrices of attention and
# experts are moved by Muon, which makes every step of a matrix equally long in all its directions, and the rest by
# AdamW (`training/optimizer.py`). `train_step` does all of that. This cell takes the two minutes.

# %%
started = time.monotonic()
for step in range(STEPS):
    train_loss = trainer.train_step(step)
    if step % max(1, STEPS // 8) == 0 or step == STEPS - 1:
        print(f"step {step:4}: loss {train_loss:.3f}")
after = float(window_losses(model, inputs, targets).mean())
print(f"{time.monotonic() - started:.0f} seconds; validation loss before {before:.3f}, after {after:.3f}")

assert after < before

# %% [markdown]
# Is that good? A table of which character follows which, counted in the same training text, needs no network at all.
# A model that looked no farther back than one character could hardly beat it.

# %%
ours = evaluate(model, trainer.validation_ids).loss  # on all of the validation text
pairs = bigram_loss(trainer.train_ids, trainer.validation_ids, CONFIG.vocab_size)
print(f"a table of pairs: {pairs:.3f}, our model: {ours:.3f}")
print(f"as sure as one who always gives the right character {math.exp(-ours):.0%}")

# %% [markdown]
# ## 9. Sampling: the model writes
#
# The model gives 65 probabilities, and we draw one character, append it and ask again. A **temperature** below 1
# divides the logits first, which makes likely characters likelier still. To draw, lay the probabilities end to end on
# a line from 0 to 1 and throw a dart. Ours is a fixed function of a seed and the position, so a text can be made
# again.

# %%
prompt = tokenizer.encode("ROMEO:\n")
last = model(torch.tensor([prompt]))[0][:, -1].detach()  # (1, V)
probabilities = (last.double() / 0.8).softmax(-1)[0]
for probability, number in zip(*probabilities.topk(5), strict=True):
    print(f"{tokenizer.tokens[number]!r} {probability:.1%}")

position = torch.tensor([len(prompt)])
dart = uniform(torch.tensor([1]), position)
hit = int((probabilities.cumsum(-1) <= dart).sum())
options = sampling_options(model.device, temperature=0.8, top_k=0, top_p=1.0, seed=1)
assert hit == int(draw(last, options, position))

# %% [markdown]
# `generate` reads the whole text again for every new character. `stream` keeps the keys and values of the last 64
# characters and reads only the new one; that is how the service does it. Both write the same.

# %%
model.requires_grad_(False)
written = list(stream(model, prompt, 300, temperature=0.8, top_k=0, top_p=1.0, seed=1))
print("ROMEO:\n" + tokenizer.decode(written))

assert written[0] == hit
assert written[:40] == generate(model, prompt, 40, temperature=0.8, seed=1)

# %% [markdown]
# ## 10. Who does the work?
#
# We count how many characters went to each expert on the validation text. With perfect balance each would do an
# eighth.

# %%
_, routings = model(inputs)
counts = expert_counts(routings, CONFIG.num_experts)  # (L, E)
for number, row in enumerate(counts):
    print(f"layer {number}: busiest {max_load_ratio(row):.2f} x the mean")
    for one, share in enumerate((row / row.sum()).tolist()):
        print(f"  expert {one} {share:6.1%} {'#' * round(100 * share)}")

assert (counts.sum(-1) == 2 * inputs.numel()).all()  # every character counts for its two experts
same(max_load_ratio(counts), counts.max(-1).values / counts.double().mean(-1))

# %% [markdown]
# And what do they like? For each expert, the characters that it took most of beyond its share. Nobody told them to
# divide the work in this way.

# %%
choices = count_choices(model, inputs)  # (L, E, V)
liked = favourites(choices, tokenizer.tokens, CONFIG.experts_per_token)
for number in range(CONFIG.num_experts):
    print(f"layer 0, expert {number}:", " ".join(repr(each["token"]) for each in liked[0][number]))

assert torch.equal(choices.sum(-1), counts)

# %% [markdown]
# ## 11. Silencing an expert
#
# What an expert likes is one thing. Whether it is needed is another, and there is an honest way to find out: forbid
# it, and look what happens. `disabled` takes an expert's logit out before the best two are picked, so its characters
# go to their next choice. The loss without it, minus the loss with it, is what it is worth.

# %%
costs = causal_map(model, inputs, targets)
for number, row in enumerate(costs.cost):
    print(f"layer {number}:", " ".join(f"{cost:+.3f}" for cost in row.tolist()))
silent_layer, silent_expert = divmod(int(costs.cost.argmax()), CONFIG.num_experts)
print(f"most: expert {silent_expert} of layer {silent_layer}; two closer than about {costs.error.max():.4f} are equal")

disabled = torch.zeros(1, CONFIG.num_layers, CONFIG.num_experts, dtype=torch.bool)
disabled[0, silent_layer, silent_expert] = True
without = float(window_losses(model, inputs, targets, disabled).mean())
assert abs(without - after - float(costs.cost.max())) < 1e-5

# %% [markdown]
# The others take over, and their weights still sum to 1.

# %%
_, routings = model(inputs, disabled)
silenced = routings[silent_layer]
same(silenced.expert_weights.sum(-1), torch.ones(inputs.numel()))
left = expert_counts(routings, CONFIG.num_experts)
assert left[silent_layer, silent_expert] == 0
assert (left.sum(-1) == counts.sum(-1)).all()  # no work was lost
assert torch.equal(left[:silent_layer], counts[:silent_layer])  # the layers before it notice nothing

# %% [markdown]
# And the text? The same prompt, the same seed, the same darts, one expert fewer. The expert worked on many of the
# characters, and yet the texts part only where a dart, the probabilities having moved, first lands on another one.

# %%
with_it = generate(model, prompt, 120, temperature=0.8, seed=1)
without_it = generate(model, prompt, 120, temperature=0.8, seed=1, disabled=disabled)
print("with it:\n" + tokenizer.decode(with_it))
print("\nwithout it:\n" + tokenizer.decode(without_it))

assert with_it == written[:120]

# %% [markdown]
# ## Where to go from here
#
# - Change `SHAPE`: 16 experts, or narrower ones. What becomes of the loss, and of the balance?
# - Put `balance_weight=0.0` into the `TrainingConfig` of section 8 and look at section 10 again. Then add
#   `router_noise="gaussian"`.
# - `make train` trains a bigger model for a few minutes and says how to serve it; `make serve` alone serves the best
#   one that we have trained. A request can silence experts: `disabled_experts`.
