"""A report on collected trials: what tables, pictures and pages are made from."""

import pandas

from federated.options import UsageError
from federated.reporting import selection, tables
from federated.reporting.collect import SWEEP, Collected, hparams_of


class Report:
    """A report on finished trials. `rule` names the selection; `target` is a test accuracy to be reached; all algorithms are
    compared with `against`, by default the first. Raises UsageError if there is nothing to compare with.

    rounds      see federated.reporting.collect.COLUMNS
    settings    {(model, dataset, algorithm): Settings}
    data_dirs   see federated.reporting.collect.Collected
    rankings    {sweep: its settings, the best first}
    chosen      {sweep: the rows that count, of its best setting}
    of_clients  {sweep: the accuracies of that setting's clients}, see federated.reporting.selection.of_clients
    best        one row a sweep: its best setting, and what the sweep took
    comparison  the paired tests, one row each
    personal    the algorithms whose clients end up with models of their own
    ignored     lines on what is left out or doubtful
    """

    def __init__(self, collected: Collected, rule: str, target: float | None = None, against: str | None = None) -> None:
        self.rounds, self.settings, self.data_dirs = collected.rounds, collected.settings, collected.data_dirs
        self.selection, self.target = rule, target
        self.rankings, self.chosen, self.of_clients, self.hparams, left_out, rows = {}, {}, {}, {}, 0, []
        for sweep, rounds in self.sweeps():
            self.hparams[sweep] = hparams_of(rounds)
            chosen, few = selection.chosen(rounds, rule)
            left_out += len(few)
            self.rankings[sweep] = ranking = selection.ranked(chosen, rule, collected.kinds[sweep[2]].has_global_model)
            best = ranking["hash"][0]
            self.chosen[sweep] = chosen[chosen["hash"] == best]
            self.of_clients[sweep] = selection.of_clients(self.chosen[sweep], collected.of_clients)
            counts = {
                "num_hparams": len(ranking),
                "num_trials": self.chosen[sweep]["trial_seed"].nunique(),
                "num_clients": self.settings[sweep].num_clients,
            }
            rows.append(ranking.iloc[0].to_dict() | counts | selection.cost(rounds, best, target))
        self.best = pandas.DataFrame(rows)
        pairs = [] if rule == "original" else list(self.chosen.values())  # its rows are rounds, which have no partner
        self.comparison = selection.compare(pairs, against)
        self.personal = [name for name in self.best["algorithm"].unique() if collected.kinds[name].personal]
        self.ignored = ignored(collected)
        if against is not None:
            self.ignored += self._check_against(against)
        if left_out:
            self.ignored.append(f"Ignored: {left_out} settings with fewer finished trials than others.")

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
        summary = tables.summary(self.best, self.settings, self.selection, self.target)
        return tables.render(summary, form, tables.bold_cells(self.best, self.selection))

    def notes(self) -> list[str]:
        return tables.notes(self.personal, self.selection)

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
    return lines
