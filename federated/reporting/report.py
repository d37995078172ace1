"""A report on collected trials: what tables, pictures and pages are made from."""

import pandas

from federated.options import UsageError
from federated.reporting import selection, tables
from federated.reporting.collect import SWEEP, Collected, hparams_of
from federated.settings import comparable


class Report:
    """A report on finished trials. `rule` names the selection; `target` is a test accuracy to be reached; all algorithms are
    compared with `against`, by default the first. Raises UsageError if there is nothing to compare with.

    rounds      see federated.reporting.collect.COLUMNS; accuracy is the column `judged_by`, for all rows
    settings    {(model, dataset, algorithm): Settings}
    data_dirs   see federated.reporting.collect.Collected, like extensions
    rankings    {sweep: its settings, the best first}
    chosen      {sweep: the rows that count, of its best setting}
    of_best     {sweep: all rounds of the judged trials of its best setting}
    of_clients  {sweep: the accuracies of that setting's clients}, see federated.reporting.selection.of_clients
    best        one row a sweep: its best setting, and what the sweep took. What is compared has the same `group`; `differs`
                says what makes a sweep unlike the one that others with the same model and data are compared with
    comparison  the paired tests, one row each
    personal    the algorithms whose clients end up with models of their own
    ignored     lines on what is left out or doubtful
    """

    def __init__(self, collected: Collected, rule: str, target: float | None = None, against: str | None = None) -> None:
        self.settings, self.data_dirs, self.selection, self.target = collected.settings, collected.data_dirs, rule, target
        self.extensions = collected.extensions
        self.personal = [name for name in collected.rounds["algorithm"].unique() if collected.kinds[name].personal]
        self.judged_by = selection.judged_by(bool(self.personal))
        self.rounds = collected.rounds.assign(accuracy=collected.rounds[self.judged_by])
        self.ignored = ignored(collected)
        self.rankings, self.chosen, self.of_best, self.of_clients, self.hparams, rows = {}, {}, {}, {}, {}, []
        for sweep, rounds in self.sweeps():
            diverged = collected.diverged_sets(sweep)
            judged = selection.judged(rounds, diverged)
            if judged.empty:
                self.ignored.append(f"Ignored: {' '.join(sweep)}, whose clients have no test samples.")
                continue
            self.hparams[sweep] = hparams_of(rounds)
            chosen = selection.chosen(judged, rule)
            self.rankings[sweep] = ranking = selection.ranked(chosen, rule, collected.kinds[sweep[2]].has_global_model)
            best = ranking["hash"][0]
            self.chosen[sweep] = chosen[chosen["hash"] == best]
            seeds = self.chosen[sweep]["trial_seed"].unique()
            self.of_best[sweep] = rounds[(rounds["hash"] == best) & rounds["trial_seed"].isin(seeds)]
            self.of_clients[sweep] = selection.of_clients(self.chosen[sweep], collected.of_clients)
            rows.append(
                ranking.iloc[0].to_dict()
                | _counts(rounds, judged, diverged)
                | {"num_clients": self.settings[sweep].num_clients, "judged_by": self.judged_by}
                | selection.cost(rounds, self.of_best[sweep], target)
            )
        if not rows:
            raise UsageError("no clients have test samples to judge by")
        self.best = pandas.DataFrame(rows)
        if against is not None:
            self.ignored += self._check_against(against)
        self._group(against)
        # the rows of `original` are rounds, which have no partner
        pairs = [] if rule == "original" else list(self.chosen.values())
        self.comparison = selection.compare(pairs, self.best["group"].tolist(), against)

    def _group(self, against: str | None) -> None:
        """Number the sweeps by what has to be equal for them to be compared: settings and budget."""
        groups: dict[tuple, int] = {}
        references: dict[tuple, tuple[str, dict]] = {}
        numbers, differs, sweeps = [], [], list(self.chosen)
        equals = [
            comparable(self.settings[sweep]) | {"hyper-parameter sets": number}
            for sweep, number in zip(sweeps, self.best["num_hparams"])
        ]
        for sweep, equal in sorted(zip(sweeps, equals), key=lambda pair: pair[0][2] != against):
            references.setdefault(sweep[:2], (sweep[2], equal))
        for sweep, equal in zip(sweeps, equals):
            numbers.append(groups.setdefault(tuple(equal.items()), len(groups)))
            differs.append("; ".join(selection.differences(equal, references[sweep[:2]][1])))
        self.best["group"], self.best["differs"] = numbers, differs
        self.best["reference"] = [references[sweep[:2]][0] for sweep in sweeps]

    def label(self, sweep: tuple[str, str, str]) -> str:
        """The algorithm, and what makes the sweep unlike others with the same model and data."""
        differs = self.best["differs"][list(self.chosen).index(sweep)]
        return f"{sweep[2]} ({differs})" if differs else sweep[2]

    def _check_against(self, against: str) -> list[str]:
        """Lines that name the data on which nothing is compared. Raises UsageError if that is all data."""
        if self.selection == "original":
            raise UsageError("--against: --selection original compares nothing, as its accuracies are of rounds, not of trials")
        there = list(dict.fromkeys(algorithm for _, _, algorithm in self.chosen))
        if against not in there:
            raise UsageError(f"--against {against}: it has no finished trials; there are those of {', '.join(there)}")
        data = dict.fromkeys((model, dataset) for model, dataset, _ in self.chosen)
        missing = [f"{model} {dataset}" for model, dataset in data if (model, dataset, against) not in self.chosen]
        return [f"Not compared: {name}, where {against} has no finished trials." for name in missing]

    def sweeps(self) -> "pandas.api.typing.DataFrameGroupBy":
        """((model, dataset, algorithm), its rows) of each sweep."""
        return self.rounds.groupby(SWEEP, sort=False)

    def table(self, form: str) -> str:
        """The best settings, in a format of tables.render."""
        summary = tables.summary(self.best, self.settings, self.heading, self.target)
        return tables.render(summary, form, tables.bold_cells(self.best, self.heading))

    @property
    def heading(self) -> str:
        return tables.heading(self.selection, self.judged_by)

    def notes(self) -> list[str]:
        return [*tables.notes(self.personal, self.selection), *tables.notes_on_trials(self.best, self.chosen)]

    def sections(self, form: str, top: int | None) -> list[tuple[str, str, list[str]]]:
        """(heading, table, notes) of what follows the first table; with `top` also the best `top` settings of each sweep. In
        github what the jobs took is no table, but lines of its own."""
        sections = []
        if len(self.comparison):
            table = tables.comparison(self.comparison, self.settings)
            sections.append(("Comparison", tables.render(table, form), tables.comparison_notes(self.comparison)))
        for sweep, ranking in self.rankings.items() if top else ():
            name = " ".join(sweep)
            sections.append(
                (f"Settings of {name}", tables.render(tables.ranking(ranking[:top], self.hparams[sweep]), form), [])
            )
            if len(ranking) > 1:
                mattered = tables.importance(selection.importance(ranking, self.hparams[sweep]))
                note = f"Absolute rank correlation (Spearman) with the validation accuracy, over {len(ranking)} settings."
                sections.append((f"Importance in {name}", tables.render(mattered, form), [note]))
            curve = selection.expected_best(ranking)
            if len(curve):
                note = f"Of {len(curve)} random draws, without the defaults (Dodge et al., EMNLP 2019)."
                sections.append((f"Best of k draws of {name}", tables.render(tables.expected_best(curve), form), [note]))
        if form != "github":
            sections.append(("Job statistics", tables.render(self.job_statistics(), form), []))
        return sections

    def job_statistics(self) -> pandas.DataFrame:
        return tables.job_statistics(self.best, self.settings)

    def top(self, n: int) -> pandas.DataFrame:
        """The best n settings of each sweep in numbers, the best one with what the sweep took and its comparison."""
        rows = pandas.concat([ranking[:n] for ranking in self.rankings.values()], ignore_index=True)
        extra = [name for name in self.best if name not in rows]
        rows = rows.merge(self.best[[*SWEEP, "rank", *extra]], how="left", on=[*SWEEP, "rank"])
        if not len(self.comparison):
            return rows
        tests = self.comparison.rename(columns={"n": "pairs"}).assign(rank=1)
        return rows.merge(tests, how="left", on=[*SWEEP, "rank"])


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
    """What the numbers leave out, and what makes them doubtful."""
    lines = [f"Ignored, cannot be read: {line}" for line in collected.broken]
    if collected.not_done:
        diverged = f", {len(collected.diverged)} of them diverged" if collected.diverged else ""
        lines.append(f"Ignored: {len(collected.not_done)} trials that are not done{diverged}.")
    if collected.mixed:
        lines.append(
            f"Computed by more than one version of the code: {len(collected.mixed)} trials, such as {collected.mixed[0]}."
        )
    if len(collected.computed_on) > 1:
        of_each = "; ".join(f"{trials} trials on {place}" for place, trials in collected.computed_on.items())
        lines.append(f"Computed on unlike processors or devices, which may change the last bits: {of_each}.")
    return lines
