"""Results files and reports."""

from __future__ import annotations

import json

from lirpa_ext.certification.report import Report

META = {
    "format": "lirpa-ext certification 1", "method": "bcp", "options": {}, "norm": 2, "eps": [0.1], "dtype": "float32",
    "model": "m", "model_hash": "h", "samples": 3, "attack": None, "radius": False,
}  # fmt: skip
LEVEL = {
    "eps": 0.1, "status": "certified", "attack_margin": None, "masked": False, "verified_margin": 1.0, "message": "",
}  # fmt: skip
RECORD = {
    "index": 0, "label": 1, "prediction": 1, "clean_margin": 1.0, "radius": None, "message": "", "levels": [LEVEL],
}  # fmt: skip


def read(path):
    report = Report.load(path)
    report.summary()
    return report


def file(*lines):
    def make(folder):
        text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "results.jsonl").write_bytes(b"\n".join(text) + b"\n")
        return folder / "results.jsonl"

    return make


def raw(value, name, text):
    """An object in which a field is given by its text, which json would not write."""
    return json.dumps(value | {name: "@"}).replace('"@"', text).encode()


def level(**changes):
    return file(META, RECORD | {"levels": [LEVEL | changes]})


def cut(folder):
    path = file(META, RECORD)(folder)
    path.write_bytes(path.read_bytes()[:40])
    return path


LINE, FILE = "line 2 of .* is corrupt", "no results file of lirpa-ext"
CASES = {
    "fine": (file(META, RECORD), None),
    "deep-objects": (file(raw(META, "options", '{"a":' * 10**5 + "1" + "}" * 10**5), RECORD), FILE),
    "deep-lists": (file(META, b"[" * 10**5), LINE),
    "beyond-float64": (file(META, raw(RECORD, "clean_margin", "1e400")), LINE),
    "5000-digits": (file(META, raw(RECORD, "label", "9" * 5000)), LINE),
    "400-digits": (file(META, raw(RECORD, "index", "9" * 400)), LINE),
    "nan": (file(META, raw(RECORD, "clean_margin", "NaN")), LINE),
    "infinity": (file(META, raw(RECORD, "radius", "Infinity")), LINE),
    "a-word-for-a-number": (file(META, RECORD | {"label": "x" * 10**6}), LINE),
    "a-flag-for-a-number": (file(META, RECORD | {"index": True}), LINE),
    "a-fraction-for-an-index": (file(META, RECORD | {"index": 0.5}), LINE),
    "negative-index": (file(META, RECORD | {"index": -1}), LINE),
    "a-list-for-a-record": (file(META, []), LINE),
    "no-fields": (file(META, {}), LINE),
    "twice": (file(META, RECORD, RECORD), "is there twice"),
    "levels-of-numbers": (file(META, RECORD | {"levels": [1]}), LINE),
    "a-status-of-lists": (level(status=[1]), LINE),
    "a-status-of-a-million": (level(status="x" * 10**6), LINE),
    "other-eps": (level(eps=0.2), LINE),
    "eps-of-words": (file(META | {"eps": ["a"]}), FILE),
    "eps-nested": (file(META | {"eps": [[]]}), FILE),
    "norm-is-a-word": (file(META | {"norm": "abc"}), FILE),
    "norm-is-nan": (file(META | {"norm": "nan"}), FILE),
    "norm-below-1": (file(META | {"norm": -1}), FILE),
    "no-utf-8": (file(META, b"\xff\xfe"), LINE),
    "utf-16": (file(json.dumps(META).encode("utf-16")), FILE),
    "zeros": (file(bytes(1000)), FILE),
    "another-file": (file(b"hello"), FILE),
    "cut": (cut, "holds no results"),
    "a-report-of-nothing": (file(b"{\n}"), "no report of lirpa-ext"),
    "a-report-of-words": (file(b'{\n"meta": "a", "records": 3}'), "no report of lirpa-ext"),
    "a-deep-report": (file(b"{\n" + b'"a": {' * 10**5), "no report of lirpa-ext"),
}
