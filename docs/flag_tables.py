#!/usr/bin/env python3
"""Write the flag tables of README.md from the scripts' own parsers.

    python docs/flag_tables.py           replace what stands between `<!-- flags: NAME -->` and `<!-- end -->`
    python docs/flag_tables.py --check   change nothing; exit 1 when a table is stale
"""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"run": "run", "data": "data", "optimisation": "optimisation (training only)",
          "model": "architecture (training only)", "sampling": "sampling", "evaluation": "evaluation"}


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "" if value is None else "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def several(uses: list[tuple[str, str, Any]], families: int) -> str:
    """Defaults of one flag: a single one, or each with the families that have it."""
    owners: dict[str, list[str]] = {}
    for _, family, field in uses:
        owners.setdefault(shown(field.default), [])
        if family not in owners[shown(field.default)]:
            owners[shown(field.default)].append(family)
    known = len({family for names in owners.values() for family in names})
    if len(owners) == 1 and known == families:
        return next(iter(owners))
    return ", ".join(f"{value or 'none'} ({', '.join(names)})" for value, names in owners.items())


def table(script: Any) -> str:
    """Markdown: one row a flag, grouped as in --help."""
    uses: dict[str, list[tuple[str, str, Any]]] = {}
    for mode in script.MODES:
        for family in script.FAMILIES:
            for name, field in script.flags(mode, family).items():
                uses.setdefault(name, []).append((mode, family, field))
    lines = ["| flag | modes | default | meaning |", "|---|---|---|---|"]
    groups = dict.fromkeys([*TITLES, *(found[0][2].metadata["group"] for found in uses.values())])
    for group in groups:
        rows = {name: found for name, found in uses.items() if found[0][2].metadata["group"] == group}
        if rows:
            lines.append(f"| **{TITLES.get(group, group)}** | | | |")
        for name, found in rows.items():
            modes = list(dict.fromkeys(mode for mode, _, _ in found))
            texts = dict.fromkeys(field.metadata["help"] for _, _, field in found)
            choices = found[0][2].metadata["choices"]
            text = "; or: ".join(texts) + (f" ({', '.join(map(str, choices))})" if choices else "")
            both = f", `--no-{name}`" if found[0][2].default is True else ""
            lines.append(f"| `--{name}`{both} | {'all' if len(modes) == 3 else ', '.join(modes)} | "
                         f"{several(found, len(script.FAMILIES))} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def main() -> int:
    path = ROOT / "README.md"
    old = new = path.read_text()
    for name in ("image_gen", "audio_gen"):
        sys.path.insert(0, str(ROOT / name))
        marked = re.compile(rf"(<!-- flags: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(new):
            sys.exit(f"error: README.md has no place for the flags of {name}: <!-- flags: {name} --> ... <!-- end -->")
        text = table(__import__(name))
        new = marked.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", new)
    if "--check" in sys.argv and new != old:
        sys.exit("error: the flag tables of README.md are stale: run python docs/flag_tables.py")
    if new != old:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
