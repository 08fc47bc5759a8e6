"""A job's folder as the start of a command sees it: its trials, the keys of earlier starts, and its rows. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path

import yaml

from flora_lab import analysis
from flora_lab.analysis import tables
from flora_lab.analysis.fields import Row
from flora_lab.analysis.results import summarise
from flora_lab.analysis.rows import RESULTS, read
from flora_lab.errors import ConfigError
from flora_lab.methods import METHODS
from flora_lab.settings import Config

Pair = tuple[str, int | None]  # (variant, budget); None for a method without a size to choose
# keys that no row depends on: they may change between starts
FREE = (
    "output",
    "cache",
    "mirror",
    "fresh",
    "comparison.*",
    "*training.eval_steps",
    "*training.gradient_checkpointing",
)
OF_TRIALS = ("budget", "methods.*.learning_rate", "training.learning_rate")  # every trial of a comparison has its own
FILES = (KEYS := "config.yaml", MARK := "versions.json", RESULTS, "curves.png")
FOLDERS = ("pretraining", "logs", "trials")


@dataclass(frozen=True)
class Trial:
    """``variant``: a name in the job's `methods`. ``budget``: None for a method without one."""

    variant: str
    budget: int | None
    seed: int
    learning_rate: float  # rounded to six digits, so that 0.1 · 3 and 0.3 · 1 are equal

    def __post_init__(self):
        object.__setattr__(self, "learning_rate", float(f"{self.learning_rate:.6g}"))

    @property
    def name(self) -> str:
        parts = [self.variant, f"{self.budget}" if self.budget else "", f"s{self.seed}", f"lr{self.learning_rate:g}"]
        return "-".join(part for part in parts if part)


def keys_of(config: Config, trial: Trial) -> dict:
    """Everything that a trial's weights depend on, by key."""
    flat = _flat(asdict(config) | {"methods": {trial.variant: asdict(config.methods[trial.variant])}})
    free = (*FREE, *OF_TRIALS)
    return asdict(trial) | {k: v for k, v in flat.items() if not any(fnmatch(k, pattern) for pattern in free)}


def learning_rate(config: Config, variant: str) -> float:
    return config.methods[variant].learning_rate or config.training.learning_rate


def pairs(config: Config, variants: Iterable[str], budgets: Sequence[int]) -> list[Pair]:
    """Every variant at every budget, or once if its method has no size to choose."""
    sized = {name: METHODS[config.method_of(name)].size for name in variants}
    return [
        (name, budget)
        for name, size in sized.items()
        for budget in (budgets if size and size not in config.methods[name].options else [None])
    ]


def check_comparison(config: Config, variants: Iterable[str]) -> None:
    """Raise ConfigError for variants, seeds or rates that can't be compared."""
    if unknown := set(variants) - set(config.methods):
        name = min(unknown)
        add = f"; methods.{name}.learning_rate=1e-3 adds it" if name in METHODS else ""
        raise ConfigError(f"--methods {name}: the job has {', '.join(config.methods)}{add}")
    for name in ("seeds", "rates"):
        values = getattr(config.comparison, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"comparison.{name}={values}: expected one or more different values")
    if config.comparison.rate_seeds > len(config.comparison.seeds):
        raise ConfigError(
            f"comparison.rate_seeds={config.comparison.rate_seeds}: there are {len(config.comparison.seeds)} seeds"
        )


class Folder:
    """The folder of a job, and its rows.

    Args:
        free: further keys that may change between starts.
    """

    def __init__(self, config: Config, free: tuple[str, ...] = ()):
        self.config, self.free = config, (*FREE, *free)
        self.folder = Path(config.output)
        if reserved := {*FILES, *FOLDERS} & set(config.methods):
            raise ConfigError(f"methods.{min(reserved)}: this name is reserved for a file or folder in the output")

    # ------------------------------------------------------------------------------------------------------- its keys

    def earlier_keys(self) -> dict | None:
        """The keys of an earlier start, if any. Raises ConfigError if the folder's files are not ours to overwrite."""
        file, mark = self.folder / KEYS, self.folder / MARK
        if not file.exists():
            return None
        try:
            if "flora-peft" in mark.read_text() and isinstance(keys := yaml.safe_load(file.read_text()), dict):
                return keys
        except (OSError, yaml.YAMLError):
            pass
        raise ConfigError(f"{file} was not written by flora, or is corrupt: choose another folder with output=FOLDER")

    def check_keys(self, earlier: dict, now: dict) -> None:
        """Raise ConfigError if a key differs from the start that made the folder's rows. Variants may come and go."""
        earlier, now = _flat(earlier), _flat(now)
        differing = [
            (key, earlier.get(key), now.get(key))
            for key in earlier | now
            if earlier.get(key) != now.get(key)
            and not any(fnmatch(key, pattern) for pattern in self.free)
            and not (key.startswith("methods.") and not (key in earlier and key in now))
        ]
        for row in self.rows():  # also of variants that an earlier start no longer had
            if variant := self.config.methods.get(row["variant"]):
                key, method = f"methods.{row['variant']}", self.config.method_of(row["variant"])
                old, new = [row["method"], row["options"]], [method, json.loads(json.dumps(variant.options))]
                differing += [(key, old, new)] if old != new else []
        for key, old, new in differing:
            raise ConfigError(
                f"{self.folder} has results with {key}={old}, now {key}={new}: "
                "choose another folder with output=FOLDER, or start over with fresh=true"
            )

    # -------------------------------------------------------------------------------------------------------- its rows

    def rows(self) -> list[Row]:
        file = self.folder / RESULTS
        try:
            return read([file]) if file.exists() and file.stat().st_size else []
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def rows_of(self, trials: Sequence[Trial]) -> list[Row]:
        """The rows of those trials that have ended, in the order of the trials."""
        ended = self._ended()
        return [ended[trial] for trial in trials if trial in ended]

    def _ended(self) -> dict[Trial, Row]:
        ran = [row for row in self.rows() if "left_out" not in row]
        return {Trial(**{field.name: row[field.name] for field in fields(Trial)}): row for row in ran}

    # ------------------------------------------------------------------------------------------------- what it prints

    @property
    def curves(self) -> Path:
        """The figure that `flora train` draws."""
        return self.folder / "curves.png"

    @property
    def page(self) -> Path:
        """The report that `flora compare` writes."""
        return self.folder / "report.html"

    def training_text(self, rows: Sequence[Row], left_out: Iterable[str] = ()) -> str:
        """The last lines of `flora train`."""
        lines = "\n".join([tables.summary(rows), *left_out])
        return f"\n{lines}\n\neverything is in {self.folder}, the learning curves in {self.curves}"

    def comparison_text(self, rows: Sequence[Row]) -> str:
        """The last lines of `flora compare`."""
        table = "\n\n".join([analysis.text(summarise(rows)), *tables.remarks(rows)])
        return f"\n{table}\n\nevery run is a line of {self.folder / RESULTS}; the report: {self.page}"

    # ------------------------------------------------------------------------------------------------ what is missing

    def trained(self) -> list[Row] | None:
        """The rows of a `flora train` that has ended, in the order of its variants; None if something is missing."""
        config = self.config
        trials = [
            Trial(*pair, config.seed, learning_rate(config, pair[0]))
            for pair in pairs(config, config.methods, [config.budget])
        ]
        return self._ended_rows(trials) if self.curves.exists() else None

    def compared(self, variants: Sequence[str]) -> list[Row] | None:
        """All rows, if no trial of `flora compare` is missing; else None. What was left out may be able to run now."""
        keys = self.config.comparison
        wanted = pairs(self.config, variants or self.config.methods, keys.budgets or [self.config.budget])
        if not self.page.exists() or self._ended_rows(grid(self.config, wanted)) is None:
            return None
        rows = self.rows()
        return rows if self._ended_rows(others(self.config, wanted, rows)) is not None else None

    def _ended_rows(self, trials: Sequence[Trial]) -> list[Row] | None:
        """Their rows, if all of them have ended with the keys of this start."""
        earlier = None if self.config.fresh else self.earlier_keys()
        if not earlier or self._ends_in_half_a_row() or len(done := self.rows_of(trials)) < len(trials):
            return None
        self.check_keys(earlier, asdict(self.config))
        return done

    def _ends_in_half_a_row(self) -> bool:
        """Whether a process was killed while it wrote a row."""
        file = self.folder / RESULTS
        return file.exists() and not file.read_bytes().endswith(b"\n")


def grid(config: Config, pairs: Iterable[Pair]) -> list[Trial]:
    """The trials that choose a learning rate: all rates with each of the first seeds."""
    keys, pairs = config.comparison, list(pairs)
    seeds = keys.seeds[: keys.rate_seeds]
    return [
        Trial(*pair, seed, learning_rate(config, pair[0]) * rate)
        for seed in seeds
        for rate in keys.rates
        for pair in pairs
    ]


def others(config: Config, pairs: Iterable[Pair], rows: Iterable[Row]) -> list[Trial]:
    """The other seeds' trials, at the learning rate that did best on the validation split."""
    rows, keys = list(rows), config.comparison
    best = {pair: _best_rate(rows, pair) for pair in pairs}
    return [Trial(*pair, seed, rate) for seed in keys.seeds[keys.rate_seeds :] for pair, rate in best.items()]


def _best_rate(rows: Iterable[Row], pair: Pair) -> float:
    return summarise(row for row in rows if (row["variant"], row["budget"]) == pair)[0].learning_rate


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; the options of a variant count as one value."""
    flat = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict) and value and key != "options"
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat
