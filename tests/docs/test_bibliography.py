# SPDX-License-Identifier: Apache-2.0
"""The bibliography names what the library cites, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "bibliography.md"
CITED = re.compile(r"(?:arXiv|arxiv\.org/abs/)[\s:]*(\d{4}\.\d{4,5})")


def cited(*paths: Path) -> set[str]:
    return {number for path in paths for number in CITED.findall(path.read_text())}


def test_what_is_cited_is_listed_and_the_other_way_round() -> None:
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path != PAGE]
    sources = list((ROOT / "galore_optax").rglob("*.py"))
    assert cited(*pages, *sources, ROOT / "README.md") == cited(PAGE)


def test_a_link_leads_to_the_number_beside_it() -> None:
    links = re.findall(r"\[arXiv ([\d.]+)\]\(https://(\S+)\)", PAGE.read_text())
    assert len(links) > 20
    for number, address in links:
        assert address == f"arxiv.org/abs/{number}"
