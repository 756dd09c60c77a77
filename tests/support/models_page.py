"""The table of docs/guide/models.md: the share of each model's parameters that has masks, what is left, and why."""

from __future__ import annotations

from collections import defaultdict

from metamask_ext import conversion_report, convert
from metamask_ext.nn.report import ConversionReport

from .model_zoo import ZOO
from .paths import ROOT

PAGE = ROOT / "docs" / "guide" / "models.md"
BEGIN, END = "<!-- table: make models-page -->\n", "<!-- end of table -->\n"
LEAST = 0.0005
"""A smaller share than this is not given in percent."""


def table() -> str:
    """The table, of every model with its default sizes."""
    lines = ["| model | parameters | share masked | what is left and why |", "|---|---|---|---|"]
    for entry in ZOO:
        report = conversion_report(convert(entry.full()))
        name = f"{entry.name}, {entry.note}" if entry.note else entry.name
        lines.append(f"| {name} | {report.total / 1e6:,.1f} M | {report.share:.1%} | {_left(report)} |")
    return "\n".join(lines) + "\n"


def _left(report: ConversionReport) -> str:
    """The rest by type and reason, the largest first."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for left in report.left:
        before = counts[left.type, left.reason]
        # The embeddings of encoder and decoder may be one table.
        counts[left.type, left.reason] = (
            max(before, left.parameters) if "shares its parameter" in left.reason else before + left.parameters
        )
    parts = []
    for (kind, reason), count in sorted(counts.items(), key=lambda item: -item[1]):
        share = count / report.total
        parts.append(f"{f'{share:.1%}' if share >= LEAST else 'less than 0.1%'} `{kind}`: {reason}")
    return "; ".join(parts) or "nothing"


def page() -> str:
    """The whole page with the table as it is now."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"
