"""What the page says in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OPENING: Final = """# Studies of recurrent models

*Made by `make recurrent`: tables, figures and verdicts are of its results, the words stand in its scripts.*

Six experiments that need no pretrained model and no network: tiny models (four blocks, 64 dimensions) are trained
from nothing on languages whose truth is known, then steered, read and questioned with `exegete.steering`,
`exegete.lens` and `exegete.elk`. The scripts are in `studies/recurrent/`. Each experiment states beforehand what it
must find; where it does not, that is said here as well. The criteria were found with a Mamba,
those of E3 with a Llama too; here every family is held to them. Mamba and RWKV-4 carry a recurrent state; Llama
stands beside them.

Everything but E6 is run with {seeds} seeds (of languages, splits, models and probes); numbers are medians over them
unless said otherwise, and what is drawn as a bar is their range. In all it took {minutes:.0f} minutes of one core;
two processes of one thread run at a time ({versions}).

Where a first run on seeds 0, 1 and 2 had missed a criterion, other settings of training (steps, learning rate, weight
decay, steps of lenses) were tried on seeds 10, 11 and 12, several on seed 10 alone, and chosen by what was found there.
The figures on this page are of seeds 0, 1 and 2, run with what had been chosen, whatever came; no setting was changed
after seeing them. What was tried is said below each experiment; settings that are not named there are those of the
first run, for which no seeds had been kept apart. No criterion of E1
to E5, and no way of measuring one, was changed; of E6 see there.

Sites are numbered as everywhere: −1 is the embedding, *j* the
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

**How.** A text is BOS, then rounds of a concept and its word. Each of 16 concepts has a polite and a rude word; a text
keeps to one register, and nothing tells which before its first word. Vectors are made of 12 concepts, questions (BOS
and a concept) asked about 8, of which 4 are in both. p is p(polite) / (p(polite) + p(rude)), *nonsense* what neither
gets: other words, or concepts, for a vector read at a word may also say that a word has been said (*of it concepts*:
their part, at −1 or 1, where there is more nonsense). The vector is the mean difference of the stream: *answer*, at
the word that ends BOS, concept, word (contrastive activation addition proper); *history*, at the concept behind two
rounds in one register. It is added at the question's last token, at one site. The best site is the one with the
largest effect, p(+3) − p(−3). Beside every curve run 20 random vectors of the same length. Embeddings are tied to the
head: with a head of its own, the answer's vector says little to later tokens of a transformer.""",
    "E4": """**Asked.** What does the recurrent state carry of the register, which of its components, and does steering
both add up?

**How.** The models, questions and multipliers of E3. The state's vector is the mean difference of the state, added to
the state of one block before the last token of the question is read; with *both*, the residual part of the same site
is added as well. A history's state is read before the question, where it is edited. Read after the question, as
published (*history, state read late*), what short convolutions and token shifts hold is out of step by one token.
Each component is also steered alone. Numbers are effects, p(+3) − p(−3), at each mode's best site.""",
    "E5": """**Asked.** Are tuned lenses better than the logit lens at *every* site, in recurrent models too?

**How.** Byte-level models of the Python standard library's source (rows of 24 bytes; train, validation and test
documents apart), then the logit lens, a tuned lens (KL, Adam, 60 steps of 32 rows; 400 for Llama) and, of recurrent
models, a state-aware lens on the same batches, measured on test documents.""",
    "E6": """**Asked.** What do the model classes of the installed transformers get right, and does one interface carry
them all?

**How.** Tiny models with random weights. Errors are the largest differences of logits from a whole pass, by the
model's own code: single steps after a prefill, several tokens after it, single steps of three rows; then the worst of
rows as `Running` runs them, in single steps and, where it feeds these, several tokens. *fed in*: what is fed after
other tokens. Every edit of a copied state is checked to leave the original as it was; *unevenness* says how far the
first step's change is from linear in the edit, where theory says it is linear. The thirteen families of the first
criterion were measured beforehand with other random weights; there the single steps of Zamba 2 counted as exact. They
leave out a clamp of the step size that whole passes make; `Running` makes it.""",
}

NOTES: Final[Mapping[str, str]] = {
    "E1": """**What was tried.** *RWKV-4*, seed 10 alone; the first row is of the first run's settings, the columns are
the criteria above from the contrast pair on:

| RWKV-4, seed 10 | pair | state, A→B | − residual, A→B | AE→BH | AE→BH, easy | anomalies |
| --- | --- | --- | --- | --- | --- | --- |
| 300 steps, rate .004, decay .01 | .858 | .681 | −.013 | −.057 | +.085 | .745 |
| 600 steps, rate .004, decay .01 | .900 | .750 | −.042 | +.069 | +.143 | .690 |
| 600 steps, rate .004, decay .1 | .956 | .774 | −.015 | +.107 | +.100 | .986 |
| 600 steps, rate .002, decay .01 | .939 | .879 | +.200 | +.042 | +.120 | .962 |
| 600 steps, rate .002, decay .1 (taken) | .952 | .906 | +.227 | +.056 | +.133 | .997 |

Longer and gentler training serves everything but AE→BH. Looked at afterwards, what was taken gave on seeds 11 and 12:
pair .968 and .933, state .900 and .833, state − residual A→B +.220 and +.180, AE→BH +.074 and +.073, easy −.056 and
+.061, anomalies .707 and .882: the state at the EIL lies about the limit. For AE→BH, the state's mean difference of
easy rows tells hard ones with .56 to .80 behind the first block (seeds 10 and 11), Mamba's with .75 and more.

*Mamba, EIL on Alice's easy rows*: not tried, as training cannot change what the rule sees. Easy rows are told apart
perfectly on held-out rows by the state of block 0 (on every seed), so the rule takes that site, which
knows little of hard rows; later ones tell them. The rule that looks at all of Alice's rows passes it by.

*Llama, anomalies*: 600 steps instead of 240 gave .268 on seed 10, and took the contrast pair to .845. What is usual is
fitted to Alice's easy rows. Probes of Llama's last token hardly find the truth in Bob's context at any site (.53 to .58
there), so his hard rows look like a confident answer of hers, and her own hard rows are the unusual ones.""",
    "E2": """**What was tried**, on seed 10 alone; nothing met the criterion, so the first run's settings were kept.

| seed 10 | sums: steps, last loss | claims: steps | rate | decay | pair, best site |
| --- | --- | --- | --- | --- | --- |
| Llama, first run's settings | 100, 1.122 | 600 | .004 | .01 | .709 |
| Llama | 300, .272 | 1000 | .002 | .01 | .690 |
| Llama | 300, .580 | 1000 | .002 | 1 | .607 |
| Llama, its claims not learned: AUROC .917 and .893 | 500, .004 | 1000 | .004 | .01 | .680 |
| RWKV-4 | 300, .053 | 600 | .004 | .01 | .754 |
| RWKV-4 | 400, .146 | 600 | .002 | .1 | .752 |

Learning the sums well beforehand did not make the truth be worked out. A logistic regression on the stream at the
claim's last token, before the name is read, tells the right claims of pairs that it was not fitted on with an AUROC of
.67 at most in the Llama of decay 1, and .84 in the last RWKV-4, of which .79 is in the embedding of c alone. So what
both say seems to be looked up once the name is there, which is what memorising means, and little of the truth is left
in Bob's context. The same was not looked at in Mamba.""",
    "E3": """**What was tried.** *RWKV-4*: the answer's effect was 3.1, 4.1 and 2.7 times the mean of random ones on
seeds 10, 11 and 12 with the first run's 250 steps at rate .004, and 3.9 and 4.2 times on 10 and 12 with 400 steps at
.002, which were taken; 600 steps at .004 gave 4.5 on 10. Looked at afterwards, seed 11 gave 3.3, and the fresh seeds
give less in the median: the effect changes much from seed to seed (.59 to .94 on 10 to 12), and so does what random
vectors do (.18 to .37 over all six).

*Mamba*: nonsense at ±1 was .58 on seed 10 with the first run's 200 steps, .62 with weight decay .1, and .40 with 400
steps, which were taken; but these gave .98 and .54 on seeds 11 and 12, and 600 steps at rate .002 gave .99 on 11.
Untied from the head, 200 steps gave .57 on 11, but next to no effect (.21). It is not for want of training: the loss
is .004 nats above the least possible after 400 steps and .008 after 200. The largest effect is mostly found after the
first block, and the vector there also says what stands at a place, not the register alone: taken away, it yields
concepts for the most part, as they stand behind a word; added, words of other concepts no less than concepts. At later
sites there is less of both (site 1 of seed 10: .14; site 2 of seed 12: .27), but the rule that was stated looks at the
effect alone.""",
    "E5": """**What was tried.** *Llama*: the tuned lens left .529 of the logit lens's KL in the first half on one seed
of the first run, with 200 steps of the lens; with 400, which were taken, .323 on seed 10, the
only one tried. It is met on the fresh seeds, by little.""",
    "E6": """**Changed since the first run.** Zamba 2 and Nemotron-H are no longer excepted from passes under way, and
several tokens as they are run count there too. What was expected of Bamba had left out that several tokens were off as
well when it was measured beforehand.""",
}
"""What was tried on seeds 10, 11 and 12 where the first run had missed a criterion, and what was found there."""
