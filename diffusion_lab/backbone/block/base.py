"""What a block is: tokens and a condition -> tokens, whatever mixes them and however it conditions.

B batch, N tokens, L condition tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.common.ranges import between, ranges


class Block(nn.Module, ABC):  # in this order, which FSDP2's own subclass of it needs
    """One layer of a token network: a mixer of tokens, then an MLP if `mlp_ratio` is not 0.

    A block is configured as a factory: the network calls it with the facts `width` and `mixer`, a
    constructor of the module that mixes tokens, (B, N, D) -> (B, N, D). A method `initialise`, of a
    block or of what is in it, makes exceptions to the network's initialisation, after it.
    """

    prepends = False  # whether the condition's tokens go through the blocks, before the patches'

    @ranges(mlp_ratio=between(0, 100))
    def __init__(self, width: int, mixer: Callable[[], nn.Module], mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.mixer = mixer()
        # the exact GELU: the tanh form of the paper, 5e-4 away, takes 3 times as long on a CPU
        self.mlp = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            if hidden
            else None
        )

    @property
    def branches(self) -> list[nn.Module]:
        """What is added to the tokens, in turn."""
        return [self.mixer] if self.mlp is None else [self.mixer, self.mlp]

    @abstractmethod
    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D).

        The network has added its noise embedding to condition.vector (B, D), and set it before
        condition.tokens (B, L, D).
        """
