"""Images as sequences of codes, each predicted from those before it (arXiv:2012.09841).

B batch, N codes of an image, K values of a code, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.backbone.attention import CausalAttention
from diffusion_lab.backbone.base import initialise
from diffusion_lab.backbone.block import Block
from diffusion_lab.common.images import require_finite
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.common.ranges import (
    Count,
    Flag,
    Fraction,
    Number,
    Positive,
    between,
    optional,
    ranges,
    settings,
    share,
    whole,
)
from diffusion_lab.first_stage import TrainedVQ


class CodeTransformer(nn.Module):
    """DiT's blocks with causal attention, over a start token and the codes row by row.

    It is built for `tokens` codes, each one of `codes` values. The condition is added to the start
    token, and is what blocks are conditioned on.
    """

    @ranges()
    def __init__(
        self,
        codes: int,
        tokens: int,
        labels: Labels,
        conditioning: Callable[..., nn.Module],
        width: Count,
        depth: Count,
        heads: Count,
        qk_norm: Flag,
        block: Callable[..., Block],
    ):
        super().__init__()
        self.tokens = tokens
        self.start = nn.Parameter(torch.empty(width))
        self.embedding = nn.Embedding(codes, width)
        self.positions = nn.Parameter(torch.empty(tokens, width))
        mixer = partial(CausalAttention, width, heads, tokens, qk_norm=qk_norm)
        blocks = [block(width=width, mixer=mixer) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.shared_modulation = blocks[0].shared_modulation(width)
        self.norm = blocks[0].make_norm()
        self.out = nn.Linear(width, codes)
        initialise(self)
        # after the others, as it initialises itself
        self.conditioning: Any = conditioning(labels=labels, width=width)

    def initialise(self) -> None:
        """Starts with small embeddings, and with all codes equally likely."""
        for table in (self.start, self.embedding.weight, self.positions):
            nn.init.normal_(table, std=0.02)
        nn.init.zeros_(self.out.weight)
        if self.shared_modulation is not None:
            nn.init.zeros_(self.shared_modulation[1].get_parameter("weight"))

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def forward(self, codes: Tensor, labels: Tensor | None, begun: int = 0) -> Tensor:
        """Codes (B, n) int64 -> logits (B, n + 1, K) of each of them and of the next one.

        Labels are (B,) or numbers (B, L), or None for no class. Once `begun` tokens are remembered,
        the codes are those that came since, and the logits (B, n, K) are of those after each.
        """
        condition = self.conditioning(labels, len(codes))
        vector, context = condition.after(self.start.expand(len(codes), -1))
        shared = None if self.shared_modulation is None else self.shared_modulation(vector)
        condition = replace(condition, vector=vector, tokens=context, modulation=shared)
        x = self.embedding(codes)
        if not begun:
            x = torch.cat([vector[:, None], x], dim=1)
        x = x + self.positions[begun : begun + x.shape[1]]
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x)).float()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keeps keys and values of the tokens that are given in this block."""
        mixers = [module for module in self.modules() if isinstance(module, CausalAttention)]
        try:
            for mixer in mixers:
                mixer.remember(True)
            yield
        finally:
            for mixer in mixers:
                mixer.remember(False)


@settings
class NextCode:
    """Cross-entropy of each code, given those before it.

    A label is dropped with probability `label_dropout`, so that guidance can leave it out.
    `smoothing` spreads this share of a code's probability over all values, in training alone.
    """

    label_dropout: Fraction = 0.1
    smoothing: Annotated[float, between(0, 0.5)] = 0.0

    def __call__(self, model: CodeTransformer, codes: Tensor, labels: Tensor) -> Tensor:
        """The loss of codes (B, N) int64 with labels (B,), in nats of a code, ()."""
        labels = model.conditioning.drop(labels, self.label_dropout)
        return nats(model, codes, labels, self.smoothing).mean()


def nats(
    model: CodeTransformer, codes: Tensor, labels: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """The negative log-likelihood of each code (B, N), exact without smoothing, in nats."""
    logits = model(codes[:, :-1], labels)
    return F.cross_entropy(logits.mT, codes, reduction="none", label_smoothing=smoothing)


@settings
class CodeSampler:
    """Draws codes at a temperature, of the `top_k` likeliest, or of the fewest with mass `top_p`.

    (arXiv:1805.04833, 1904.09751.) With both limits, the mass is that among the `top_k`.
    """

    temperature: Positive = 1.0
    top_k: Annotated[int | None, optional(whole(1))] = None
    top_p: Annotated[float | None, optional(share())] = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, K) -> the probabilities to draw with, (B, K) float64."""
        logits, order = (logits.double() / self.temperature).sort(dim=1, descending=True)
        if self.top_k is not None:
            logits[:, self.top_k :] = -torch.inf
        p = logits.softmax(dim=1)
        if self.top_p is not None:
            before = p.cumsum(dim=1) - p  # the mass of likelier codes
            p = p.masked_fill(before >= self.top_p, 0.0)
            p = p / p.sum(dim=1, keepdim=True)
        return torch.zeros_like(p).scatter(1, order, p)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Draws a code for each row of logits (B, K) by a uniform number (B,); (B,) int64."""
        total = self.probabilities(logits).cumsum(dim=1)
        # the last number may be 1, and a sum a little below it
        chosen = torch.searchsorted(total, (uniform.double() * total[:, -1])[:, None], right=True)
        return chosen[:, 0].clamp(max=logits.shape[1] - 1)


@settings
class LogitGuidance:
    """Classifier-free guidance on logits, l + (scale - 1)(l - l without the label).

    (arXiv:2207.12598, 2306.17806.) A scale of 1 is none.
    """

    scale: Number = 1.0

    @property
    def needs_labels(self) -> bool:
        """Whether logits with the label and without it both count."""
        return self.scale != 1

    asks_unlabelled = needs_labels

    def __call__(self, strong: Tensor, weak: Tensor) -> Tensor:
        """The guided logits, of the shape of logits with and without the label."""
        return weak + self.scale * (strong - weak)


@dataclass(frozen=True)
class CodePipeline(Generator):
    """A model of codes, the way to draw from it, and the first stage that decodes them.

    Sample i is fixed by `seed` and i alone, up to the network's rounding.
    """

    model: CodeTransformer
    sampler: CodeSampler
    guidance: LogitGuidance
    first_stage: TrainedVQ

    @property
    def known(self) -> Labels | None:
        conditioning = self.model.conditioning
        return conditioning.labels if conditioning.conditional else None

    @property
    def steps(self) -> int:
        return self.model.tokens

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        codes = self.codes(ids, seed, labels, on_step)
        return self.first_stage.from_codes(codes.unflatten(1, self.first_stage.latent_shape[1:]))

    def codes(
        self,
        ids: Sequence[int],
        seed: int,
        labels: Tensor | None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws the codes of samples `ids`, (B, N) int64."""
        model = self.model
        device = model.start.device
        labels = None if labels is None else labels.to(device)
        guided = self.guidance.scale != 1
        if guided and labels is not None:
            labels = torch.cat([labels, model.conditioning.labels.null(len(labels), device)])
        # normal numbers, each a uniform one by its distribution function
        uniform = torch.special.ndtr(SampleNoise(seed, ids)((model.tokens,)).double())
        codes = torch.empty(len(ids), 0, dtype=torch.int64, device=device)
        # the cache grows from call to call, and a compiled block would be compiled for each
        with torch.compiler.set_stance("force_eager"), model.remembering():
            for place in range(model.tokens):
                known = codes[:, -1:].repeat(2, 1) if guided else codes[:, -1:]
                logits = model(known, labels, begun=place)[:, -1]
                if guided:
                    logits = self.guidance(*logits.chunk(2))
                # on the CPU, as a GPU's sums along an axis depend on its kind
                drawn = self.sampler(require_finite(logits).cpu(), uniform[:, place]).to(device)
                codes = torch.cat([codes, drawn[:, None]], dim=1)
                on_step()
        return codes
