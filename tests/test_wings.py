"""Tests that the docstring of each wing (a package in llada_jax) is true: what it may import, where to start reading.

import-linter checks the order of the wings.
"""

import ast
import re
import tomllib

import pytest
from paths import ROOT

PACKAGE = ROOT / "llada_jax"
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imported(wing: str) -> set[str]:
    """Returns the names below llada_jax that the files of a wing import from, without the wing itself."""
    found = set()
    for file in (PACKAGE / wing).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "llada_jax":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llada_jax."):
                found.add(node.module.split(".")[1])
    return found - {wing, "__version__"}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_it_imports_and_where_it_begins(wing):
    text = " ".join(ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text())).split())
    allowed = set(re.search(r"May import: ([\w, ]+)\.", text)[1].split(", "))
    assert imported(wing) == allowed
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (PACKAGE / wing / name).is_file()


def test_every_wing_and_entry_point_has_its_place_in_the_order():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = {name.strip() for line in contract["layers"] for name in line.split("|")}
    there = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | set(WINGS)
    assert named == there


def test_the_map_in_the_readme_names_every_room():
    text = (ROOT / "README.md").read_text()
    rows = {row.split("|")[2].strip(" `/"): row for row in text.splitlines() if row.startswith("| ")}
    for wing in WINGS:
        rooms = {file.name for file in (PACKAGE / wing).glob("*.py")} - {"__init__.py"}
        assert {room for room in rooms if f"`{room}`" not in rows[wing]} == set()


def test_no_file_is_too_long_to_be_understood_in_one_sitting():
    long = {file.name: lines for file in PACKAGE.rglob("*.py") if (lines := file.read_text().count("\n")) > 400}
    assert not long
