"""What the page says in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OPENING: Final = """# Studies of recurrent models

*Made by `make recurrent`; nothing on this page is written by hand.*

Six experiments that need no pretrained model and no network: tiny models (four blocks, 64 dimensions) are trained
from nothing on languages whose truth is known, then steered, read and questioned with `exegete.steering`,
`exegete.lens` and `exegete.elk`. The scripts are in `studies/recurrent/`. Each experiment states beforehand what it
must find; where it does not, that is said here as well. The criteria were found with a Mamba,
those of E3 with a Llama too; here every family is held to them. Mamba and RWKV-4 carry a recurrent state; Llama
stands beside them.

Everything but E6 is run with {seeds} seeds (of languages, splits, models and probes); numbers are medians over them
unless said otherwise, and what is drawn as a bar is their range. In all it took {minutes:.0f} minutes of one core;
two processes of one thread run at a time ({versions}). Sites are numbered as everywhere: −1 is the embedding, *j* the
output of block *j*, and the state of block *j* goes with site *j*."""

TITLES: Final[Mapping[str, str]] = {
    "E1": "Quirky comparison",
    "E2": "Quirky addition",
    "E3": "Steering a language of two registers",
    "E4": "Steering the state",
    "E5": "Lenses of a byte-level model",
    "E6": "Every family",
}

TEXTS: Final[Mapping[str, str]] = {
    "E1": """**Asked.** A model is trained to say what is true in Alice's context and something else in Bob's. Can what
is true be read off it where it says otherwise, and does the recurrent state help?

**How.** A row is `[a₁ a₀ b₁ b₀ NAME]`, two numbers below 100 and a name; the answer is True or False. Alice says
whether a > b, Bob compares the last digits alone. 9,000 pairs are split 60 / 20 / 20: the model learns the first
part, probes are fitted on the second (a quarter of it held out to choose sites), tested on the third, which neither
saw. Probes are fitted on Alice's rows and tested on Bob's against the truth (A→B); or fitted on Alice's easy rows,
the quartile with the largest |a − b|, and tested on Bob's hard ones (AE→BH). Probes: logistic regression (lr) and the
mean difference, on the residual stream at the last token, on the contrast pair (the stream after each answer), and on
the recurrent state after the statement.

*EIL* is the earliest informative site: the first whose AUROC above ½ is at least .95 of the best one's on held-out
rows of Alice. For AE→BH these are either all of her rows, or the easy ones alone, which may be told apart at sites
that know nothing of the rest; both are given. *best* is the best site on the test rows, which is optimistic. An
anomaly is a hard row of Bob's among Alice's hard rows, by the Mahalanobis distance of a probe's log-odds over the
sites.""",
    "E2": """**Asked.** The same of facts that the model has memorised.

**How.** A row is `[a b = c NAME]` with a, b < 16. Alice accepts a + b, Bob a + b + 1; of the four claims about every
pair one is right, one is Bob's, and two are neither, so both are never right together and there is no AUROC where
they agree. The model first learns plain sums, then what both say of *all* claims: what is found is about facts it was
trained on. Probes are fitted on one half of the pairs and tested on the other. The pools are small. Easy rows have
the smallest smaller operand.""",
    "E3": """**Asked.** Does contrastive activation addition steer the residual stream of recurrent models as it does
that of a transformer, and more than random vectors of the same length?

**How.** A text is BOS, then rounds of a concept and its word. Each of 16 concepts has a polite and a rude word; a
text keeps to one register, and nothing tells which before its first word. Vectors are made of 12 concepts, questions
(BOS and a concept) asked about 8, of which 4 are in both. p is p(polite) / (p(polite) + p(rude)), *nonsense* what
neither gets: other words, or concepts, for a vector read at a word may also say that a word has been said. The vector
is the mean difference of the stream: *answer*, at the word that ends BOS, concept, word (contrastive activation
addition proper); *history*, at the concept behind two rounds in one register. It is added at the question's last
token, at one site. The best site is the one with the largest effect, p(+3) − p(−3). Beside every curve run 20 random
vectors of the same length. Embeddings are tied to the head: with a head of its own, the answer's vector says little
to later tokens of a transformer.""",
    "E4": """**Asked.** What does the recurrent state carry of the register, which of its components, and does steering
both add up?

**How.** The models, questions and multipliers of E3. The state's vector is the mean difference of the state, added to
the state of one block before the last token of the question is read; with *both*, the residual part of the same site
is added as well. A history's state is read before the question, where it is edited. Read after the question, as
published (*history, state read late*), what short convolutions and token shifts hold is out of step by one token.
Each component is also steered alone. Numbers are effects, p(+3) − p(−3), at each mode's best site.""",
    "E5": """**Asked.** Are tuned lenses better than the logit lens at *every* site, in recurrent models too?

**How.** Byte-level models of the Python standard library's source (rows of 24 bytes; train, validation and test
documents apart), then the logit lens, a tuned lens (KL, Adam, 60 steps of 32 rows; 200 for Llama, set after 60 had left
it at .61 of the logit lens's KL in the first half on one seed) and, of recurrent models, a state-aware lens on the same
batches, measured on test documents.""",
    "E6": """**Asked.** What do the model classes of the installed transformers get right, and does one interface carry
them all?

**How.** Tiny models with random weights. Errors are the largest differences of logits from a whole pass: single steps
after a prefill, several tokens after it, single steps of three rows, and single steps of rows as `Running` feeds
them. *fed in*: what is fed after other tokens. Every edit of a copied state is checked to leave the original as it
was; *unevenness* says how far the first step's change is from linear in the edit, where theory says it is linear. The
thirteen families of the first criterion were measured beforehand with other random weights; there the single steps of
Zamba 2 counted as exact. They leave out a clamp of the step size that whole passes make.""",
}
