"""Small networks, untrained."""

from functools import partial

from diffusion_lab.backbone import AdaLNZero, Block, DiT

FIXED = {"positions": "sincos", "qk_norm": False, "window": None, "long_skips": False}


def small_dit(block: type[Block] | partial = AdaLNZero, **settings: object) -> partial:
    """Makes a DiT of width 16 and one block on patches of 2 x 2 pixels, unless told otherwise."""
    sizes = {"patch": 2, "width": 16, "depth": 1, "heads": 2}
    return partial(DiT, **sizes | FIXED | {"block": partial(block, mlp_ratio=2.0)} | settings)
