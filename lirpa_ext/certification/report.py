"""`Report`, the results of `certify`: accuracies at each eps, the curve of certified radii, files and plot."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ResultsError
from ..reporting.files import unwritable, write_whole
from .results_file import STATUSES, Meta, PathLike, Record, check_meta, check_record, loads, read_bytes, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {
    "clean": "#000000",
    "pgd": "#D55E00",
    "verified": "#0072B2",
}  # Okabe and Ito, safe for colour blindness


@dataclass
class Report:
    """Results of `certify`.

    Attributes:
        meta: Method, options, dtype, eps, norm, data range, versions, hashes of model and data, attack, date.
        records: One dict for each sample, in the order of the data (`lirpa_ext.certification.results_file`).
    """

    meta: Meta
    records: list[Record]

    def summary(self) -> list[dict[str, Any]]:
        """Accuracies and counts of the samples at each eps.

        Returns:
            One dict for each eps. Fractions of all samples: ``clean`` (predicted correctly), ``pgd`` (certified or
            unknown; None without an attack) and ``verified`` (certified). Counts: ``certified``, ``attacked``,
            ``unknown`` and ``error``, and ``masked``, the unknown samples of which the attack never had a gradient, so
            that its failure is no evidence of robustness. A sample in error is neither robust nor attacked.
        """
        total = max(len(self.records), 1)
        clean = sum((record["clean_margin"] or 0) > 0 for record in self.records) / total
        rows = []
        for position, eps in enumerate(self.meta["eps"]):
            levels = [record["levels"][position] for record in self.records]
            found = [level["status"] for level in levels]
            counts = {status: found.count(status) for status in STATUSES}
            masked = sum(level["status"] == "unknown" and level.get("masked", False) for level in levels)
            pgd = (counts["certified"] + counts["unknown"]) / total if self.meta["attack"] else None
            rows.append(
                {"eps": eps, "clean": clean, "pgd": pgd, "verified": counts["certified"] / total, "masked": masked}
                | counts
            )
        return rows

    def curve(self) -> list[tuple[float, float]]:
        """Certified accuracy over eps, a step function.

        Returns:
            Pairs (eps, fraction of all samples whose certified radius is at least eps), at 0 and at every eps at which
            the fraction falls, ascending in eps.
        """
        radii = sorted(record["radius"] for record in self.records if (record["radius"] or 0) > 0)
        total = max(len(self.records), 1)
        points = {radius: (len(radii) - position) / total for position, radius in reversed(list(enumerate(radii)))}
        return [(0.0, len(radii) / total), *sorted(points.items())]

    def table(self) -> str:
        """The summary as a text table, accuracies in percent."""
        lines = [f"{'eps':>10} {'clean %':>8} {'PGD %':>8} {'verified %':>10} {'unknown':>8} {'errors':>7}"]
        for row in self.summary():
            pgd = "-" if row["pgd"] is None else f"{100 * row['pgd']:.2f}"
            lines.append(
                f"{row['eps']:>10.6g} {100 * row['clean']:>8.2f} {pgd:>8} {100 * row['verified']:>10.2f} "
                f"{row['unknown']:>8d} {row['error']:>7d}"
            )
        for row in self.summary():
            if row["masked"]:
                lines.append(
                    f"{row['masked']} unknown samples at eps {row['eps']:.6g} gave the attack no gradient: their PGD "
                    "accuracy is no evidence"
                )
        return "\n".join(lines)

    # --- files ---

    def to_json(self, path: PathLike) -> None:
        """Write a JSON file with meta data, summary and records.

        Raises:
            ResultsError: The file cannot be written.
        """
        content = {"meta": self.meta, "summary": self.summary(), "records": self.records}
        write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: PathLike) -> None:
        """Write a CSV file with one row for each sample and eps, below comment lines ``# key: value`` (meta data).

        Raises:
            ResultsError: The file cannot be written.
        """
        columns = ["eps", "status", "attack_margin", "masked", "verified_margin", "message"]
        shared = ["index", "label", "prediction", "clean_margin", "radius"]
        file = io.StringIO(newline="")
        file.writelines(f"# {key}: {json.dumps(value)}\n" for key, value in self.meta.items())
        writer = csv.writer(file)
        writer.writerow(shared + columns)
        for record in self.records:
            for level in record["levels"]:
                writer.writerow([record[name] for name in shared] + [level.get(name, False) for name in columns])
        write_whole(path, file.getvalue())

    def figure(self) -> Figure:
        """Plot clean, PGD and verified accuracy and the curve of certified radii over eps; the figure has an alt text.

        Returns:
            The figure, of matplotlib.
        """
        from ..reporting.plots import figure  # slow to import

        rows, meta = self.summary(), self.meta
        drawn, ((axes,),) = figure(self._told(rows))
        axes.axhline(100 * rows[0]["clean"], color=_COLORS["clean"], linestyle=":", label="clean")
        for key, label, marker in (("pgd", "PGD", "s"), ("verified", f"verified ({meta['method']})", "o")):
            if rows[0][key] is not None:
                style = "--" if key == "pgd" else "none" if meta["radius"] else "-"
                values = [100 * row[key] for row in rows]
                axes.plot(meta["eps"], values, marker=marker, linestyle=style, color=_COLORS[key], label=label)
        if meta["radius"]:
            eps, fraction = zip(*self.curve(), strict=True)
            percent = [100 * value for value in fraction]
            axes.step(
                [*eps, eps[-1]],
                [*percent, 0.0],
                where="pre",
                color=_COLORS["verified"],
                label="certified radius at least eps",
            )
        axes.set(
            xlabel=f"eps (radius of the l{float(meta['norm']):g} ball, in units of the input)",
            ylabel="accuracy (% of samples)",
            ylim=(0, 102),
            title=f"{meta['model']} {meta['model_hash'][:12]}, {len(self.records)} samples, {meta['dtype']}",
        )
        axes.set_xlim(left=0)
        axes.legend()
        return drawn

    def _told(self, rows: list[dict[str, Any]]) -> str:
        levels = "; ".join(
            f"eps {row['eps']:.6g}: {100 * row['verified']:.1f}% verified"
            + ("" if row["pgd"] is None else f", {100 * row['pgd']:.1f}% under PGD")
            for row in rows
        )
        return f"Accuracies over eps of {len(self.records)} samples, {100 * rows[0]['clean']:.1f}% clean. {levels}."

    def plot(self, path: PathLike) -> None:
        """Write `figure` to a file, with the meta data in its Description (PNG, SVG) or Subject (PDF).

        Raises:
            ResultsError: The file cannot be written.
        """
        kind = Path(path).suffix.lower()
        field = {".png": "Description", ".svg": "Description", ".pdf": "Subject"}.get(kind)
        try:
            self.figure().savefig(path, dpi=150, metadata={field: json.dumps(self.meta)} if field else None)
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error

    @classmethod
    def load(cls, path: PathLike) -> Report:
        """Read a report from a file of `to_json`, or from a results file of `certify`, finished or not.

        Raises:
            ResultsError: The file is neither of these, or it is corrupt.
        """
        text = read_bytes(path)
        if text.startswith(b"{\n"):  # of `to_json`; a results file has its first object on one line
            try:
                content = loads(text)
                meta, lines = check_meta(content["meta"]), content["records"]
                return cls(meta, [check_record(line, meta) for line in lines])
            except (ValueError, KeyError, TypeError) as error:
                raise ResultsError(f"{path} is no report of lirpa-ext, or a corrupt one: {error!r}") from error
        meta, records, _ = read_results(path)
        if not meta:
            raise ResultsError(f"{path} holds no results: it was cut off before the first")
        return cls(meta, [records[index] for index in sorted(records)])
