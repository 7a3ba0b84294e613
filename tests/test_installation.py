"""The versions that `make setup` installs through uv fit pyproject.toml, from the public index."""

import re
import tomllib

from helpers.paths import ROOT


def test_the_lock_is_of_these_requirements_and_of_the_public_index_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "uv.lock").read_text()
    (locked,) = [p for p in tomllib.loads(text)["package"] if p["name"] == project["name"]]
    asked = {("", need) for need in project["dependencies"]}
    for extra, needs in project["optional-dependencies"].items():
        asked |= {(extra, need) for need in needs}
    found = set()
    for need in locked["metadata"]["requires-dist"]:
        marker = re.search(r"extra == '(\w+)'", need.get("marker", ""))
        extras = f"[{','.join(need['extras'])}]" if "extras" in need else ""
        name = need["name"] + extras + need.get("specifier", "")
        found.add((marker[1] if marker else "", name))
    assert found == asked, "run `uv lock`"
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}
