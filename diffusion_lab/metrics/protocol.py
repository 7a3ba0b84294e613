"""How a figure was measured: two figures may be compared exactly if their protocols are one."""

import json

from diffusion_lab.common import hashing
from diffusion_lab.common.errors import UserError

FINGERPRINT = "fingerprint"
# what each entry means to people, and what makes it equal: an override, or words
WORDS = {
    "extractor": ("with features of", "give both the same metrics"),
    "extractor_fingerprint": ("with extractor weights", "give both the same extractor"),
    "data": ("against data with the checksum", "measure both on the same data"),
    "reference_images": ("against so many training images:", "metrics.reference_size="),
    "num_samples": ("on so many samples:", "metrics.num_samples="),
}
Protocol = dict[str, str | int]


def with_fingerprint(protocol: Protocol) -> Protocol:
    """The protocol and the first 12 digits of its sha256, under "fingerprint"."""
    content = json.dumps(protocol, sort_keys=True)
    return protocol | {FINGERPRINT: hashing.of_text(content)[:12]}


def short_count(count: int) -> str:
    """A number of images as a name has it: 60000 -> 60k, 1234 -> 1234."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def require_same(protocols: dict[str, Protocol]) -> None:
    """Raises UserError, naming the first difference, unless all protocols, by run, are one."""
    (first, expected), *others = protocols.items()
    for name, protocol in others:
        for key in sorted(expected | protocol, key=lambda key: (key not in WORDS, key)):
            a, b = expected.get(key), protocol.get(key)
            if a != b and key != FINGERPRINT:
                words, remedy = WORDS.get(key, (f"with {key}", f"make {key} the same"))
                if remedy.endswith("="):
                    remedy = f"measure it by `diffusion-lab evaluate run={name} {remedy}{a}`"
                else:
                    remedy += ", and run `diffusion-lab evaluate` on both"
                raise UserError(
                    f"{first} was measured {words} {a}, {name} {words} {b}, and such figures "
                    f"cannot be compared; {remedy}"
                )
