"""A report on collected trials, from which tables, pictures and pages are made."""

import pandas

from federated import privacy
from federated.domains import log_base
from federated.options import UsageError
from federated.reporting import pivot, selection, tables
from federated.reporting.collect import HPARAM, OF_ALGORITHM, SWEEP, Collected, hparams_of, with_settings
from federated.reporting.tables import NAMED
from federated.search import RANDOM, Space
from federated.settings import Settings, comparable

# Settings in which algorithms that are compared in one picture may differ: those that may follow from the algorithm, and where
# it is computed
_MAY_DIFFER = (*OF_ALGORITHM, "device", "threads")


class Report:
    """A report on finished trials. `rule` names the selection; `target` is a test accuracy to be reached; all algorithms are
    compared with `against`, by default the first; the first table has the values of the settings `columns` side by side;
    epsilon is at `delta`, by default that of privacy.default_delta.
    Raises UsageError if there is nothing to compare with.

    collected   what it reports on
    rounds      see federated.reporting.collect.COLUMNS; accuracy is the column `judged_by`, for all rows
    settings    {sweep: Settings}, of the sweeps that have a best setting
    varying     the settings that are not equal in all of these, but for the model, the data set and the algorithm
    data_dirs   see federated.reporting.collect.Collected, like spaces and extensions
    rankings    {sweep: its settings, the best first}; `best_in` and `as_good_in`: see federated.reporting.selection.certainty
    stopped     {sweep: the settings that halving stopped, those of more rounds first}
    comparable  {sweep: all its settings by what can be compared}: `rankings`, or if halving stopped some, the first trials at
                the first rung
    first_rungs see federated.reporting.collect.Collected
    chosen      {sweep: the rows that count, of its best setting}
    of_best     {sweep: all rounds of the judged trials of its best setting}
    of_clients  {sweep: the accuracies of that setting's clients}, see federated.reporting.selection.of_clients
    best        one row a sweep: its best setting, and what the sweep took. What is compared has the same `group`; `differs`
                says in what a sweep is unlike the `reference` that others in the same cell are compared with
    cells       {cell: its sweeps}: what is equal but for the algorithm, and what may follow from it
    comparison  the paired tests, one row each
    personal    the algorithms whose clients end up with models of their own
    ignored     lines on what is left out or doubtful
    """

    def __init__(
        self,
        collected: Collected,
        rule: str,
        target: float | None = None,
        against: str | None = None,
        columns: list[str] | None = None,
        delta: float | None = None,
    ) -> None:
        self.collected = collected
        self.data_dirs, self.extensions, self.spaces = collected.data_dirs, collected.extensions, collected.spaces
        self.selection, self.target = rule, target
        self.personal = [name for name, kind in collected.kinds.items() if kind.personal]
        self.judged_by = selection.judged_by(bool(self.personal))
        self.rounds = collected.rounds.assign(accuracy=collected.rounds[self.judged_by])
        self.ignored = ignored(collected)
        self.rankings, self.chosen, self.of_best, self.of_clients, self.hparams, rows = {}, {}, {}, {}, {}, []
        self.stopped: dict[str, pandas.DataFrame] = {}
        self.comparable: dict[str, pandas.DataFrame] = {}
        self.first_rungs = collected.first_rungs
        for sweep, rounds in self.rounds.groupby(SWEEP, sort=False):
            diverged = collected.diverged_sets(sweep)
            judged = selection.judged(rounds, diverged)
            if judged.empty:
                self.ignored.append(f"Ignored: {sweep}, whose clients have no test samples.")
                continue
            self.hparams[sweep] = hparams_of(rounds)
            chosen = selection.chosen(judged, rule)
            kind = collected.kinds[collected.settings[sweep].registered_algorithm]
            ranking = selection.ranked(chosen, rule, kind.has_global_model).assign(rounds_run=collected.settings[sweep].rounds)
            if rule in ("validation", "last"):
                certainty = selection.certainty(ranking, chosen, collected.held_out)
                ranking = ranking.assign(best_in=certainty["best"], as_good_in=certainty["as_good"])
            self.rankings[sweep], best = ranking, ranking["hash"][0]
            self._rank_stopped(sweep, judged, collected.stopped.get(sweep), kind.has_global_model)
            self.chosen[sweep] = chosen[chosen["hash"] == best]
            seeds = self.chosen[sweep]["trial_seed"].unique()
            self.of_best[sweep] = rounds[(rounds["hash"] == best) & rounds["trial_seed"].isin(seeds)]
            self.of_clients[sweep] = selection.of_clients(self.chosen[sweep], collected.of_clients)
            rows.append(
                ranking.iloc[0].to_dict()
                | _counts(rounds, judged, diverged)
                | {"judged_by": self.judged_by}
                | selection.cost(rounds, self.of_best[sweep], target)
            )
            if sweep in self.stopped:
                rows[-1]["num_hparams"] += len(self.stopped[sweep])
                rows[-1]["seconds_total"] += collected.stopped[sweep].groupby("hash")["seconds"].max().sum()
        if not rows:
            raise UsageError("no clients have test samples to judge by")
        self.best = pandas.DataFrame(rows)
        self.settings = {sweep: collected.settings[sweep] for sweep in self.chosen}
        if any(settings.dp_clip is not None for settings in self.settings.values()):
            self.best["delta"] = [delta or privacy.default_delta(settings) for settings in self.settings.values()]
            self.best["epsilon"] = list(map(privacy.epsilon, self.settings.values(), self.best["delta"]))
        self.varying = _varying(list(self.settings.values()))
        self.columns = columns
        self.cells = self._cells()
        if against is not None:
            self.ignored += self._check_against(against)
        self._group(against)
        self.comparison = self.compare(self._references(against))

    def _rank_stopped(self, sweep: str, judged: pandas.DataFrame, rows: pandas.DataFrame | None, has_global: bool) -> None:
        """Rank the settings that halving stopped, and all settings by what can be compared. `rows` are those of the former,
        None if there are none."""
        self.comparable[sweep] = self.rankings[sweep]
        if rows is None:
            return
        rows = rows.assign(accuracy=rows[self.judged_by])

        def ranked(rows: pandas.DataFrame) -> pandas.DataFrame:
            evaluated = rows.dropna(subset=["val_acc", "accuracy"])
            return selection.ranked(selection.chosen(evaluated, self.selection), self.selection, has_global)

        ranking = ranked(rows)
        ranking = ranking.assign(rounds_run=ranking["hash"].map(rows.groupby("hash")["round"].max()))
        ranking = ranking.sort_values(["rounds_run", "score", "hparams_seed"], ascending=[False, False, True])
        ranking["rank"] = range(len(self.rankings[sweep]) + 1, len(self.rankings[sweep]) + len(ranking) + 1)
        self.stopped[sweep] = ranking
        first = judged[judged["trial_seed"] == rows["trial_seed"].min()]
        every = pandas.concat([first, rows], ignore_index=True)
        self.comparable[sweep] = ranked(every[every["round"] <= self.first_rungs[sweep]])

    def algorithm(self, sweep: str) -> str:
        """The algorithm of a sweep, by its registered name."""
        return self.settings[sweep].registered_algorithm

    def _cells(self) -> dict[str, list[str]]:
        cells: dict[str, list[str]] = {}
        for sweep, settings in self.settings.items():
            named = [name for name in self.varying if name not in _MAY_DIFFER]
            cells.setdefault(", ".join([f"{settings.model_arch} {settings.dataset}", *_written(settings, named)]), []).append(
                sweep
            )
        return cells

    def label(self, sweep: str) -> str:
        """The algorithm as the user wrote it, and what makes the sweep unlike others of its cell."""
        differs = self.best["differs"][list(self.settings).index(sweep)]
        return self.settings[sweep].algorithm + f" ({differs})" * bool(differs)

    def title(self, sweep: str) -> str:
        """The settings that distinguish a sweep from the others of the report."""
        settings = self.settings[sweep]
        names = [settings.model_arch, settings.dataset, settings.algorithm]
        return ", ".join([" ".join(names), *_written(settings, self.varying)])

    def _group(self, against: str | None) -> None:
        """Number the sweeps by what has to be equal for them to be compared: settings and budget."""
        sets = dict(zip(self.settings, self.best["num_hparams"]))
        equal = {
            sweep: comparable(each)
            | {
                "hyper-parameter sets": sets[sweep],
                "halving": f"from {self.first_rungs[sweep]} rounds" if sweep in self.stopped else "none",
            }
            for sweep, each in self.settings.items()
        }
        groups: dict[tuple, int] = {}
        self.best["group"] = [groups.setdefault(tuple(each.items()), len(groups)) for each in equal.values()]
        differs, references = {}, {}
        for sweeps in self.cells.values():
            reference = next((sweep for sweep in sweeps if self.algorithm(sweep) == against), sweeps[0])
            for sweep in sweeps:
                differs[sweep] = "; ".join(selection.differences(equal[sweep], equal[reference]))
                references[sweep] = self.algorithm(reference)
        self.best["differs"] = [differs[sweep] for sweep in self.settings]
        self.best["reference"] = [references[sweep] for sweep in self.settings]

    def _references(self, against: str | None) -> dict[int, str]:
        """{group: the sweep that its others are compared with}: that of `against`, or else the first; none if it lacks it."""
        references: dict[int, str] = {}
        for sweep, group in zip(self.settings, self.best["group"]):
            if against in (None, self.algorithm(sweep)):
                references.setdefault(group, sweep)
        return references

    def compare(self, references: dict[int, str]) -> pandas.DataFrame:
        """Paired tests of the best settings of each group against that of its reference."""
        if self.selection == "original":  # its rows are rounds, which cannot be paired
            return pandas.DataFrame()
        tests = selection.compare(self.chosen, self.best["group"].tolist(), references)
        return tests.assign(against=tests["against"].map(self.algorithm)) if len(tests) else tests

    def _check_against(self, against: str) -> list[str]:
        """Lines that name the cells in which nothing is compared. Raises UsageError if these are all."""
        if self.selection == "original":
            raise UsageError("--against: --selection original compares nothing, as its accuracies are of rounds, not of trials")
        there = {cell: list(map(self.algorithm, sweeps)) for cell, sweeps in self.cells.items()}
        every = list(dict.fromkeys(name for names in there.values() for name in names))
        if against not in every:
            raise UsageError(f"--against {against}: it has no finished trials; there are those of {', '.join(every)}")
        return [
            f"Not compared: {cell}, where {against} has no finished trials." for cell in there if against not in there[cell]
        ]

    def table(self, table_format: str) -> str:
        """The best settings, in a format of tables.render."""
        return self.summary(table_format) if self.columns is None else self.pivoted(table_format, self.columns)

    def pivoted(self, table_format: str, columns: list[str]) -> str:
        return tables.render(*pivot.table(self, columns), table_format)

    def summary(self, table_format: str) -> str:
        return tables.render(tables.summary(self), {(row, self.heading) for row in tables.best_rows(self.best)}, table_format)

    @property
    def heading(self) -> str:
        return tables.heading(self.selection, self.judged_by)

    def notes(self) -> list[str]:
        first = pivot.notes(self) if self.columns is not None else tables.notes_on_clients(self)
        return [*tables.notes(self), *first, *tables.notes_on_trials(self)]

    def sections(self, table_format: str, top: int | None) -> list[tuple[str, str, list[str]]]:
        """(heading, table, notes) of what follows the first table; with `top` also the best `top` settings of each sweep. With
        `columns` the first table stands for all sweeps. In github what the jobs took is no table, but lines of its own."""
        sections = self.comparison_section(table_format) if self.columns is None else []
        if top is not None:
            for sweep in self.rankings:
                sections += self.of_sweep(sweep, table_format, top)
        if table_format != "github" and self.columns is None:
            sections.append(self.jobs_section(table_format))
        return sections

    def comparison_section(self, table_format: str) -> list[tuple[str, str, list[str]]]:
        """None if nothing is compared."""
        if not len(self.comparison):
            return []
        table = tables.render(tables.comparison(self), (), table_format)
        return [("Comparison", table, tables.comparison_notes(self.comparison))]

    def jobs_section(self, table_format: str) -> tuple[str, str, list[str]]:
        return "Job statistics", tables.render(self.job_statistics(), (), table_format), []

    def of_sweep(self, sweep: str, table_format: str, top: int) -> list[tuple[str, str, list[str]]]:
        """The sections on a sweep's settings; what hyper-parameters and draws are worth, by search space."""
        ranking, hparams, title = self.ranking_with_stopped(sweep), self.hparams[sweep], self.title(sweep)
        at = f", by trial 0 after {self.first_rungs[sweep]} rounds, which all have" if sweep in self.stopped else ""
        by_space = self.by_space(sweep)
        notes = [f"Space {number}: {space}." for number, (space, _) in enumerate(by_space, start=1)]
        sections = [(f"Settings of {title}", tables.render(tables.ranking(ranking[:top], hparams), (), table_format), notes)]
        for number, (space, rows) in enumerate(by_space, start=1):
            of_space = f" (space {number})" * (len(by_space) > 1)
            if len(rows) > 1:
                mattered = tables.importance(selection.importance(rows, hparams))
                note = f"Absolute rank correlation (Spearman) with the validation accuracy, over {len(rows)} settings{at}."
                sections.append((f"Importance in {title}{of_space}", tables.render(mattered, (), table_format), [note]))
            curve = selection.expected_best(rows) if space.kind == RANDOM else ()
            if len(curve):
                note = f"Of {len(curve)} random draws, without the defaults (Dodge et al., EMNLP 2019){at}."
                table = tables.render(tables.expected_best(curve), (), table_format)
                sections.append((f"Best of k draws of {title}{of_space}", table, [note]))
        return sections

    def log_base(self, sweep: str, hparam: str) -> int | None:
        """The base of the logarithmic axis on which to draw a hyper-parameter of a sweep, a column of its ranking; None if the
        axis is to be linear."""
        found = [space.domains.get(hparam.removeprefix(HPARAM)) for space in self.spaces[sweep]]
        bases = [base for domain in found if domain is not None and (base := log_base(domain)) is not None]
        return bases[0] if bases and self.comparable[sweep][hparam].min() > 0 else None

    def expected_best(self, sweep: str) -> pandas.Series:
        """See federated.reporting.selection.expected_best: what draws of a sweep's settings are worth, by what all have."""
        return selection.expected_best(self.comparable[sweep])

    def ranking_with_stopped(self, sweep: str) -> pandas.DataFrame:
        """The settings of a sweep: those of all rounds, and then those that halving stopped."""
        return pandas.concat([self.rankings[sweep], *([self.stopped[sweep]] if sweep in self.stopped else [])])

    def by_space(self, sweep: str) -> list[tuple[Space, pandas.DataFrame]]:
        """The search spaces of a sweep, each with the comparable settings that come from it; the defaults may come from
        several."""
        return [(space, selection.of_space(self.comparable[sweep], space)) for space in self.spaces[sweep]]

    def job_statistics(self) -> pandas.DataFrame:
        return tables.job_statistics(self)

    def top(self, n: int) -> pandas.DataFrame:
        """The best n settings of each sweep in numbers, the best one with what the sweep took and its comparison."""
        rows = pandas.concat([self.ranking_with_stopped(sweep)[:n] for sweep in self.rankings], ignore_index=True)
        extra = [name for name in self.best if name not in rows]
        rows = rows.merge(self.best[[SWEEP, "rank", *extra]], how="left", on=[SWEEP, "rank"])
        if len(self.comparison):
            tests = self.comparison.rename(columns={"n": "pairs"}).assign(rank=1)
            rows = rows.merge(tests, how="left", on=[SWEEP, "rank"])
        return with_settings(rows, self.settings)


def _varying(sweeps: list[Settings]) -> list[str]:
    """The settings that are not equal in all `sweeps`, but for those that each table has."""
    values = [each.values() for each in sweeps]
    return [name for name in values[0] if name not in NAMED and len({each[name] for each in values}) > 1]


def _written(settings: Settings, names: list[str]) -> list[str]:
    """The values of these settings that take effect."""
    return [f"{name}={getattr(settings, name)}" for name in names if getattr(settings, name) is not None]


def _counts(rounds: pandas.DataFrame, judged: pandas.DataFrame, diverged: set[str]) -> dict:
    """How many sets and trials of a sweep's `rounds` are in the `judged` ones, and which seeds."""
    done, counted = (rows.groupby("hash")["trial_seed"].unique() for rows in (rounds, judged))
    seeds = sorted(judged["trial_seed"].unique().tolist())
    of_judged = done[counted.index]
    is_diverged = diverged - set(counted.index)
    return {
        "num_hparams": len(counted) + len(is_diverged),  # which are part of the tuning
        "num_trials": len(seeds),
        "trial_seeds": " ".join(map(str, seeds)),
        "num_trials_done": len(set().union(*of_judged)),
        "trials_left_out": int(of_judged.map(len).sum() - counted.map(len).sum()),
        "sets_unfinished": len(set(done.index) - set(counted.index) - is_diverged),
        "sets_diverged": len(is_diverged),
    }


def ignored(collected: Collected) -> list[str]:
    """Lines on trials that the numbers leave out, and on reasons to doubt the numbers."""
    lines = [f"Ignored, cannot be read: {line}" for line in collected.broken]
    if collected.not_done:
        diverged = f", {len(collected.diverged)} of them diverged" if collected.diverged else ""
        shorter = f", {len(collected.shorter)} of them with results of fewer rounds" if collected.shorter else ""
        lines.append(f"Ignored: {len(collected.not_done)} trials that are not done{diverged}{shorter}.")
    for sweep, asked in collected.unextended.items():
        there = collected.settings[sweep].rounds
        lines.append(f"Not extended yet: {sweep} is to have {asked} rounds, and all of its trials here have {there}.")
    if collected.mixed:
        lines.append(
            f"Computed by more than one version of the code: {len(collected.mixed)} trials, such as {collected.mixed[0]}."
        )
    if len(collected.computed_on) > 1:
        of_each = "; ".join(f"{trials} trials on {place}" for place, trials in collected.computed_on.items())
        lines.append(f"Computed on unlike processors or devices, which may change the last bits: {of_each}.")
    return lines
