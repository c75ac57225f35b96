"""VNN-LIB."""

from __future__ import annotations

import gzip
import os

from lirpa_ext import load_vnnlib as read  # noqa: F401

INPUT = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)(assert (>= X_0 0))"
BOX = INPUT + "(assert (<= X_0 1))"
UNSAFE = "(assert (<= Y_0 1))"


def text(content):
    def make(folder):
        path = folder / "property.vnnlib"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def declared(count, name):
    return "".join(f"(declare-const {name}_{index} Real)" for index in range(count))


def disjuncts(count, form="(<= Y_0 {0})"):
    return BOX + "(assert (or " + " ".join(form.format(index) for index in range(count)) + "))"


def bomb(folder):
    (folder / "property.vnnlib.gz").write_bytes(gzip.compress(b" " * 2**28, 1))
    return folder / "property.vnnlib.gz"


def pipe(folder):
    os.mkfifo(folder / "property.vnnlib")
    return folder / "property.vnnlib"


NO_NUMBER, TOO_MANY = "neither a declared variable nor a finite decimal number", "disjunctive normal form has more than"
CASES = {
    "fine": (text(BOX + UNSAFE + "(exit)  ; the end"), None),
    "fine-disjuncts": (text(disjuncts(2000)), None),
    "100000-disjuncts": (text(disjuncts(100_000)), TOO_MANY),
    "2^40-disjuncts": (text(BOX + "(assert (or (<= Y_0 1) (<= Y_1 2)))" * 40), TOO_MANY),
    "words-after-exit": (text(BOX + UNSAFE + "(exit) what is this"), "stray 'what'"),
    "an-assertion-after-exit": (text(BOX + UNSAFE + "(exit)(assert (<= Y_0 5))"), r"comes after \(exit\)"),
    "parentheses-after-exit": (text(BOX + UNSAFE + "(exit)" + "(" * 10**5), "nested parentheses"),
    "100000-parentheses": (text(BOX + "(assert " + "(" * 10**5 + ")" * 10**5 + ")"), "nested parentheses"),
    "open-parentheses": (text("(" * 10**5), "nested parentheses"),
    "closing-parentheses": (text(")" * 10**5), "stray"),
    "never-closed": (text(BOX + "(assert (<= Y_0 1)"), "never closed"),
    "huge-exponent": (text(BOX + "(assert (<= Y_0 1e999999))"), NO_NUMBER),
    "beyond-float64": (text(BOX + "(assert (<= Y_0 1e999))"), "beyond the range of float64"),
    "a-million-digits": (text(BOX + "(assert (<= Y_0 " + "9" * 10**6 + "))"), NO_NUMBER),
    "nan": (text(BOX + "(assert (<= Y_0 nan))"), NO_NUMBER),
    "nan-for-an-input": (text(INPUT + "(assert (<= X_0 NaN))" + UNSAFE), NO_NUMBER),
    "infinity": (text(INPUT + "(assert (<= X_0 inf))" + UNSAFE), NO_NUMBER),
    "division-by-0": (text(BOX + "(assert (<= (/ Y_0 0) 1))"), "not linear"),
    "a-product-of-10^5": (text(BOX + "(assert (<= (* " + "3 " * 10**5 + "Y_0) 1))"), "too many digits"),
    "denominators": (text(BOX + "(assert (<= (+ " + " ".join(f"(/ Y_0 {2 * i + 3})" for i in range(10**5)) + ") 1))"),
                     "too many digits"),
    "boxes-of-many-inputs": (text(declared(20_000, "X") + BOX.replace("(declare-const X_0 Real)", "")
                                  + "".join(f"(assert (>= X_{i} 0))(assert (<= X_{i} 1))" for i in range(1, 20_000))
                                  + disjuncts(2000, "(and (<= X_0 0.{0}) (<= Y_0 {0}))")[len(BOX):]), "numbers: split"),
    "rows-of-many-outputs": (text(declared(8000, "Y") + "(declare-const X_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))"
                                  + "".join(f"(assert (<= Y_{i} 1))" for i in range(8000))), "numbers: split"),
    "a-variable-far-off": (text("(declare-const X_99999999 Real)(declare-const Y_0 Real)" + UNSAFE), "is not declared"),
    "declared-twice": (text(BOX + "(declare-const X_0 Real)" + UNSAFE), "declared twice"),
    "an-empty-form": (text(BOX + "(assert ())"), "no constraint"),
    "a-relation-of-one": (text(BOX + "(assert (<= Y_0))"), "no constraint"),
    "a-list-for-a-name": (text(BOX + "(assert ((<=) Y_0 1))"), "no constraint"),
    "true-always": (text(BOX + "(assert (and))"), "asserts nothing of the outputs"),
    "false-always": (text(BOX + "(assert (or))" + UNSAFE), "contradict each other"),
    "unbounded": (text(INPUT + UNSAFE), "no lower or no upper bound"),
    "nothing": (text(""), "empty or truncated"),
    "ten-million-pairs": (text("()" * 10**7), "neither"),
    "utf-16": (text((BOX + UNSAFE).encode("utf-16")), "no text"),
    "nul": (text(b"(\0)"), "neither"),
    "bomb": (bomb, "expands to more than"),
    "a-pipe": (pipe, "it is no file"),
}  # fmt: skip
SLOW = {
    "long-disjuncts": (text(disjuncts(6000, "(and " + "(<= Y_0 {0}.5)" * 60 + ")")), "processor time|more than"),
    "a-million-declarations": (text(declared(10**6, "X")), "processor time|no Y is declared"),
    "a-million-assertions": (text(BOX + UNSAFE * 10**6), "processor time"),
    "a-chain-of-sums": (text(BOX + "(assert (<= " + ("(+" + " Y_0 Y_1" * 1500 + ") ") * 1000 + "))"), "processor time"),
}
