"""The folders of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
TESTS = ROOT / "tests"
