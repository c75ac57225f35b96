"""What a certification found, one record a sample: summary, files, plot; and the file that a run resumes.

A record is a dict: `index`, `label`, `prediction`, `clean_margin`, `radius` (largest certified eps, None if
unknown), `message`, and `levels`, one dict an eps: `eps`, `status` (certified, attacked, unknown, error),
`attack_margin` (smallest margin found), `verified_margin` (lower bound on the margin), `message`. What is not
finite is None.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ResultsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUSES = ("certified", "attacked", "unknown", "error")
Record = dict[str, Any]
Meta = dict[str, Any]
PathLike = str | os.PathLike[str]

_FORMAT = "lirpa-ext certification 1"
_HEADER = f'{{"format": "{_FORMAT}"'.encode()
# What may differ between a run and its resumption without making the results those of something else.
_FREE = frozenset({"date", "device", "batch_size", "fallbacks"})
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
        records: One dict a sample, in order of the data (see the module's docstring).
    """

    meta: Meta
    records: list[Record]

    def summary(self) -> list[dict[str, Any]]:
        """One row for each eps: accuracies as fractions of all samples, and counts of the four statuses.

        `clean` counts correct predictions, `pgd` samples that are certified or unknown (None if nothing was
        attacked), `verified` the certified ones. An error counts as neither robust nor attacked.
        """
        total = max(len(self.records), 1)
        clean = sum((record["clean_margin"] or 0) > 0 for record in self.records) / total
        rows = []
        for position, eps in enumerate(self.meta["eps"]):
            found = [record["levels"][position]["status"] for record in self.records]
            counts = {status: found.count(status) for status in STATUSES}
            pgd = (counts["certified"] + counts["unknown"]) / total if self.meta["attack"] else None
            rows.append({"eps": eps, "clean": clean, "pgd": pgd, "verified": counts["certified"] / total} | counts)
        return rows

    def curve(self) -> list[tuple[float, float]]:
        """(eps, fraction of samples whose certified radius is at least eps), at every eps where it falls."""
        radii = sorted(record["radius"] for record in self.records if (record["radius"] or 0) > 0)
        total = max(len(self.records), 1)
        points = {radius: (len(radii) - position) / total for position, radius in reversed(list(enumerate(radii)))}
        return [(0.0, len(radii) / total), *sorted(points.items())]

    def table(self) -> str:
        """The summary as text, accuracies in percent."""
        lines = [f"{'eps':>10} {'clean %':>8} {'PGD %':>8} {'verified %':>10} {'unknown':>8} {'errors':>7}"]
        for row in self.summary():
            pgd = "-" if row["pgd"] is None else f"{100 * row['pgd']:.2f}"
            lines.append(
                f"{row['eps']:>10.6g} {100 * row['clean']:>8.2f} {pgd:>8} {100 * row['verified']:>10.2f} "
                f"{row['unknown']:>8d} {row['error']:>7d}"
            )
        return "\n".join(lines)

    # --- files ---

    def to_json(self, path: PathLike) -> None:
        """Write meta, summary and records."""
        content = {"meta": self.meta, "summary": self.summary(), "records": self.records}
        _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: PathLike) -> None:
        """Write one row for each sample and eps, below comment lines ``# key: value`` with the meta data."""
        columns = ["eps", "status", "attack_margin", "verified_margin", "message"]
        shared = ["index", "label", "prediction", "clean_margin", "radius"]
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                file.writelines(f"# {key}: {json.dumps(value)}\n" for key, value in self.meta.items())
                writer = csv.writer(file)
                writer.writerow(shared + columns)
                for record in self.records:
                    for level in record["levels"]:
                        writer.writerow([record[name] for name in shared] + [level[name] for name in columns])
        except OSError as error:
            raise _unwritable(path, error) from error

    def figure(self) -> Figure:
        """Accuracies over eps: clean, PGD, verified, and the curve of the certified radii; with an alt text."""
        from .analysis.plots import figure  # the analyses import what certifies

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
        """Write `figure` to a file, with the meta data in it."""
        kind = Path(path).suffix.lower()
        field = {".png": "Description", ".svg": "Description", ".pdf": "Subject"}.get(kind)
        try:
            self.figure().savefig(path, dpi=150, metadata={field: json.dumps(self.meta)} if field else None)
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from error

    @classmethod
    def load(cls, path: PathLike) -> Report:
        """Read a report back from `to_json`, or from a results file, finished or not.

        Raises:
            ResultsError: The file is neither, or corrupt.
        """
        text = _read(path)
        if text.startswith(b"{\n"):  # a results file has its first object on one line
            try:
                content = json.loads(text)
                return cls(content["meta"], content["records"])
            except (ValueError, KeyError, TypeError) as error:
                raise ResultsError(f"{path} is no report of lirpa-ext, or a corrupt one: {error!r}") from error
        meta, records, _ = read_results(path)
        return cls(meta, [records[index] for index in sorted(records)])


class ResultsFile:
    """Results on disk as they come, JSON Lines: the meta data, then one record a line.

    Args:
        path: The file; None keeps the records in memory only.
        meta: Meta data of the run.
        resume: Go on with an existing file. False puts it aside as ``NAME.1`` (or .2, ...), losing nothing.

    Attributes:
        meta: Meta data, of the existing file where there is one.
        records: index -> record.

    Raises:
        ResultsError: The file is corrupt, cannot be written, or is of another model, data set or setting.
    """

    def __init__(self, path: PathLike | None, meta: Meta, resume: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.meta: Meta = json.loads(json.dumps({"format": _FORMAT} | meta, allow_nan=False))
        self.records: dict[int, Record] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                return
            if resume:
                self._resume(self.path)
            else:
                aside = (self.path.with_name(f"{self.path.name}.{number}") for number in itertools.count(1))
                self.path.rename(next(path for path in aside if not path.exists()))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def append(self, records: list[Record]) -> None:
        """Keep records, on disk before this returns."""
        lines = records if self.records else [self.meta, *records]
        self.records |= {record["index"]: record for record in records}
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def report(self) -> Report:
        """The records so far, in order."""
        return Report(self.meta, [self.records[index] for index in sorted(self.records)])

    def _resume(self, path: Path) -> None:
        meta, records, size = read_results(path)
        names = sorted((meta.keys() | self.meta.keys()) - _FREE) if meta else []
        different = [name for name in names if meta.get(name) != self.meta.get(name)]
        if different:
            details = "; ".join(
                f"{name} is {meta.get(name)!r} there, {self.meta.get(name)!r} here" for name in different
            )
            raise ResultsError(
                f"{path} holds results of another run: {details}. Give another path, or resume=False "
                "(--no-resume) to put that file aside and start anew."
            )
        if records:
            self.meta, self.records = meta, records
        os.truncate(path, size if records else 0)


def read_results(path: PathLike) -> tuple[Meta, dict[int, Record], int]:
    """Read a results file, dropping a last line that was cut off while it was being written.

    Returns:
        Meta data (empty if cut off too), records by index, and the size in bytes of what is whole.

    Raises:
        ResultsError: A line is corrupt, or the file is something else.
    """
    text = _read(path)
    whole = text[: text.rfind(b"\n") + 1]
    first, *lines = whole.splitlines() or [text]
    meta: Meta = {}
    records: dict[int, Record] = {}
    if whole or not _HEADER.startswith(text[: len(_HEADER)]):
        meta = _parse_header(path, first)
    for number, line in enumerate(lines, 2):
        try:
            record = _parse_record(line, meta)
            if record["index"] in records:
                raise ValueError(f"sample {record['index']} is there twice")
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"line {number} of {path} is corrupt ({error!r}). Remove it to have its sample computed "
                "again, or give another path."
            ) from error
        records[record["index"]] = record
    return meta, records, len(whole)


def _parse_header(path: PathLike, line: bytes) -> Meta:
    try:
        if not line.startswith(_HEADER):
            raise ValueError("the first line is not that of one")
        return dict(json.loads(line))
    except ValueError as error:
        raise ResultsError(f"{path} is no results file of lirpa-ext: {error}; give another path") from error


def _parse_record(line: bytes, meta: Meta) -> Record:
    record = json.loads(line)
    if not 0 <= record["index"] < meta["samples"]:
        raise ValueError(f"sample {record['index']} is none of {meta['samples']}")
    if [level["eps"] for level in record["levels"]] != meta["eps"]:
        raise ValueError("its eps are not those of the first line")
    if any(level["status"] not in STATUSES for level in record["levels"]):
        raise ValueError("unknown status")
    return dict(record)


def _read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error


def _write(path: PathLike, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: PathLike, error: Exception) -> ResultsError:
    return ResultsError(f"{path} cannot be written: {error}. Give another path; results files can be resumed.")
