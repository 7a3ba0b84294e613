"""How a figure was measured: two figures may be compared exactly if their protocols are one."""

import json

from diffusion_lab.common import hashing

FINGERPRINT = "fingerprint"
Protocol = dict[str, str | int]


def with_fingerprint(protocol: Protocol) -> Protocol:
    """The protocol and the first 12 digits of its sha256, under "fingerprint"."""
    content = json.dumps(protocol, sort_keys=True)
    return protocol | {FINGERPRINT: hashing.of_text(content)[:12]}


def short_count(count: int) -> str:
    """A number of images as a name has it: 60000 -> 60k, 1234 -> 1234."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
