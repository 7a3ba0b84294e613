"""Metrics that were measured in different ways are not compared."""

import pytest
from helpers.refusals import assert_names, refused

from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.runs.results import require_same

ONE = {
    "extractor": "inception",
    "data": "0123",
    "reference": "train",
    "reference_images": 50_000,
    "num_samples": 5000,
}


def test_the_fingerprint_is_of_every_entry_and_of_no_order():
    known = with_fingerprint(ONE)["fingerprint"]
    assert len(known) == 12
    assert with_fingerprint(dict(reversed(ONE.items())))["fingerprint"] == known
    others = {with_fingerprint(ONE | {key: "other"})["fingerprint"] for key in ONE}
    assert len(others | {known}) == 6


def test_equal_protocols_pass():
    require_same({"a": with_fingerprint(ONE), "b": with_fingerprint(ONE)})
    require_same({"a": with_fingerprint(ONE), "b": ONE})


@pytest.mark.parametrize(
    ("change", "name", "values"),
    [
        ({"num_samples": 1000}, "samples", (5000, 1000)),
        ({"extractor": "x", "num_samples": 1}, "features", ("inception", "x")),
        ({"reference": "validation"}, "metrics.reference=", ("train", "validation")),
        ({"rounding": "none"}, "rounding", (None, "none")),
    ],
)
def test_the_first_difference_is_named_with_its_remedy(change, name, values):
    protocols = {"a": with_fingerprint(ONE), "b": with_fingerprint(ONE | change)}
    with refused(name, *values, "diffusion-lab evaluate"):
        require_same(protocols)


def test_a_reference_in_a_file_is_no_value_to_write():
    in_a_file = with_fingerprint(ONE | {"reference": "FILE"})
    with pytest.raises(UserError) as caught:
        require_same({"a": in_a_file, "b": with_fingerprint(ONE)})
    assert_names(str(caught.value), "metrics.reference", "diffusion-lab evaluate")
    assert "evaluate run=" not in str(caught.value)
