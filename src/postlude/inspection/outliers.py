"""Outliers: how uneven the tensors are that a quantizer has to round.

Text runs through the model once. For every site (a tensor that linear layers read), over all tokens and channels:

    absmax            max |x|
    median            median |x|
    kurtosis          mean over tokens of the kurtosis of that token's channels (3 for Gaussian channels,
                      the width when one channel carries everything): what a per-token quantizer meets
    channel_kurtosis  mean over channels of the kurtosis of that channel's tokens: what a per-channel one meets
    top tokens        the tokens with the largest max |x| over channels, and that channel and value
    top channels      the channels with the largest max |x| over tokens

and for the residual stream after the embeddings and after every block, before any norm: the largest and the median
Euclidean norm of a token, max |h| and median |h|. A ratio max |h| / median |h| of hundreds or thousands is what is
called massive activations (arXiv:2402.17762).

Kurtosis is Pearson's, ``E[(x - mean)^4] / E[(x - mean)^2]^2``; constant tokens and channels have none and do not
count. Medians are within one part in a thousand (a histogram over the bits of the numbers).

Cost: one forward pass, plus a few passes over every site's tensor. Memory: 2 MiB and a few vectors of its width for
every site, and the token norms of every layer. Needs: text.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.inspection.report import Inspection, checked_tokens, place, rounded, table, token_text
from postlude.numerics.kurtosis import ChannelKurtosis, row_kurtosis
from postlude.numerics.magnitudes import MagnitudeHistogram
from postlude.registry import method
from postlude.surgery.batches import device_of, token_batches
from postlude.surgery.capture import observe

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = [
    "LayerOutliers",
    "Outliers",
    "OutliersReport",
    "SiteOutliers",
    "TopChannel",
    "TopToken",
    "measure_tensor",
]

# Tokens of the first sequence whose norm is reported after every layer.
TRACED_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class TopToken:
    """One token of a site, at its largest channel.

    Attributes:
        sample: row of the token batch.
        position: place in that sequence, from 0.
        token_id: vocabulary id.
        text: what it reads as; None without a tokenizer.
        channel: where its largest magnitude lies.
        value: that entry, with its sign.
    """

    sample: int
    position: int
    token_id: int
    text: str | None
    channel: int
    value: float


@dataclasses.dataclass(frozen=True)
class TopChannel:
    """One channel of a site and its largest magnitude over all tokens."""

    channel: int
    absmax: float


@dataclasses.dataclass(frozen=True)
class SiteOutliers:
    """Statistics of one site; the module's docstring defines them."""

    block: int
    site: str
    width: int
    absmax: float
    median: float
    kurtosis: float
    channel_kurtosis: float
    top_tokens: tuple[TopToken, ...]
    top_channels: tuple[TopChannel, ...]

    @property
    def ratio(self) -> float:
        """absmax over median; infinity if more than half of the entries are zero."""
        return self.absmax / self.median if self.median else math.inf


@dataclasses.dataclass(frozen=True)
class LayerOutliers:
    """The residual stream at one place.

    Attributes:
        layer: after this block; -1 after the embeddings.
        max_norm: largest Euclidean norm of a token.
        median_norm: median over tokens.
        absmax: largest magnitude of an entry.
        median: median magnitude of an entry.
    """

    layer: int
    max_norm: float
    median_norm: float
    absmax: float
    median: float

    @property
    def ratio(self) -> float:
        """absmax over median; infinity if more than half of the entries are zero."""
        return self.absmax / self.median if self.median else math.inf


@dataclasses.dataclass(frozen=True)
class OutliersReport(Inspection):
    """What :class:`Outliers` found.

    Attributes:
        samples: sequences of text.
        length: tokens of each.
        sites: in the order of the forward pass.
        layers: the residual stream, from the embeddings on.
        traced: the first tokens of the first sequence, as text or as ids.
        traced_norms: ``[layers + 1, traced tokens]`` Euclidean norms of those.
    """

    method: ClassVar[str] = "outliers"
    samples: int
    length: int
    sites: tuple[SiteOutliers, ...]
    layers: tuple[LayerOutliers, ...]
    traced: tuple[str, ...]
    traced_norms: Tensor

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Inspection.to_dict`."""
        fields = dataclasses.asdict
        return rounded(
            {
                "method": self.method,
                "samples": self.samples,
                "length": self.length,
                "layers": [{**fields(layer), "ratio": layer.ratio} for layer in self.layers],
                "sites": [{**fields(site), "ratio": site.ratio} for site in self.sites],
                "traced": {"tokens": self.traced, "norms": self.traced_norms},
            }
        )

    def summary(self) -> str:
        """See :meth:`Inspection.summary`."""
        worst = max(self.layers, key=lambda layer: layer.ratio)
        lines = [
            f"Outliers over {self.samples} x {self.length} tokens. The residual stream is most uneven after "
            f"{place(worst.layer)}: max |h| is {worst.ratio:.0f} x median |h|.",
            "",
            table(
                ("after", "max norm", "median norm", "max |h|", "median |h|", "ratio"),
                (
                    (
                        place(row.layer),
                        row.max_norm,
                        row.median_norm,
                        row.absmax,
                        row.median,
                        row.ratio,
                    )
                    for row in self.layers
                ),
            ),
            "",
            table(
                (
                    "block",
                    "site",
                    "max |x|",
                    "median |x|",
                    "ratio",
                    "kurtosis",
                    "top token",
                    "channel",
                ),
                (
                    (
                        site.block,
                        site.site,
                        site.absmax,
                        site.median,
                        site.ratio,
                        site.kurtosis,
                        _describe(site.top_tokens[0]),
                        site.top_tokens[0].channel,
                    )
                    for site in self.sites
                ),
            ),
        ]
        return "\n".join(lines)


def _describe(token: TopToken) -> str:
    name = repr(token.text) if token.text is not None else f"id {token.token_id}"
    return f"{name} at {token.position}"


class _Statistics:
    """Everything about one tensor of the forward pass, batch by batch.

    Args:
        width: size of the last axis.
        top: tokens to remember.
        device: where the sums live.
    """

    def __init__(self, width: int, top: int, device: torch.device) -> None:
        self.absmax = torch.zeros(width, device=device)
        self.magnitudes = MagnitudeHistogram(device)
        self.channels = ChannelKurtosis(width, device)
        self._rows = torch.zeros(2, dtype=torch.float64, device=device)  # sum of kurtosis, tokens
        self._top = top
        self._tokens: list[tuple[float, int, int, float]] = []  # |value|, -token, channel, value
        self._seen = 0

    def update(self, x: Tensor) -> None:
        """Take in ``x`` ``[..., width]``, the next tokens in order."""
        rows = x.reshape(-1, x.shape[-1])
        self.magnitudes.update(rows)
        self.channels.update(rows)
        kurtosis = row_kurtosis(rows)
        defined = ~kurtosis.isnan()
        self._rows += torch.stack([kurtosis[defined].sum(), defined.sum()])
        magnitude = rows.float().abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        largest, channel = magnitude.max(1)
        value, token = largest.topk(min(self._top, len(rows)))
        for size, row in zip(value.tolist(), token.tolist(), strict=True):
            column = int(channel[row])
            self._tokens.append((size, -(self._seen + row), column, float(rows[row, column])))
        self._tokens = heapq.nlargest(self._top, self._tokens)
        self._seen += len(rows)

    @property
    def kurtosis(self) -> float:
        """Mean over tokens, NaN if all are constant."""
        return float(self._rows[0] / self._rows[1])

    @property
    def channel_kurtosis(self) -> float:
        """Mean over channels, NaN if all are constant."""
        return float(self.channels.value().nanmean())

    def tokens(self) -> list[tuple[int, int, float]]:
        """Top tokens as ``(index in order, channel, value)``, the largest first."""
        return [(-index, channel, value) for _, index, channel, value in self._tokens]


def measure_tensor(x: Tensor, top: int = 5) -> dict[str, Any]:
    """The statistics of one tensor ``[..., width]``: absmax, median, both kurtoses, top tokens and channels."""
    statistics = _Statistics(x.shape[-1], top, x.device)
    statistics.update(x)
    return _values(statistics)


def _values(statistics: _Statistics) -> dict[str, Any]:
    channel = statistics.absmax.topk(min(statistics._top, len(statistics.absmax)))
    return {
        "absmax": float(statistics.absmax.max()),
        "median": statistics.magnitudes.quantile(0.5),
        "kurtosis": statistics.kurtosis,
        "channel_kurtosis": statistics.channel_kurtosis,
        "top_tokens": statistics.tokens(),
        "top_channels": list(zip(channel.indices.tolist(), channel.values.tolist(), strict=True)),
    }


@method("inspect", "outliers", family="activation statistics", needs=("text",))
@dataclasses.dataclass(frozen=True)
class Outliers:
    """Largest and typical activations of every site and layer, with the tokens and channels to blame.

    Attributes:
        top: tokens and channels named for every site.
    """

    top: int = 5

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SettingsError(
                f"top={self.top}: name at least one token and channel for each site."
            )

    def inspect(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor | None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> OutliersReport:
        """Run ``tokens`` ``[samples, length]`` through the model and measure.

        Args:
            checkpoint: the model.
            tokens: token ids.
            seed: unused; nothing here is random.
            progress: where to show how far it is.

        Raises:
            DataError: no tokens, or some that the model cannot read.
        """
        ids = checked_tokens(checkpoint, tokens)
        model, anatomy = checkpoint.model, checkpoint.language
        device = device_of(model)
        sites = {
            (block.index, site.name): _Statistics(site.width, self.top, device)
            for block, site in anatomy.sites()
        }
        places = range(-1, len(anatomy.blocks))
        norms: dict[int, list[Tensor]] = {layer: [] for layer in places}
        absmax = dict.fromkeys(places, 0.0)
        magnitudes = {layer: MagnitudeHistogram(device) for layer in places}

        def residual(layer: int, hidden: Tensor) -> None:
            norms[layer].append(hidden.float().norm(dim=-1).cpu())
            absmax[layer] = max(absmax[layer], float(hidden.abs().max()))
            magnitudes[layer].update(hidden)

        batches = list(token_batches(ids))
        observe(
            model,
            anatomy,
            progress.iterate(batches, "outliers") if progress else batches,
            {key: statistics.update for key, statistics in sites.items()},
            residual=residual,
        )
        return OutliersReport(
            samples=ids.shape[0],
            length=ids.shape[1],
            sites=tuple(
                _site(checkpoint, ids, block, site, statistics)
                for (block, site), statistics in sites.items()
            ),
            layers=tuple(
                LayerOutliers(
                    layer=layer,
                    max_norm=float(torch.cat(norms[layer]).max()),
                    median_norm=float(torch.cat(norms[layer]).median()),
                    absmax=absmax[layer],
                    median=magnitudes[layer].quantile(0.5),
                )
                for layer in places
            ),
            traced=tuple(
                token_text(checkpoint.tokenizer, token) or f"id {token}"
                for token in ids[0, :TRACED_TOKENS].tolist()
            ),
            traced_norms=torch.stack([norms[layer][0][0, :TRACED_TOKENS] for layer in places]),
        )


def _site(
    checkpoint: Checkpoint, ids: Tensor, block: int, site: str, statistics: _Statistics
) -> SiteOutliers:
    """Name the tokens that the statistics only count."""
    values = _values(statistics)
    tokens = []
    for index, channel, value in values.pop("top_tokens"):
        sample, position = divmod(index, ids.shape[1])
        token = int(ids[sample, position])
        text = token_text(checkpoint.tokenizer, token)
        tokens.append(TopToken(sample, position, token, text, channel, value))
    channels = tuple(TopChannel(*channel) for channel in values.pop("top_channels"))
    width = len(statistics.absmax)
    return SiteOutliers(
        block, site, width, **values, top_tokens=tuple(tokens), top_channels=channels
    )
