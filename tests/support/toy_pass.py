"""A pass as a stranger would write it, with one import from ggpass: every chosen weight halved."""

from dataclasses import dataclass

import ggpass


@dataclass(frozen=True)
class Halve:
    """w → w/2 for each weight that `only` and `skip` choose.

    1. Weights are float matrices among the Parameters that the graph uses; a tied one is halved once.
    2. Every other float tensor stays, and is reported with its reason.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __call__(self, program: ggpass.Program) -> ggpass.Report:
        report = ggpass.Report("Halve")
        for weight in program.weights(only=self.only, skip=self.skip, report=report):
            program.replace(weight, weight.tensor / 2)
            report.changes.append(ggpass.Change(weight.title, "halved"))
        return report
