"""Put the generated tables of `docs/results/` into the README, between their marks.

Without arguments it rewrites the README; with `--check` it only tells whether the README is up to date (exit status 1
when not).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from speechbrain_mifuse.corpora.manifest import atomic_write

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def filled(readme: str, tables: Path) -> str:
    """README with every marked block replaced by the table it names."""
    return BLOCK.sub(lambda m: m[1] + "\n" + body(tables / m[2]) + "\n" + m[3], readme)


def body(path: Path) -> str:
    """A table without the heading that it has as a file of its own."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("# ")).strip() + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before, ROOT / "docs" / "results")
    if "--check" in sys.argv[1:]:
        sys.exit(before != after)
    atomic_write(path, after)
