"""VNN-LIB files: what they say, read exactly, and what is refused."""

from __future__ import annotations

import gzip
import itertools
import random
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lirpa_ext.errors import DataError
from lirpa_ext.verification.vnnlib import Specification, load_vnnlib

_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "onnx" / "vnnlib"
needs_files = pytest.mark.skipif(not _FOLDER.is_dir(), reason=f"the properties are not there ({_FOLDER})")


def declared(inputs: int, outputs: int) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{i}" for i in range(outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


BOX = "(assert (>= X_0 -1)) (assert (<= X_0 1))"
HEAD = declared(1, 2) + BOX


def polytopes(specification: Specification) -> list[list[tuple[list[float], float]]]:
    """Rows and limits of the only case."""
    (case,) = specification.cases
    return [
        [(row.tolist(), float(limit)) for row, limit in zip(unsafe.rows, unsafe.limits, strict=True)]
        for unsafe in case.unsafe
    ]


def holds(specification: Specification, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether (x, y) satisfies the assertions, by the normal form."""
    return any(
        (case.lower <= x).all() and (x <= case.upper).all() and any(unsafe.contains(y) for unsafe in case.unsafe)
        for case in specification.cases
    )


@pytest.mark.parametrize(
    ("assertion", "expected"),
    [
        ("(<= Y_0 Y_1)", [[([1, -1], 0)]]),
        ("(>= Y_0 Y_1)", [[([-1, 1], 0)]]),
        ("(>= Y_0 -2.5e-1)", [[([-1, 0], 0.25)]]),
        ("(<= .5 Y_1)", [[([0, -1], -0.5)]]),
        ("(<= (+ Y_0 Y_1 1) 3.)", [[([1, 1], 2)]]),
        ("(<= (- Y_0 Y_1 1) (- 3))", [[([1, -1], -2)]]),
        ("(<= (* 2 Y_0) (/ Y_1 4))", [[([2, -0.25], 0)]]),
        ("(<= (* (- 2) (+ Y_0 1) (/ 1 2)) 5)", [[([-1, 0], 6)]]),
        ("(<= (* 0.1 Y_0) 1)", [[([1, 0], 10)]]),
        ("(<= 0 Y_0 Y_1)", [[([-1, 0], 0), ([1, -1], 0)]]),
        ("(and (<= Y_0 1) (<= Y_1 2))", [[([1, 0], 1), ([0, 1], 2)]]),
        ("(or (<= Y_0 1) (and (<= Y_1 2)))", [[([1, 0], 1)], [([0, 1], 2)]]),
        ("(or (<= Y_0 1) (and (<= Y_0 Y_0) (<= Y_1 2)))", [[([1, 0], 1)], [([0, 1], 2)]]),
        ("(or (<= Y_0 1) (<= 2 1))", [[([1, 0], 1)]]),
    ],
)
def test_output_constraints(assertion, expected):
    found = polytopes(load_vnnlib(f"{HEAD} (assert {assertion})"))
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in expected]


def test_an_or_beside_a_plain_assertion():
    """The registry's vnnlib 0.0.1.post1 makes one row of the two."""
    found = polytopes(load_vnnlib(f"{HEAD} (assert (or (<= Y_0 1) (>= Y_0 2))) (assert (<= Y_1 3))"))
    assert [sorted(rows) for rows in found] == [[([0, 1], 3), ([1, 0], 1)], [([-1, 0], -2), ([0, 1], 3)]]


def test_unions_of_boxes():
    text = (
        declared(2, 1)
        + """
        (assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 0)) (and (>= X_0 2) (<= X_0 3) (>= Y_0 7))
                    (and (>= X_0 2) (<= X_0 3) (<= Y_0 5))))
        (assert (>= X_1 -1)) (assert (<= X_1 4)) (assert (<= X_0 2.5))"""
    )
    first, second = load_vnnlib(text).cases
    assert (first.lower.tolist(), first.upper.tolist()) == ([0, -1], [1, 4])
    assert (second.lower.tolist(), second.upper.tolist()) == ([2, -1], [2.5, 4])
    assert [len(case.unsafe) for case in (first, second)] == [1, 2]


def test_normal_form_is_equivalent():
    """Random formulas: the normal form holds exactly where the formula does, on a grid."""
    generator = random.Random(0)

    def formula(depth: int):
        """A random formula, and a function that evaluates it."""
        if depth == 0 or generator.random() < 0.2:
            name, value = generator.choice(["X_0", "Y_0", "Y_1"]), generator.randint(-2, 2)
            if generator.random() < 0.5:
                return f"(<= {name} {value})", lambda point: point[name] <= value
            return f"(>= {name} {value})", lambda point: point[name] >= value
        parts = [formula(depth - 1) for _ in range(generator.randint(1, 3))]
        word, combine = generator.choice([("and", all), ("or", any)])
        text = f"({word} {' '.join(part for part, _ in parts)})"
        return text, lambda point: combine(check(point) for _, check in parts)

    differing = 0
    for _ in range(60):
        parts = [formula(3) for _ in range(2)]
        text = f"{HEAD} (assert (<= Y_0 2)) {' '.join(f'(assert {part})' for part, _ in parts)}"
        try:
            specification = load_vnnlib(text)
        except DataError as error:
            assert "contradict" in str(error)
            continue
        outcomes = set()
        for x, *y in itertools.product((-1, -0.5, 0, 1), (-2.5, -1, 0, 2, 3), (-2.5, -2, 0, 1.5, 2)):
            point = {"X_0": x, "Y_0": y[0], "Y_1": y[1]}
            expected = y[0] <= 2 and all(check(point) for _, check in parts)
            assert holds(specification, np.array([x]), np.array(y)) == expected, text
            outcomes.add(expected)
        differing += len(outcomes) == 2
    assert differing > 20


def test_boxes_are_rounded_outward():
    """0.1 and 0.3 are no float64: the box holds them, the inner box is in it, and limits are exact."""
    text = declared(2, 1) + "(assert (<= 0.1 X_0 0.3)) (assert (<= 0.1 X_1 0.1)) (assert (<= Y_0 0.1))"
    (case,) = load_vnnlib(text).cases
    low, high = Fraction("0.1"), Fraction("0.3")
    assert Fraction(case.lower[0]) < low < Fraction(case.inner_lower[0]) == Fraction(np.nextafter(case.lower[0], 1))
    assert Fraction(case.upper[0]) > high > Fraction(case.inner_upper[0]) == Fraction(np.nextafter(case.upper[0], 0))
    assert case.lower[1] < case.upper[1]
    assert case.inner_lower[1] == case.inner_upper[1] == 0.1
    (unsafe,) = case.unsafe
    assert unsafe.limits == (low,)
    assert not unsafe.contains(np.array([0.1])) and unsafe.contains(np.array([np.nextafter(0.1, 0)]))
    assert not unsafe.contains(np.array([np.nan])) and not unsafe.contains(np.array([-np.inf]))


def test_an_empty_box_is_vacuous():
    specification = load_vnnlib(declared(1, 1) + "(assert (>= X_0 2)) (assert (<= X_0 1)) (assert (<= Y_0 0))")
    assert specification.cases == () and specification.vacuous == 1
    text = BOX + "(assert (or (and (>= X_0 2) (<= Y_0 0)) (and (>= X_0 0) (<= Y_0 1))))"
    specification = load_vnnlib(declared(1, 1) + text)
    assert len(specification.cases) == 1 and specification.vacuous == 1


def test_comments_layout_and_sources(tmp_path):
    text = "; a ) comment (\n(set-logic QF_LRA)\r\n" + declared(1, 1).replace(" ", "\n\t") + BOX
    text += "(assert(<= Y_0(- 3)));(assert (<= Y_0 2))\n(check-sat)"
    expected = polytopes(load_vnnlib(text))
    assert expected == [[([1], -3)]]
    (tmp_path / "p.vnnlib").write_text(text)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    sources = tmp_path / "p.vnnlib", str(tmp_path / "p.vnnlib.gz"), text.encode(), gzip.compress(text.encode())
    for source in sources:
        assert polytopes(load_vnnlib(source)) == expected


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no X is declared"),
        ("(declare-const X_0 Real)", "no Y is declared"),
        ("(declare-const X_1 Real) (declare-const Y_0 Real)", "X_0 is not declared"),
        ("(declare-const Z_0 Real)", "variables are called"),
        ("(declare-const X_01 Real)", "variables are called"),
        ("(declare-const X_0 Int)", "neither"),
        ("(declare-const X_0 Real) (declare-const X_0 Real)", "declared twice"),
        ("(vnnlib-version <2.0>)", "VNN-LIB 2.0"),
        (declared(1, 1) + "(assert (<= X_0 1)) (assert (<= Y_0 1))", "X_0 has no lower or no upper bound"),
        (declared(1, 1) + "(assert (<= Y_0 1))", "X_0 has no lower or no upper bound"),
        (HEAD, "asserts nothing of the outputs"),
        (HEAD + "(assert (<= Y_0 1)", "truncated"),
        (HEAD + "(assert (<= Y_0 1))))", "stray"),
        (HEAD + "assert", "stray"),
        (HEAD + "(assert (<= Y_2 1))", "line 4: 'Y_2' is neither"),
        (HEAD + "(assert (<= X_1 1))", "'X_1' is not declared"),
        (HEAD + "(assert (<= Y_0 nan))", "finite"),
        (HEAD + "(assert (<= Y_0 inf))", "finite"),
        (HEAD + "(assert (<= Y_0 1e400))", "float64"),
        (HEAD + "(assert (<= X_0 1e999999999))", "finite"),
        (HEAD + f"(assert (<= Y_0 {'9' * 500}))", "finite"),
        (HEAD + "(assert (<= Y_0 1/3))", "finite"),
        (HEAD + "(assert (<= (* Y_0 Y_1) 1))", "not linear"),
        (HEAD + "(assert (<= (/ 1 Y_1) 1))", "not linear"),
        (HEAD + "(assert (<= (/ Y_1 0) 1))", "not linear"),
        (HEAD + "(assert (<= (* (/ 1 3) Y_0) (* 0.1234567890123456789 Y_1)))", "too many digits"),
        (HEAD + "(assert (<= Y_0 X_0))", "one X and a constant"),
        (HEAD + "(assert (< Y_0 1))", "no constraint"),
        (HEAD + "(assert (not (<= Y_0 1)))", "no constraint"),
        (HEAD + "(assert (<= Y_0))", "no constraint"),
        (HEAD + "(assert ())", "no constraint"),
        (HEAD + "(assert Y_0)", "neither"),
        (HEAD + "()", "neither"),
        (HEAD + "(assert (<= (sin Y_0) 1))", "no linear term"),
        (HEAD + "(assert (<= () 1))", "no linear term"),
        (HEAD + "(assert (or))", "contradict"),
        (HEAD + "(assert (<= Y_0 1)) (assert (<= 1 0))", "contradict"),
        ("(" * 100_000, "nested parentheses"),
        (HEAD + "(assert " + "(and " * 70 + "(<= Y_0 1)" + ")" * 71, "nested parentheses"),
        (HEAD + "(assert (or (<= Y_0 0) (<= Y_1 0)))" * 40, "disjunctive normal form"),
        (HEAD + "(assert (<= Y_0 " + "(* 1e300 " * 50 + "1" + ")" * 52, "digits"),
    ],
    ids=lambda value: value[-30:],
)
def test_errors(text, cause):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_vnnlib(text.encode())
    assert cause in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - start < 5


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="vnnlib cannot be read"):
        load_vnnlib(tmp_path / "nothing.vnnlib")
    with pytest.raises(DataError, match="cannot be read"):
        load_vnnlib(tmp_path)
    with pytest.raises(DataError, match="no text"):
        load_vnnlib(b"\xff\xfe(assert")
    bomb = gzip.compress(b"(" + b" " * 2**26)
    with pytest.raises(DataError, match="max_bytes"):
        load_vnnlib(bomb)
    with pytest.raises(DataError, match="max_bytes=10"):
        load_vnnlib(HEAD, max_bytes=10)
    with pytest.raises(DataError):
        load_vnnlib(gzip.compress(HEAD.encode() * 99)[:-20])
    with pytest.raises(DataError, match="max_disjuncts=2"):
        load_vnnlib(HEAD + "(assert (or (<= Y_0 0) (<= Y_0 1) (<= Y_0 2)))", max_disjuncts=2)


@needs_files
def test_benchmark_properties():
    shapes = {
        "acas_p1": (5, 5, [1]), "acas_p3": (5, 5, [4]), "cartpole_safe": (4, 2, [1]), "gcas0": (14, 14, [2]),
        "lsnc_state": (6, 8, [2] * 13), "mnistfc_p0": (784, 10, [1] * 9), "resnet2b": (3072, 10, [1] * 9),
        "test_nano": (1, 1, [1]), "verivital_max": (784, 10, [1] * 9), "vit": (3072, 10, [1] * 9),
    }  # fmt: skip
    for name, shape in shapes.items():
        specification = load_vnnlib(_FOLDER / f"{name}.vnnlib")
        (case,) = specification.cases
        assert (specification.inputs, specification.outputs, [len(u.limits) for u in case.unsafe]) == shape
        assert (case.lower <= case.inner_lower).all() and (case.inner_upper <= case.upper).all()
        assert (case.inner_lower <= case.inner_upper).all()


@needs_files
def test_mutated_files():
    """Bit flips, deletions and truncations of real files: a property or a DataError, soon."""
    generator = random.Random(0)
    contents = [(_FOLDER / f"{name}.vnnlib").read_bytes() for name in ("acas_p3", "lsnc_state", "gcas0", "test_nano")]
    contents.append(gzip.compress(contents[1]))
    refused = 0
    for _ in range(600):
        content = bytearray(generator.choice(contents))
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(content))
            match generator.randrange(4):
                case 0:
                    content[place] ^= 1 << generator.randrange(8)
                case 1:
                    del content[place : place + generator.randint(1, 20)]
                case 2:
                    content[place:place] = generator.choice([b"(", b")", b"-", b"e9", b" (or ", b"Y_1 ", b"\0"])
                case 3:
                    del content[max(place, 1) :]
            content = content or bytearray(b"(")
        start = time.monotonic()
        try:
            for case in load_vnnlib(bytes(content)).cases:
                assert (case.lower <= case.upper).all() and np.isfinite(case.lower + case.upper).all()
        except DataError:
            refused += 1
        assert time.monotonic() - start < 5
    assert 200 < refused < 600
