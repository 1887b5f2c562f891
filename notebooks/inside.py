# %% [markdown]
# # A captioning model from the inside
#
# A model looks at a photograph and writes a sentence about it. This notebook takes one apart while it does so: what it
# sees, where it looks, how it chooses each word, and what becomes of the sentence if we interfere. It needs no data and
# no GPU, and runs from top to bottom in less than two minutes on two CPU cores.
#
# **On your own machine**, in the folder of the repository:
#
# ```bash
# pip install -r requirements.txt jupyterlab
# jupyter lab notebooks/inside.ipynb
# ```
#
# **On Colab**, open a new notebook and run in its first cell (put the repository's address for ADDRESS, and the name of
# the folder that git makes for FOLDER)
#
# ```
# !git clone ADDRESS
# %cd FOLDER
# !pip install -r requirements.txt
# ```
#
# then copy the cells from here, or open this file with *File, Open notebook, GitHub* and put these three lines first.
#
# You should know what a convolution, a softmax and an LSTM are. Shapes stand at the end of the lines, with the letters
# of [models.py](../models.py): C features of each of P regions, A and D the dimensions of attention and of the LSTM's
# state, E that of a word's embedding, V words in the vocabulary. There is one picture, so the first dimension is 1.

# %%
import os
import sys
from contextlib import contextmanager

sys.path.insert(0, "..")  # the repository, if Jupyter started here in notebooks/
sys.path.insert(0, ".")   # or if it started there

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F

from caption import Search, caption_images, load
from datasets import normalize, read_image, reverse
from img.draw import gazes
from img.record import grow
from models import alpha_entropy

# A checkpoint that you trained can take the place.
MODEL = os.environ.get("INSIDE_MODEL")  # None: the one that comes with the repository
LONGEST = 20  # words of a sentence, at most

torch.set_grad_enabled(False)  # nothing is trained here
model = load(MODEL, device="cpu")
encoder, decoder, word_map = model.encoder, model.decoder, model.word_map
word_of = reverse(word_map)
weights = [sum(each.numel() for each in part.parameters()) / 1e6 for part in (encoder, decoder)]
print(f"{len(word_map)} words; million weights: {weights[0]:.1f} of the encoder, {weights[1]:.1f} of the decoder")

# %% [markdown]
# ## 1. A sentence for a photograph
#
# First the whole thing, before we open it. The photographs are scikit-image's. The model was trained on Flickr8k, which
# is people and dogs outdoors. A photographer on a lawn belongs to that world; a cat's face or a cup of coffee does not.
# The model has no way to say that it does not know. It has to make a sentence, of the words it has.

# %%
names = ("camera", "astronaut", "chelsea", "coffee")
photographs = {name: Image.fromarray(getattr(skimage.data, name)()) for name in names}


def say(photograph, **settings):
    """The best caption, as caption.py finds it."""
    [[best]] = caption_images(model, photograph, max_len=LONGEST, **settings)
    return best


def sentence(words):
    return " ".join(words)


_, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
for ax, (name, photograph) in zip(axes, photographs.items(), strict=True):
    ax.imshow(photograph, cmap="gray")
    ax.set_title(name)
    ax.axis("off")
    print(f"{name:>10}: {sentence(say(photograph).words)}")

# %% [markdown]
# From here on we stay with one photograph. Put another name here and run the rest again; with a file of your own it is
# `photograph = Image.open("photo.jpg")`.

# %%
photograph = photographs["camera"]

# %% [markdown]
# ## 2. What the encoder hands over
#
# The encoder is an image classifier without its head. It gets the picture as 256 x 256 pixels, squeezed to a square
# whatever its shape was, and returns a grid of regions with a vector of features for each: the paper's *annotation
# vectors* $a_i$. This is all that the decoder ever learns of the photograph. If something is not in these numbers, no
# attention can find it.

# %%
pixels = torch.from_numpy(read_image(photograph)).unsqueeze(0)              # (1, 3, 256, 256), bytes
images = normalize(pixels, pixels.device, encoder.pixels)                   # the same as floats, as ImageNet's were
features = encoder(images)                                                  # (1, side, side, C)
side = features.size(1)
seen = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())                  # what the model sees, for our figures
print(f"{side} x {side} regions, each with {features.size(3)} features")

# %% [markdown]
# What do the features know? Here are two ways to look at them, each for two regions that are marked in the first panel.
# Regions can be compared by the angle between their vectors: the second and the fourth panel show how similar all
# others are to the marked one (the cosine, after subtracting what all regions have in common). And one channel is a
# picture of `side` x `side` numbers, which shows where something is that it responds to: the third and the fifth panel
# show the channel that sets the marked region apart from the others most. Neighbours are alike for another reason, too.
# Each vector describes a part of the picture that is larger than its own cell.

# %%
def show_features(*marked):
    """What regions (row, column) have in common with the others, and what sets them apart."""
    flat = features.flatten(1, 2)[0]                                        # (P, C)
    own = flat - flat.mean(dim=0)                                           # (P, C), without what all have in common
    _, axes = plt.subplots(1, 1 + 2 * len(marked), figsize=(12, 2.7), layout="constrained")
    axes[0].imshow(seen, extent=(0, side, side, 0))
    for (row, column), color, left, right in zip(marked, ("red", "blue"), axes[1::2], axes[2::2], strict=True):
        axes[0].add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor=color, linewidth=2))
        i = row * side + column
        left.imshow((F.normalize(own, dim=1) @ F.normalize(own[i], dim=0)).view(side, side), vmin=-1, vmax=1)
        left.set_title(f"similar to {color}")
        channel = (own[i] / own.std(dim=0).clamp(min=1e-6)).argmax().item()
        right.imshow(flat[:, channel].view(side, side))
        right.set_title(f"channel {channel}")
    for ax in axes:
        ax.axis("off")


show_features((side // 3, side // 3), (side - 1, side // 2))

# %% [markdown]
# ## 3. One look
#
# The decoder is an LSTM that asks, before each word, how much to look at each region. Its state $h$ says what it is
# looking for; a small network scores how well each region fits, and a softmax makes weights of the scores:
#
# $$e_i = w^\top \mathrm{ReLU}(W_a a_i + W_h h), \qquad \alpha = \mathrm{softmax}(e), \qquad z = \sum_i \alpha_i a_i$$
#
# The context $z$ is what it sees. It has the shape of one region's features, because it is a mixture of them. Before
# the first word the state is made of the mean of all regions, so the decoder knows roughly what the picture is about
# before it has looked anywhere. Here is the first look, with the layers of `decoder.attention` called one by one, and
# the same numbers from the module itself.

# %%
annotations, (h, c) = decoder.start(features)                               # h and c (1, D)
attention = decoder.attention

a = features.flatten(1, 2)                                                  # (1, P, C)
keys = attention.encoder_att(a)                                             # (1, P, A), W_a a: the same for every word
query = attention.decoder_att(h)                                            # (1, A), W_h h: another one for every word
e = attention.full_att(torch.relu(keys + query.unsqueeze(1))).squeeze(2)    # (1, P), the paper's equation 4
alpha = e.softmax(dim=1)                                                    # (1, P), equation 5
z = (alpha.unsqueeze(2) * a).sum(dim=1)                                     # (1, C), equation 13

context, weights = attention(annotations, h)
torch.testing.assert_close(alpha, weights)
torch.testing.assert_close(z, context)
print(f"the weights sum to {alpha.sum():.4f}; the largest is {alpha.max():.3f}, of an even gaze {1 / side ** 2:.3f}")

# %%
_, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
axes[0].imshow(seen)
for ax, values, title in ((axes[1], e, "scores e"), (axes[2], alpha, "weights alpha = softmax(e)")):
    shown = ax.imshow(values.view(side, side), cmap="magma", vmin=0 if values is alpha else None)
    ax.set_title(title)
    plt.colorbar(shown, ax=ax)
for ax in axes:
    ax.axis("off")

# %% [markdown]
# ## 4. Word by word
#
# Now the whole decoder. At each step it looks (with the state of the step before), the *gate* turns each feature of
# what it saw up or down, and the LSTM cell takes the last word together with that and moves on to the next state. A
# linear layer scores all words of the vocabulary, and *greedy* decoding takes the most probable one. The new word is
# the next step's input, and so on, until the word is `<end>`.
#
# `begin` is for later: words that are put into the decoder's mouth instead of its own. And three entries of the
# vocabulary are no words that one could say (`<start>`, `<pad>`, `<unk>`), so they are never chosen.

# %%
never = [word_map[word] for word in Search().forbidden]


def greedy(features, begin=()):
    """Ids from <start> on, and of each step the probabilities (V,), the weights (P,) and the gate (C,)."""
    annotations, (h, c) = decoder.start(features)                           # h and c (1, D)
    ids, steps = [word_map["<start>"]], []
    while ids[-1] != word_map["<end>"] and len(steps) < LONGEST:
        context, alpha = decoder.attention(annotations, h)                  # (1, C), (1, P)
        gate = torch.sigmoid(decoder.f_beta(h))                             # (1, C)
        word = decoder.embedding(torch.tensor(ids[-1:]))                    # (1, E)
        h, c = decoder.decode_step(torch.cat([word, gate * context], dim=1), (h, c))    # input (1, E + C)
        probabilities = decoder.fc(h).softmax(dim=1)[0]                     # (V,)
        probabilities[never] = 0
        forced = len(steps) < len(begin)
        ids.append(word_map[begin[len(steps)]] if forced else probabilities.argmax().item())
        steps.append((probabilities, alpha[0], gate[0]))
    return ids, steps


def words_of(ids):
    return [word_of[i] for i in ids[1:] if word_of[i] != "<end>"]


ids, steps = greedy(features)
print(sentence(words_of(ids)))

# %% [markdown]
# That loop is all there is to it. `caption.py` does the same for many pictures and several hypotheses at once, and with
# a beam of one hypothesis it must find the same words and look at the same places:

# %%
best = say(photograph, beam_size=1)
assert best.sequence == ids
alphas = np.stack([alpha.numpy() for _, alpha, _ in steps])                 # (T, P)
np.testing.assert_allclose(best.sequence_alphas[1:].reshape(len(steps), -1), alphas, atol=1e-4)
print("the same, word for word")

# %% [markdown]
# Where it looked, word by word. Bright is where the weight is, full at a word's highest weight. Such a figure is easily
# misread. The weights under a word were computed *before* the word was known, from the state after the words that came
# earlier, so they show where the decoder looked in order to find it. And that state has not even read the word before:
# this one enters the LSTM cell together with what was seen. What the sixth look depends on are the first four words.

# %%
def show(image):
    """A picture of Pillow's, pixel by pixel."""
    figure = plt.figure(figsize=(image.width / 100, image.height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image)
    axes.axis("off")


def show_gaze(words, alphas):
    """The photograph, and where the model looked for each word: alphas (T, P)."""
    maps = np.asarray(alphas).reshape(len(alphas), side, side)
    show(gazes(seen, {"words": words, "alphas": maps[:len(words)]}, across=6, large=180, small=110))


show_gaze(words_of(ids), alphas)

# %% [markdown]
# ## 5. How sure, how wide, how much
#
# Three numbers for each step: the probability of the word that was chosen; the mean of the gate, which says how much of
# what it saw the decoder let in; and how wide it looked, as the entropy of the weights divided by the largest possible
# one, $\ln P$: near 1 it looks everywhere alike, at 0 at a single region. After "in front" the sentence itself leaves
# little doubt that "of" comes next, and the picture is not needed. Is the probability high at such words, and the gate
# lower? Nothing in the loss asks for the latter.

# %%
def by_word(ax, labels):
    """The words below, the legend beside."""
    ax.set_xticks(range(len(labels)), labels, rotation=30)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


labels = [word_of[i] for i in ids[1:]]
probability = [p[i].item() for (p, _, _), i in zip(steps, ids[1:], strict=True)]
opened = [gate.mean().item() for _, _, gate in steps]
width = alpha_entropy(torch.from_numpy(alphas).unsqueeze(0))[0] / np.log(side ** 2)     # (T,)

_, ax = plt.subplots(figsize=(10, 3), layout="constrained")
ax.bar(range(len(labels)), probability, color="#cfe3d6", label="probability of the word")
ax.plot(width, "o-", color="#d0812f", label="width of the gaze")
ax.plot(opened, "s-", color="#5b7db1", label="gate, mean")
ax.set_ylim(0, 1.05)
by_word(ax, labels)

# %% [markdown]
# And the words that it nearly said. Where the first has 90 %, the sentence was settled; where it has 20 %, the sentence
# could have gone elsewhere, and section 7 makes it do so.

# %%
for p, _, _ in steps:
    first, *others = [f"{word_of[i]} {p[i]:.0%}" for i in p.topk(5).indices.tolist()]
    print(f"{first:>20}   {', '.join(others)}")

# %% [markdown]
# ## 6. A beam
#
# Greedy decoding cannot take a word back. The most probable word now may lead to a sentence that is not the most
# probable one. A *beam search* follows several beginnings at once, here three: each is continued by its three best
# words, and of all these continuations the three best survive. A sentence's score is the sum of its words'
# log-probabilities. One that reaches `<end>` is set aside, and the beam is one narrower from then on, until none is
# left. `grow` in [img/record.py](../img/record.py) does this slowly, and keeps what a search usually throws away.
#
# Time runs downwards, the best candidate of each step is on the left. Green ones survive, orange ones end a sentence,
# grey ones are dropped. After two steps, and after four:

# %%
COLORS = {"kept": ("#e3f2e8", "#559b6d"), "ended": ("#fdead6", "#d0812f"), "dropped": ("white", "#b9c1cd")}


def draw_tree(levels, winner=()):
    """Each step's candidates (parent, word, log-probability, fate) below those before; the winner's path is bold."""
    wide = max(map(len, levels))
    _, ax = plt.subplots(figsize=(1.25 * wide, 0.62 * len(levels) + 0.5), layout="constrained")
    ax.text(0, 0, "<start>", ha="center", va="center", fontsize=10)
    places = {(-1, 0): (0, 0)}                                              # (step, rank): where it is drawn
    for t, level in enumerate(levels):
        for rank, (parent, word, log_prob, fate) in enumerate(level):
            x, y = places[t, rank] = rank - (len(level) - 1) / 2, -t - 1
            from_x, from_y = places[t - 1, parent]
            fill, line = COLORS[fate]
            bold = (t, rank) in winner
            ax.plot((from_x, x), (from_y - 0.25, y + 0.25), color=line, linewidth=3 if bold else 1)
            ax.text(x, y, f"{word}\n{log_prob:.2f}", ha="center", va="center", fontsize=9, linespacing=1.1,
                    weight="bold" if bold else "normal", color="#7d8797" if fate == "dropped" else "black",
                    bbox={"boxstyle": "round,pad=0.25", "facecolor": fill, "edgecolor": line})
    ax.set(xlim=(-wide / 2, wide / 2), ylim=(-len(levels) - 0.5, 0.4))
    ax.axis("off")


levels = grow(decoder, features, word_map, beam_size=3, max_len=LONGEST)
draw_tree(levels[:2])
draw_tree(levels[:4])

# %% [markdown]
# The whole search. Of the sentences that ended, the one with the highest score wins; its path is bold, and it is what
# `caption.py` finds with the same beam. Follow it upwards: it need not have been in the lead at every step. Each word's
# logarithm is negative, so that scores only fall, and this way of choosing favours short sentences.

# %%
ended = [(log_prob, t, rank) for t, level in enumerate(levels) for rank, (_, _, log_prob, fate) in enumerate(level)
         if fate == "ended"]
log_prob, t, rank = max(ended)
path = [(t, rank)]
while t > 0:
    t, rank = t - 1, levels[t][rank][0]
    path.insert(0, (t, rank))
draw_tree(levels, path)

found = say(photograph, beam_size=3)
assert found.words == [levels[t][rank][1] for t, rank in path[:-1]]
greedy_log_prob = say(photograph, beam_size=1).log_prob
print(f"beam of 3: {sentence(found.words)} ({found.log_prob:.2f})")
print(f"greedy:    {sentence(words_of(ids))} ({greedy_log_prob:.2f})")

# %% [markdown]
# ## 7. Words put into its mouth
#
# The decoder does not know who chose the words that it reads. If we choose the first ones, it goes on as if they had
# been its own. The percentage is how probable it found that beginning. Watch what follows it. After "two" a plural is
# due, and to know that it needs no picture; with a dog that is not there, what it reads and what it sees are at odds.

# %%
for begin in ("a man", "a woman", "two", "the", "a dog", "there is"):
    said, asked = greedy(features, begin.split())
    n = len(begin.split())
    given = np.prod([p[i].item() for (p, _, _), i in zip(asked[:n], said[1:n + 1], strict=True)])
    print(f"{given:8.2%}  {begin} | {sentence(words_of(said)[n:])}")

# %% [markdown]
# Now its own second choices. At each word of the greedy sentence in turn it has to take the runner-up, in capitals, and
# may then go on freely. In some places the sentence comes back to what it was, in others it becomes another sentence.

# %%
own = words_of(ids)
print(sentence(own))
for t, (p, _, _) in enumerate(steps[:len(own)]):
    second = word_of[p.topk(2).indices[1].item()]
    said = words_of(greedy(features, [*own[:t], second])[0])
    print(f"{p.topk(2).values[1]:6.0%}  {sentence([*said[:t], second.upper(), *said[t + 1:]])}")

# %% [markdown]
# Does it also look elsewhere? We compare "a man in" with "a dog in". As the state has not read the last word when the
# weights are computed, the look after "a man" and the one after "a dog" must be the same, to the last digit. The next
# one may differ, and the third panel shows where weight came (red) and went (blue).

# %%
looks = {begin: [alpha for _, alpha, _ in greedy(features, begin.split())[1]] for begin in ("a man in", "a dog in")}
man, dog = looks.values()                                                   # of each step (P,)
assert torch.equal(man[2], dog[2])                                          # after "a man" and "a dog"
_, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
highest = max(man[3].max(), dog[3].max())
for ax, alpha, begin in zip(axes, (man[3], dog[3]), looks, strict=False):
    ax.imshow(alpha.view(side, side), cmap="magma", vmin=0, vmax=highest)
    ax.set_title(f"after \"{begin}\"")
change = dog[3] - man[3]                                                    # (P,)
axes[2].imshow(change.view(side, side), cmap="RdBu_r", vmin=-change.abs().max(), vmax=change.abs().max())
axes[2].set_title(f"{change.abs().sum() / 2:.0%} of the weight has moved")
for ax in axes:
    ax.axis("off")

# %% [markdown]
# ## 8. Attention taken away
#
# All of attention comes down to one method, `weigh`, which returns the weights. So we can exchange them for others and
# leave everything else as it is, the search included:
#
# - **everywhere alike**: each region weighs the same, and the context is the mean of the picture at every step;
# - **the opposite place**: its own weights, on a map that was turned by 180 degrees;
# - **nowhere**: all weights are 0, and so is the context. What the sentence still knows of the picture is in the LSTM's
#   first state, which is made of the mean of the features and is not touched.
#
# If it looks nowhere, and says the same of all photographs, then you read what it says out of habit. The model was
# trained with its own weights and never saw any of these. So this shows how much *this* model leans on looking, and not
# how well one does that was trained without: for that, train one with `--attention mean` ([RESULTS.md](../RESULTS.md)
# has such pairs).

# %%
@contextmanager
def looking(change):
    """Inside, the decoder's weights (R, P) are what `change` makes of them."""
    weigh = decoder.attention.weigh
    decoder.attention.weigh = lambda annotations, h: change(weigh(annotations, h))
    try:
        yield
    finally:
        del decoder.attention.weigh  # of this object alone; the class's own is there again


WAYS = {"as trained": lambda alpha: alpha,
        "everywhere alike": lambda alpha: torch.full_like(alpha, 1 / alpha.size(1)),
        "the opposite place": lambda alpha: alpha.flip(1),
        "nowhere": torch.zeros_like}

for name, each in photographs.items():
    print(name)
    for way, change in WAYS.items():
        with looking(change):
            print(f"{way:>20}: {sentence(say(each, beam_size=3).words)}")

# %% [markdown]
# A caption can stay the same although the model was hardly able to find it, or change because two sentences were close.
# A finer measure takes the sentence that it says as trained, and asks how probable each of its words is if it looks in
# another way. A long bar downwards: for this word it needed to look there. If the bars of "everywhere alike" are short,
# the mean of the picture would have done.

# %%
def log_probs(sequence):
    """Of each word after <start>, with the true words as input, (T,)."""
    captions = torch.tensor([sequence])                                     # (1, T + 1)
    scores = decoder(features, captions, torch.tensor([[len(sequence)]]))[0]            # (1, T, V)
    return scores.log_softmax(dim=2)[0].gather(1, captions[0, 1:].unsqueeze(1)).squeeze(1)


trained = log_probs(found.sequence)
_, ax = plt.subplots(figsize=(10, 3), layout="constrained")
for i, way in enumerate(list(WAYS)[1:]):
    with looking(WAYS[way]):
        change = log_probs(found.sequence) - trained                        # (T,)
    ax.bar(np.arange(len(change)) + 0.27 * (i - 1), change, 0.25, label=f"{way}: {change.sum():+.1f} in all",
           color=("#d0812f", "#b4441c", "#7d8797")[i])
ax.axhline(0, color="black", linewidth=0.8)
ax.set_ylabel("change of log p")
by_word(ax, [word_of[i] for i in found.sequence[1:]])

# %% [markdown]
# ## 9. Soft beside hard
#
# What we have looked at is *soft* attention: the context is a mixture. The paper's other kind is *hard*. For each word
# it draws one region, with the probabilities $\alpha$, and sees that region alone. A drawn region has no derivative, so
# it is trained by other means (`HardAttention` and `hard_attention_loss` in [models.py](../models.py)).
#
# **The model here was trained softly.** Below it is only *read* hard: `weigh` returns 1 for a single region, the one
# with the largest weight or one that was drawn, and 0 for all others. A model that was trained hard has learnt to do
# with one region; this one has not, and is given something that it never got in training. How much that takes away can
# be read off the weights: if the largest is 0.9, hardly anything changes; if it is little more than $1/P$, nearly
# everything that it used to see is gone.

# %%
def largest(alpha):
    return F.one_hot(alpha.argmax(dim=1), alpha.size(1)).float()            # (R, P)


def drawn(alpha):
    return F.one_hot(alpha.multinomial(1).squeeze(1), alpha.size(1)).float()            # (R, P), equation 8


soft = say(photograph, beam_size=1)
with looking(largest):
    hard = say(photograph, beam_size=1)
print(f"largest weight, mean over the words: {soft.alphas.max(axis=(1, 2)).mean():.2f}; even: {1 / side ** 2:.2f}")
print(f"   soft: {sentence(soft.words)}")
print(f"largest: {sentence(hard.words)}")
for seed in range(3):
    torch.manual_seed(seed)
    with looking(drawn):
        print(f"  drawn: {sentence(say(photograph, beam_size=1).words)}")

# %% [markdown]
# Where it looked softly is in section 4. Here is the same model with a single region for each word, the largest. What
# it saw differs from the first word on, and with it the state, and what it looks for next.

# %%
show_gaze(hard.words, hard.alphas)

# %% [markdown]
# ## 10. Go on from here
#
# - Take another photograph in section 1, or one of your own, and run the cells below it again. Find one where the gaze
#   is on the thing that is named, and one where it is not although the word is right.
# - Ask for `say(photograph, beam_size=k)` with k from 1 to 20. The log-probability of what it finds rises, as a rule.
#   Does the sentence get better?
# - In section 8, write a fifth way: look only at the left half, or only at the border. `alpha.view(-1, side, side)` is
#   the map.
# - Train a model of your own (the [README](../README.md) says how, in four commands) and look inside: the environment
#   variable `INSIDE_MODEL` names its checkpoint. One with `--attention hard` has seen single regions in training, for
#   half of the pictures, so that section 9 is a fair comparison with it.
