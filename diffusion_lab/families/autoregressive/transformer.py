"""A transformer that predicts each code of an image from those before it (arXiv:2012.09841).

B batch, N codes of an image, K values of a code, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.backbone.attention import CausalAttention
from diffusion_lab.backbone.base import initialise
from diffusion_lab.backbone.block import Block
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.ranges import Count, Flag, ranges


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
        self.codes, self.tokens = codes, tokens
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
        """The modules that are called one after another."""
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
