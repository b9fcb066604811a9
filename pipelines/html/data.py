"""The report's table of splits and classes."""

from __future__ import annotations

from typing import Any

from pipelines.html.charts import escape
from simclr.data.sources.reading import rows_of

_SHOWN = 3


def data_table(understood: dict[str, Any]) -> str:
    """What `prepare` understood of the source, as a manifest keeps it; "" for older shards."""
    if not (rows := rows_of(understood)):
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("split", "images", "labelled", "classes", "smallest class", "largest class"))
    body = ""
    for row in rows:
        cells = (f"{row.images:,}", f"{100 * row.labelled / max(row.images, 1):.4g} %", f"{row.classes:,}", row.smallest, row.largest)
        body += f'<tr><th scope="row">{escape(row.split)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
    facts = {"splits": str(understood.get("splits_by", "")), "classes": str(understood.get("classes_by", ""))}
    for name, split in understood["splits"].items():
        examples = (f"{path} → {label if label is not None else 'no class'}" for path, label in split["examples"][:_SHOWN])
        facts[f"{name}, as"] = "; ".join(examples)
    if left := understood.get("left_out"):
        facts["left out"] = ", ".join(f"{count:,} {kind}" for kind, count in left.items())
    if notes := understood.get("notes"):
        facts["notes"] = "; ".join(notes)
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if value)
    return f'<table class="splits"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><dl class="facts">{listed}</dl>'
