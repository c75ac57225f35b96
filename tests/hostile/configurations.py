"""YAML configurations of `lirpa-ext fit`."""

from __future__ import annotations

from lirpa_ext.training.configuration import parse

RUN = "{{class_path: {0}, init_args: {{args: [mkdir, executed]}}}}"


def read(path):
    return parse(["--config", str(path)])


def warm():
    """What is imported once is not the file's."""
    parse(["--model.network.name", "Small", "--model.network.input_shape", "[1,12,12]", *FINE_ARGUMENTS])


def text(content):
    def make(folder):
        (folder / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / "run.yaml"

    return make


FINE_ARGUMENTS = ["--model.loss.name", "exact", "--model.eps", "0.1"]
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
FINE = "model: {network: {name: Small, input_shape: [1, 12, 12]}, loss: {name: exact}, eps: 0.1}\n"
SYNTAX, PATH = "no YAML|Problems parsing config", "does not correspond to a subclass|not validate|Expected"
CASES = {
    "tag-that-runs-code": (
        text("seed: !!python/object/apply:os.mkdir [executed]\n"),
        "could not determine a constructor",
    ),
    "tag-that-makes-objects": (text("!!python/object/new:os.mkdir [executed]\n"), "could not determine a constructor"),
    "tag-that-names-code": (text("seed: !!python/name:os.system\n"), "could not determine a constructor"),
    "tag-that-includes": (text("seed: !include /etc/passwd\n"), "could not determine a constructor"),
    "data-is-a-program": (text("data: " + RUN.format("subprocess.Popen")), PATH),
    "callback-is-a-program": (text("trainer: {callbacks: [" + RUN.format("subprocess.Popen") + "]}"), PATH),
    "data-of-no-module": (text("data: {class_path: nosuch.module.Thing}"), "nosuch|data"),
    "10000-brackets": (text("[" * 10**4 + "]" * 10**4), "no configuration"),
    "10000-maps": (text("seed: " + "{a: " * 10**4 + "1" + "}" * 10**4), "no configuration"),
    "anchors-of-anchors": (text(LAUGHS), "."),
    "anchors-of-anchors-in-a-field": (text(FINE + LAUGHS + "trainer: {callbacks: *a29}\n"), "."),
    "an-anchor-in-itself": (text(FINE + "data: &x\n  class_path: a.b\n  init_args: *x\n"), "."),
    "an-unknown-anchor": (text("seed: *nothing"), SYNTAX),
    "two-documents": (text("---\nseed: 1\n---\nseed: 2\n"), SYNTAX),
    "no-text": (text(b"\xff\xfe\0\1"), "."),
    "nul": (text(b"seed: \0"), "."),
    "a-tab": (text("\tseed: 1"), SYNTAX),
    "a-list": (text("- 1\n- 2\n"), "."),
    "a-seed-of-words": (text(FINE + "seed: abc"), "seed"),
    "a-seed-of-5000-digits": (text(FINE + "seed: " + "9" * 5000), "digits"),
    "a-seed-of-nan": (text(FINE + "seed: .nan"), "seed"),
    "an-unknown-key": (text(FINE + "nosuch: 1"), "nosuch"),
    "a-number-for-a-key": (text(FINE + "1: 2"), "."),
    "a-list-for-a-key": (text("? [1]\n: 2"), "."),
    "negative-steps": (text(FINE + "checkpoint_every: -1"), "checkpoint_every"),
    "nothing": (text(""), "required|Unexpected config"),
}
