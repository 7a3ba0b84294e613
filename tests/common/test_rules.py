"""Rules on what cannot be combined: which apply, and the sentence of each."""

from typing import ClassVar

import pytest

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.rules import Rules, check, collected, option, sentences


class Sharp:
    """A part with a rule about itself, and one about another part."""

    def __init__(self, edge=0):
        self.edge = edge

    rules: ClassVar[Rules] = {
        ".edge={knife.edge} cuts; write knife.edge=1": lambda knife: knife.edge > 1,
        "tears {bread} bread; write bread=hard": lambda knife, bread: bread == "soft",
    }


class SharpSaw(Sharp):
    """A part that adds a rule to those it inherits."""

    rules: ClassVar[Rules] = {
        "is loud; write knife=sharp": lambda knife: True,
    }


TABLE = {
    "there is no bread; write bread=soft": lambda bread: bread is None,
}
KEYS = {"knife": "kitchen.knife"}


def said(**parts):
    return list(sentences(TABLE, KEYS, **parts))


def test_a_rule_that_looks_at_an_absent_part_does_not_apply():
    assert said() == []
    assert said(knife=Sharp()) == []
    assert said(bread=None) == ["there is no bread; write bread=soft"]


def test_a_part_brings_its_rules_under_its_key():
    assert said(knife=Sharp(2)) == ["kitchen.knife.edge=2 cuts; write knife.edge=1"]
    assert said(knife=Sharp(), bread="soft") == [
        "kitchen/knife=sharp tears soft bread; write bread=hard"
    ]


def test_a_subclass_keeps_the_rules_of_its_base():
    assert [each.split(" ", 1)[1] for each in said(knife=SharpSaw(2))] == [
        "cuts; write knife.edge=1",
        "is loud; write knife=sharp",
    ]


def test_the_first_rule_that_is_broken_is_raised():
    with pytest.raises(UserError, match="edge=2"):
        check(TABLE, KEYS, knife=SharpSaw(2), bread="soft")
    check(TABLE, KEYS, knife=Sharp(), bread="hard")


def test_options_are_named_after_classes():
    names = ("MeanFlow", "X0", "DPMSolver", "UniPC", "SlicedScoreMatching")
    assert [option(type(name, (), {})()) for name in names] == [
        *("mean_flow", "x0", "dpm_solver", "unipc", "sliced_score_matching")
    ]


def test_broken_rules_are_collected_and_what_follows_from_them_is_dropped():
    with collected() as broken:
        check(TABLE, KEYS, bread=None)
        check(TABLE, KEYS, knife=Sharp(2))
        raise RuntimeError("of a knife that cuts")
    assert [each.split("; ")[1] for each in broken] == ["write bread=soft", "write knife.edge=1"]
    with pytest.raises(RuntimeError), collected():
        raise RuntimeError("of nothing that was said")
    with pytest.raises(UserError):
        check(TABLE, KEYS, bread=None)
