"""A toy on which the whole family of token weights can be watched: a bigram model that learns a second habit.

A chain over 64 words is random, with one row of probabilities a word. A small network (embedding, one hidden layer,
head) learns it from samples. It is then tuned on half of the contexts, where the new target is the second most probable
word with probability .8 and the chain's other words with the rest; some labels are replaced by any word equally. Tuning
leaves the other half of the contexts out, so what happens to them is forgetting.

Contexts do not depend on each other; they stand in rows of 32, which only rules over whole sequences can see.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from _weightings import Batch, fit
from postlude.numerics.weighted_likelihood import Head
from postlude.tuning.weighting import TargetTokens, TokenWeighting

__all__ = ["COLUMNS", "World", "pretrained", "tuned"]

COLUMNS = ("skill", "target_kl", "forgetting")

WORDS, ROW, SHARE = 64, 32, 0.8
SHARPNESS = 1.75  # deviation of the chain's logits
EMBEDDING, HIDDEN = 32, 128


@dataclasses.dataclass(frozen=True)
class World:
    """What there is to learn, and what was learned first.

    Attributes:
        chain: ``[WORDS, WORDS]`` probabilities of the word after each context.
        target: the same after tuning, of which only the rows in ``taught`` are shown.
        skill: ``[WORDS]`` the target's top word.
        taught: ``[WORDS / 2]`` contexts.
        base: the network that knows the chain.
        contexts: ``[rows, ROW]`` of the demonstrations.
        labels: ``[rows, ROW]`` clean.
        random: ``[rows, ROW]`` what a label is replaced with.
        spoiled: ``[rows, ROW]`` uniform in 0..1; labels below the noise are replaced.
    """

    chain: Tensor
    target: Tensor
    skill: Tensor
    taught: Tensor
    base: nn.Sequential
    contexts: Tensor
    labels: Tensor
    random: Tensor
    spoiled: Tensor

    def noisy(self, noise: float) -> Tensor:
        """Labels of which a share was replaced, ``[rows, ROW]``."""
        return torch.where(self.spoiled < noise, self.random, self.labels)

    def measure(self, model: nn.Sequential) -> dict[str, float]:
        """Skill (top word right), KL(target || model) where taught, KL(chain || model) elsewhere."""
        with torch.no_grad():
            log_p = model(torch.arange(WORDS)).log_softmax(1)
        elsewhere = torch.ones(WORDS, dtype=torch.bool)
        elsewhere[self.taught] = False
        right = (log_p.argmax(1) == self.skill)[self.taught]
        return {
            "skill": float(right.double().mean()),
            "target_kl": float(_divergence(self.target, log_p)[self.taught].mean()),
            "forgetting": float(_divergence(self.chain, log_p)[elsewhere].mean()),
        }

    @property
    def outside(self) -> float:
        """Share of taught contexts whose new top word has more than half of the base model's mass above it."""
        with torch.no_grad():
            p = self.base(torch.arange(WORDS)).softmax(1)
        target = p.gather(1, self.skill[:, None])
        above = (p * (p > target)).sum(1)
        return float((above > 0.5)[self.taught].double().mean())


def pretrained(seed: int, samples: int = 50_000, steps: int = 1500, rows: int = 94) -> World:
    """A world and a network that has learned its chain; ``rows * ROW`` demonstrations, 3,000 by default."""
    source = torch.Generator().manual_seed(seed)
    chain = (SHARPNESS * torch.randn(WORDS, WORDS, generator=source)).softmax(1)
    skill = chain.topk(2).indices[:, 1]
    words = torch.arange(WORDS)
    target = chain.clone()
    target[words, skill] = 0
    target *= (1 - SHARE) / target.sum(1, keepdim=True)
    target[words, skill] = SHARE
    taught = torch.randperm(WORDS, generator=source)[: WORDS // 2]

    base = _network(seed)
    contexts = torch.randint(0, WORDS, (samples,), generator=source)
    following = torch.multinomial(chain[contexts], 1, generator=source)[:, 0]
    optimizer = torch.optim.Adam(base.parameters(), 3e-3)
    for _ in range(steps):
        some = torch.randint(0, samples, (512,), generator=source)
        loss = nn.functional.cross_entropy(base(contexts[some]), following[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    shown = taught[torch.randint(0, len(taught), (rows, ROW), generator=source)]
    labels = torch.multinomial(target[shown.flatten()], 1, generator=source).view(rows, ROW)
    return World(
        chain=chain,
        target=target,
        skill=skill,
        taught=taught,
        base=base.requires_grad_(False),
        contexts=shown,
        labels=labels,
        random=torch.randint(0, WORDS, labels.shape, generator=source),
        spoiled=torch.rand(labels.shape, generator=source),
    )


def tuned(
    world: World,
    weighting: TokenWeighting,
    noise: float,
    seed: int,
    steps: int = 600,
    rate: float = 2e-3,
    rows: int = 8,
) -> nn.Sequential:
    """The network after tuning under a rule, ``rows * ROW`` tokens a step."""
    model = copy.deepcopy(world.base).requires_grad_(True)
    trunk, last = model[:-1], model[-1]
    old_trunk, old_last = world.base[:-1], world.base[-1]
    labels = world.noisy(noise)
    source = torch.Generator().manual_seed(seed)
    places = torch.arange(rows)[:, None].expand(rows, ROW).flatten()
    everything = torch.ones(rows * ROW, dtype=torch.bool)

    def head(contexts: Tensor) -> Head:
        return Head(trunk(contexts), last.weight, last.bias)

    def batches() -> Iterator[Batch]:
        for _ in range(steps):
            some = torch.randint(0, len(labels), (rows,), generator=source)
            contexts = world.contexts[some].flatten()
            tokens = TargetTokens(labels[some].flatten(), everything, places)
            yield Batch(contexts, tokens, Head(old_trunk(contexts), old_last.weight, old_last.bias))

    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    fit(model.parameters(), head, weighting, batches(), optimizer, clip=float("inf"))
    return model


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Embedding(WORDS, EMBEDDING),
            nn.Linear(EMBEDDING, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, WORDS),
        )


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (p.log() - log_q)).sum(1)
