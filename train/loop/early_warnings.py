"""Early warnings of a training run that goes wrong while its losses look fine, fed at each logged step.

Each `check` returns one line when a state begins, with numbers and what to do, and None otherwise.
"""

import torch
from torch import Tensor

from AutoEncoder.model.codebook import codebook_usage, perplexity
from AutoEncoder.model.discriminator import DISCRIMINATOR_LOSSES

# The loop waits for its next batch in more than this share of the time. With a third of the time lost, more loading
# processes pay; much below, waiting is the ordinary jitter of loading.
DATA_BOUND = 0.3
# Logged steps in a row: the first interval holds the start of the loading processes, and a cold disk warms up.
DATA_BOUND_PATIENCE = 3
# Share of the codes in use below which a codebook has collapsed. Codes that fall out of use restart, so healthy
# codebooks use nearly all. Not the perplexity: where nine tenths of a volume are background in one code, a perplexity
# of 3 is healthy.
COLLAPSED_USAGE = 0.05
# Tokens per code that are counted before judging: if all codes were equally likely, 10 tokens per code would leave
# exp(-10) of them unused. So few codes in use are never chance.
TOKENS_PER_CODE = 10
COLLAPSE_PATIENCE = 2  # judgements in a row, so that a usage about the threshold is not warned of again and again
# The discriminator has won when its loss is below this share of the loss of a discriminator that knows nothing
# (logits 0: hinge 1, vanilla ln 2). The logits are far apart then: for hinge the loss alone implies a mean of at least
# 0.8 for real and at most -0.8 for fake.
WON_SHARE = 0.1
WON_PATIENCE = 5  # logged steps in a row, each a batch of its own: a single easy batch means nothing


class Onset:
    """Whether a state begins.

    The state changes after `patience` readings in a row that say so, to both sides: one that flutters about a threshold
    begins once.
    """

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.lasts = False
        self._against = 0  # readings in a row that contradict `lasts`

    def begins(self, is_seen: bool) -> bool:
        """Give one reading; True if the state begins with it."""
        self._against = 0 if is_seen == self.lasts else self._against + 1
        if self._against < self.patience:
            return False
        self.lasts, self._against = is_seen, 0
        return is_seen


class DataBound:
    """Training that waits for its data; `advice` says what to change."""

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self._onset = Onset(DATA_BOUND_PATIENCE)

    def check(self, data_wait: float) -> str | None:
        """data_wait: share of the time since the last logged step in which the loop waited for data, 0 to 1."""
        if not self._onset.begins(data_wait > DATA_BOUND):
            return None
        return (
            f"data bound: training waits for its next batch in {data_wait:.0%} of the time, and over {DATA_BOUND:.0%} "
            f"in {DATA_BOUND_PATIENCE} logged steps in a row: {self.advice}"
        )


class CodebookCollapse:
    """A codebook of which nearly all codes lie idle."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # since the last judgement
        self._onset = Onset(COLLAPSE_PATIENCE)

    def check(self, counts: Tensor) -> str | None:
        """counts: (n_codes,), how often each code was used since the last logged step."""
        self._counts = counts if self._counts is None else self._counts + counts
        n_codes, tokens = len(counts), self._counts.sum().item()
        if tokens < TOKENS_PER_CODE * n_codes:
            return None
        counts, self._counts = self._counts, None
        usage = codebook_usage(counts)
        if not self._onset.begins(usage < COLLAPSED_USAGE):
            return None
        return (
            f"the codebook collapses: the last {tokens:.0f} tokens used {usage:.1%} of its {n_codes} codes (perplexity "
            f"{perplexity(counts):.3g}): set model.no_random_restart=false, start the codebook later "
            "(model.codebook_init_step), or lower model.lr"
        )


class DiscriminatorWins:
    """A discriminator that tells every reconstruction from its volume: what it teaches the generator is worthless."""

    def __init__(self, loss_type: str) -> None:
        undecided = DISCRIMINATOR_LOSSES[loss_type](torch.zeros(1), torch.zeros(1)).item()
        self.threshold = WON_SHARE * undecided
        self._onset = Onset(WON_PATIENCE)

    def check(self, loss: float, logit_real: float, logit_fake: float) -> str | None:
        """Unweighted loss of the discriminator and its mean logits of volumes and of reconstructions, of one batch."""
        if not self._onset.begins(loss < self.threshold):
            return None
        return (
            f"the discriminator wins: its loss is {loss:.3g} (below {self.threshold:.3g} in {WON_PATIENCE} logged "
            f"steps in a row), mean logits {logit_real:.3g} for volumes and {logit_fake:.3g} for reconstructions: "
            "raise model.discriminator_iter_start, so that reconstructions are better before it starts, or lower "
            "model.volume_gan_weight or the discriminator's size (model.disc_channels, model.disc_layers)"
        )
