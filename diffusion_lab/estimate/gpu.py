"""A kind of GPU, as its maker describes it: the peaks of a roofline.

A roofline (doi:10.1145/1498765.1498785) takes max(FLOPs / peak, bytes / bandwidth) for the time.
"""

from diffusion_lab.common.ranges import Positive, settings


@settings
class GPU:
    """The peaks of a GPU and of the links to others.

    The peaks are FLOP/s of dense matrix products, by the type of the numbers; `memory` is in bytes,
    `bandwidth` the memory's in bytes/s. `link` goes to the GPUs of the same node and `network`, a
    GPU's share of its node's, to other nodes, both in bytes/s and one direction.
    """

    name: str
    bf16_flops: Positive
    float32_flops: Positive
    memory: Positive
    bandwidth: Positive
    link: Positive
    network: Positive

    def peak(self, precision: str) -> float:
        """The peak in FLOP/s in one of Lightning's precisions; fp16 is as fast as bf16."""
        return self.float32_flops if precision == "32-true" else self.bf16_flops

    def bus(self, devices: int, nodes: int) -> float:
        """The bytes/s at which a ring over all GPUs of all nodes passes data on.

        Each of a node's GPUs has its own way to other nodes, and rings use them all.
        """
        return self.link if nodes == 1 else min(self.link, devices * self.network)
