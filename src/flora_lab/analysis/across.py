"""Numbers over several jobs and budgets. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from flora_lab.analysis.results import SIGNIFICANT, Result, by_job, plain
from flora_lab.analysis.style import Style
from flora_lab.analysis.tables import NONE, Table, factor, probability

RIVALS = ("lora", "dora")

NOTE = (
    "Mean difference × 100, over all pairs of runs of the same job, budget and seed, each at the rate that validation "
    "chose; in brackets in how many the method is ahead. p: paired t-test over these pairs, "
    f"▲ above and ▼ below at p < {SIGNIFICANT:g}."
)


def pairs(results: Sequence[Result]) -> Table | None:
    """Every method that is given ranks by the budget against LoRA and DoRA. None without two jobs, or two
    budgets, to compare at.

    Jobs whose metric is no share or correlation are left out.
    """
    jobs = {job: of for job, of in by_job(results).items() if factor(of) == 100}
    found: dict[str, dict[str, list[float]]] = {}
    styles: dict[str, Style] = {}
    used: set[tuple[str, int | None]] = set()
    for job, of in jobs.items():
        for rival in RIVALS:
            for theirs in plain(of, rival):
                for ours in of:
                    if ours.budget == theirs.budget and ours.variant != theirs.variant:
                        common = ours.values.keys() & theirs.values.keys()
                        differences = [ours.values[seed] - theirs.values[seed] for seed in common]
                        found.setdefault(ours.label, {}).setdefault(rival, []).extend(differences)
                        styles[ours.label] = ours.style
                        used.add((job, ours.budget))
    if len(used) < 2:
        return None
    lines = [
        [label, *(cell for rival in RIVALS for cell in _cells(found[label].get(rival, [])))]
        for label in sorted(found, key=lambda label: styles[label].order)
    ]
    columns = ["method", "against LoRA", "p", "pairs", "against DoRA", "p", "pairs"]
    return Table("all pairs", columns, lines, note=NOTE)


def _cells(differences: Sequence[float]) -> tuple[str, str, str]:
    """Mean difference × 100, its p, and in how many pairs it is above 0."""
    finite = [100 * difference for difference in differences if math.isfinite(difference)]
    if not finite:
        return NONE, NONE, NONE
    mean, p = statistics.fmean(finite), None
    if max(finite) - min(finite) > 1e-9:  # then at least two
        from scipy.stats import ttest_1samp

        p = float(ttest_1samp(finite, 0).pvalue)
    return f"{mean:+.2f}", probability(p, mean), f"{sum(value > 0 for value in finite)} of {len(finite)}"
