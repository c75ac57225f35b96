"""An analysis: a sub-command of ``lirpa-ext analyze`` with table, files and picture."""

from dataclasses import dataclass

from lirpa_ext.cli import Analysis, register_analysis
from lirpa_ext.reporting.plots import figure
from lirpa_ext.reporting.results import Result


@dataclass(frozen=True)
class Confidence(Result):
    """Mean probability of the label, by model."""

    values: dict

    def rows(self):
        return [{"model": name, "confidence": value} for name, value in self.values.items()]


def confidence(task):
    """The softmax of the logits at the labels."""
    x, y = task.data
    chosen = {name: model(x).softmax(1).gather(1, y.unsqueeze(1)) for name, model in task.models.items()}
    result = Confidence({name: float(values.mean()) for name, values in chosen.items()})
    drawn, axes = figure("mean probability of the label")
    axes[0, 0].bar(list(result.values), list(result.values.values()))
    return result, drawn


register_analysis("confidence", Analysis(confidence, "mean probability of the label"))
