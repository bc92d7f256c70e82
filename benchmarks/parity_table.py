"""The table of docs/models.md: every family beside transformers, each largest difference, from what the tests recorded.

    MORAY_PARITY_RECORDS=records pytest tests/model/hf
    MORAY_PARITY_RECORDS=records VENV/bin/python -m pytest tests/model/hf    # transformers 4.57
    python benchmarks/parity_table.py records [--into docs/models.md]

Records append: begin with a folder that is not there. With --into, the table replaces what stands between the two lines
that say `parity table`, and the family shown as an example is what its file holds now.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKS = ("logits", "loss", "gradients", "decoding", "padding", "export")
EXAMPLE = Path(__file__).parent.parent / "model/hf/families/olmoe.py"

Record = dict[str, Any]


def read_records(folder: Path) -> list[Record]:
    """What every check of every case found (`tests/hf_parity.py` says how). Raises ValueError if there is nothing."""
    records = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not records:
        raise ValueError(f"{folder} holds no records; run pytest tests/model/hf with MORAY_PARITY_RECORDS={folder}")
    return records


def table(records: Iterable[Record]) -> str:
    """Families in the order in which they were tested; a cell is the largest difference of all cases and versions."""
    by_family: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_family[record["family"]].append(record)
    lines = [
        f"| family | cases | {' | '.join(CHECKS)} | transformers |",
        f"|---|---|{'---|' * len(CHECKS)}---|",
    ]
    notes: dict[str, int] = {}
    for family, held in by_family.items():
        cells = [_cell([record for record in held if record["check"] == check], notes) for check in CHECKS]
        versions = ", ".join(sorted({record["transformers"] for record in held}))
        lines.append(f"| {family} | {len({record['case'] for record in held})} | {' | '.join(cells)} | {versions} |")
    footnotes = [f"\\[{number}\\] tolerance {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, *([""] if footnotes else []), *footnotes])


def _cell(records: list[Record], notes: dict[str, int]) -> str:
    """The largest difference, and the number of the note that says why it may be more than 1e-5."""
    if not records:
        return "-"
    reasons = {f"{r['tolerance']:.0e}: {r['reason']}" for r in records if r["reason"]}
    marks = "".join(f" [{notes.setdefault(reason, len(notes) + 1)}]" for reason in sorted(reasons))
    return f"{max(record['difference'] for record in records):.1e}{marks}"


def replaced(text: str, what: str, new: str) -> str:
    """The page with something else between its two marks of that name. Raises ValueError where they are missing."""
    begin, end = f"<!-- {what}: begin -->", f"<!-- {what}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must hold one line {begin} and one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    made = table(read_records(options.records))
    if options.into:
        page = replaced(options.into.read_text(), "parity table", made)
        options.into.write_text(replaced(page, "family", f"```python\n{EXAMPLE.read_text()}```"))
    else:
        print(made)


if __name__ == "__main__":
    main()
