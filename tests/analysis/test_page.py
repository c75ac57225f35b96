"""The HTML report: what is gathered, that it needs nothing else, and how it looks in a browser."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lirpa_ext import certify
from lirpa_ext.analysis.gather import gather
from lirpa_ext.analysis.page import Page, Picture, Section, drawn_picture, file_picture, markdown, table
from lirpa_ext.attacks import APGD
from lirpa_ext.cli import main
from lirpa_ext.data import load_digits
from lirpa_ext.errors import DataError, InvalidInputError, ResultsError
from lirpa_ext.models.loading import save_model
from lirpa_ext.reporting.plots import alt_text, describe, figure, read_alt, save, style, svg
from lirpa_ext.reporting.results import Result, read_result, text_table
from lirpa_ext.training import Network, build
from lirpa_ext.training.learning_curve import plot_metrics, read_metrics
from lirpa_ext.training.run_folder import export_onnx

HOSTILE = '<script>alert("1")</script> & "quotes"'
VOID = {"meta", "link", "img", "br", "hr"}


@dataclass(frozen=True)
class Numbers(Result):
    values: tuple[float, ...]
    word: str = "plain"

    def rows(self):
        return [{"x": value, "word": self.word, "seed": 7} for value in self.values]

    def summary(self):
        return f"{len(self.values)} numbers, {self.word}."


class Reader(HTMLParser):
    """Tags with their attributes, texts by tag, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's folder as the commands leave it, without Lightning: card, metrics, certification, analysis, picture."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("runs") / "digits"
    made.mkdir()
    network = Network("2C2F", [1, 8, 8])
    model = build(network).eval()
    save_model(model, made / "model.pt", "lirpa_ext.models.architectures:named_network", **vars(network))
    config = {"model": {"network": vars(network), "loss": {"name": "bcp"}, "norm": 2, "eps": 0.5}, "note": HOSTILE}
    (made / "config.yaml").write_text(json.dumps(config, indent=1))
    (made / "environment.json").write_text(json.dumps({"torch": torch.__version__, "seed": 0}))
    (made / "metrics.csv").write_text(
        "epoch,step,loss,eps,val_clean,val_pgd,val_verified,ramp_done\n"
        "0,10,2.5,0.0,0.5,0.4,0.1,False\n1,20,1.5,0.25,0.7,,0.3,False\n2,30,1.25,0.5,0.8,0.6,0.4375,True\n"
    )
    (made / "README.md").write_text(
        f"# 2C2F trained\n\n* Data: {HOSTILE}\n\n| eps | verified |\n|---|---|\n| 0.5 | 43.75 |\n\n"
        "![x](https://example.org/x.png) [link](javascript:alert(1)) <b>raw</b>\n"
    )
    x, y = load_digits("test")
    report = certify(
        model,
        (x[:8], y[:8]),
        [0.01, 0.02],
        method="bcp",
        x_L=0.0,
        x_U=1.0,
        attack=APGD(2, 2),
        radius=False,
        progress=False,
    )
    report.to_json(made / "test.json")
    Numbers((1.0, math.nan, 3.0), HOSTILE).save(made / "analyses" / "my_numbers")
    drawn, axes = figure(f"Three numbers. {HOSTILE}")
    axes[0, 0].plot([1, 2, 3], **style(0))
    save(drawn, made / "analyses" / "my_numbers.png")
    drawn, _ = figure("Three plots side by side.", columns=3)
    save(drawn, made / "other.png")
    (made / "inner").mkdir()  # another run, whose results are not this one's
    (made / "inner" / "config.yaml").write_text("{}")
    Numbers((9.0,), "of another run").save(made / "inner" / "numbers")
    return made


@pytest.fixture(scope="module")
def page(folder) -> str:
    out = folder.parent / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


# --- the document ---


def test_the_page_needs_no_other_file_and_runs_nothing(page):
    found = Reader(page)
    assert found.open == [] and page.startswith("<!DOCTYPE html>")
    assert found.all("script") == [] and found.all("iframe") == [] and found.all("object") == []
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert str(attributes.get("src", "data:")).startswith("data:"), attributes
    assert [link["href"] for link in found.all("link")] == ["data:,"]
    links = [str(a["href"]) for a in found.all("a")]
    assert all(link.startswith("#") for link in links if link != "https://example.org/x.png")  # of the card: to click
    (style_sheet,) = found.said("style")
    assert "url(" not in style_sheet and "@import" not in style_sheet
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_what_others_wrote_is_escaped(page):
    assert HOSTILE not in page and "<script" not in page
    found = Reader(page)
    for tag in ("p", "li", "pre"):  # summary of an analysis, card, configuration
        assert any("<script>" in text and "alert" in text for text in found.said(tag)), tag
    assert not any(str(a["href"]).startswith("javascript") for a in found.all("a"))
    assert found.all("b") == [] and all("example.org" not in str(image["src"]) for image in found.all("img"))


def test_every_picture_says_what_it_shows(page):
    images = Reader(page).all("img")
    alts = [str(image["alt"]) for image in images]
    assert len(images) == 4 and all(len(alt) > 20 for alt in alts)
    assert any(alt.startswith("Accuracies over eps of 8 samples") for alt in alts)
    assert any(alt.startswith("Learning curve over 3 epochs") and "verified 43.8%" in alt for alt in alts)
    assert alts[2:] == [f"Three numbers. {HOSTILE}", "Three plots side by side."]
    assert [figure.get("class") for figure in Reader(page).all("figure")] == [None, None, None, "wide"]
    for image in images:
        kind, _, content = str(image["src"]).partition(";base64,")
        start = base64.b64decode(content)[:8]
        assert (kind, start[:5]) in (("data:image/svg+xml", b"<?xml"), ("data:image/png", b"\x89PNG\r"))


def test_the_page_has_an_outline_and_its_tables_heads(page):
    found = Reader(page)
    assert found.all("html") == [{"lang": "en"}] and len(found.all("h1")) == 1
    assert found.said("h1") == found.said("title") == ["2C2F trained with the bcp loss, l2 eps 0.5"]
    assert found.said("h2") == [
        "Certification, test split", "Training", "Analyses my numbers", "Pictures", "Network", "Model card",
        "Configuration", "Environment",
    ]  # fmt: skip
    anchors = [str(a["href"])[1:] for a in found.all("a") if str(a["href"]).startswith("#")]
    assert anchors == [section["id"] for section in found.all("section")] and len(anchors) == 8
    heads = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(heads))
    assert all(head.get("scope") == "col" or "scope" not in head for head in found.all("th"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    for rule in ("@media print", "prefers-color-scheme: dark", "overflow-x: auto"):
        assert rule in page


def test_the_numbers_are_those_of_the_files(page, folder):
    found = Reader(page)
    report = json.loads((folder / "test.json").read_text())
    row = report["summary"][1]
    assert found.said("dd")[:3] == [f"{100 * row[key]:.1f} %" for key in ("verified", "pgd", "clean")]
    cells = found.said("td")
    start = cells.index("0.02")
    assert cells[start + 1 : start + 4] == [f"{100 * row[key]:.2f}" for key in ("clean", "pgd", "verified")]
    assert "0.4375" in cells  # of metrics.csv
    assert cells[cells.index("3") :][:2] == ["3", "30"]  # the third epoch, and its step
    paragraphs = found.said("p")
    assert any(text == f"3 numbers, {HOSTILE}." for text in paragraphs)
    assert any(text == f"In all rows: word {HOSTILE}, seed 7." for text in paragraphs)
    assert "of another run" not in page
    total = sum(p.numel() for p in build(Network("2C2F", [1, 8, 8])).parameters())
    assert f"{total:,} weights." in paragraphs


# --- what is gathered ---


def test_results_elsewhere_and_a_model_alone(folder, tmp_path):
    model = tmp_path / "net.onnx"
    export_onnx(build(Network("2C2F", [1, 8, 8])).eval(), [1, 8, 8], model)
    assert main(["report", str(model), "--with", str(folder / "analyses"), "--title", "Mine"]) == 0
    found = Reader((tmp_path / "net.html").read_text(encoding="utf-8"))
    assert found.said("h1") == ["Mine"] and found.said("h2") == ["Network", "My numbers (analyses)"]
    assert "Gemm" in found.said("td") and "Conv" in found.said("td")


def test_a_randomized_network_has_accuracies_and_no_certificates(tmp_path):
    content = {
        "meta": {"samples": 50, "method": "none: ensemble of 10 draws, EOT-PGD", "dtype": "float32"},
        "summary": [{"eps": 0.3, "clean": 0.9, "pgd": 0.456, "verified": None}],
        "accuracies": [{"eps": 0.3, "accuracy": 0.456, "low": 0.4, "high": 0.5}],
    }
    (tmp_path / "test.json").write_text(json.dumps(content))
    made = gather(tmp_path)
    assert [(fact.value, fact.name) for fact in made.facts] == [
        ("45.6 %", "accuracy under PGD, eps 0.3"), ("90.0 %", "clean accuracy"), ("50", "samples")
    ]  # fmt: skip
    (section,) = made.sections
    assert section.title == "Robust accuracy, test split" and "Nothing is verified" in section.paragraphs[0]
    assert section.tables[0].rows == (("0.3", "0.456", "0.4", "0.5"),)


def test_a_sweep_is_a_table_of_its_runs(folder, tmp_path):
    (tmp_path / "sweep.csv").write_text("loss,eps,seed,samples,clean,pgd,verified,run\nbcp,0.5,0,10,0.9,,0.4,a\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("{}")
    (section,) = gather(tmp_path).sections
    assert section.title == "Sweep" and section.tables[0].rows == (("bcp", "0.5", "0", "10", "0.9", "", "0.4", "a"),)


def test_what_is_corrupt_is_named_and_the_rest_is_shown(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "test.json").write_text('{"meta": {}, "summary": [], "records": [{}]}')
    (tmp_path / "run" / "metrics.csv").write_text("a,b\n1,2\n")
    (tmp_path / "run" / "other.png").write_bytes(b"no image")
    (tmp_path / "run" / "model.pt").write_bytes(b"no model")
    (tmp_path / "run" / "analyses" / "my_numbers.json").write_text("{")
    made = gather(tmp_path / "run")
    assert [s.title for s in made.sections][:1] == ["Pictures"] and made.sections[-1].title == "Left out"
    named = {Path(cells[0]).name for cells in made.sections[-1].tables[0].rows}
    assert named == {"test.json", "metrics.csv", "other.png", "model.pt", "my_numbers.json"}


def test_nothing_to_show_is_an_error(tmp_path, capsys):
    with pytest.raises(DataError, match="there is no"):
        gather(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is no folder"):
        gather(tmp_path, [tmp_path / "file"])
    with pytest.raises(DataError, match="nothing to show"):
        gather(tmp_path)
    assert main(["report", str(tmp_path)]) == 2 and "nothing to show" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("epoch\n0\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_certifications_are_told_apart_by_their_place(folder, tmp_path):
    for name in ("report.json", "validate.json", "other/report.json", "other/more.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "test.json", tmp_path / name)
    assert [section.title for section in gather(tmp_path).sections] == [
        "Certification, other more", "Certification, other", "Certification", "Certification, validation samples",
    ]  # fmt: skip
    assert gather(tmp_path).sections[0].paragraphs[0].startswith("8 samples, l2 ball, method bcp")


# --- parts ---


def test_tables_show_the_first_and_the_last_of_many_rows():
    made = table("t", [{"n": n, "half": n / 2, "word": "w"} for n in range(100)], most=5)
    assert [row[0] for row in made.rows] == ["0", "25", "50", "74", "99"] and made.note == "5 of 100 rows"
    assert made.numeric == (True, True, False) and made.rows[1][1] == "12.5"
    assert table("t", [{"a": None, "b": True}]).rows == (("–", "True"),)


def test_a_picture_needs_an_alt_text(tmp_path):
    with pytest.raises(InvalidInputError, match="alt text"):
        Picture("data:image/png;base64,", " ")
    with pytest.raises(InvalidInputError, match="data: URI"):
        Picture("https://example.org/x.png", "x")
    drawn, _ = figure("Something drawn", rows=2)
    with pytest.raises(InvalidInputError, match="needs an alt text"):
        describe(drawn, " ")
    assert drawn_picture(drawn).alt == alt_text(drawn) == "Something drawn"
    save(drawn, tmp_path / "a.png")
    assert read_alt(tmp_path / "a.png") == file_picture(tmp_path / "a.png").alt == "Something drawn"
    with pytest.raises(ResultsError, match="must end in"):
        save(drawn, tmp_path / "a.bmp")
    with pytest.raises(ResultsError, match="is none of"):
        file_picture(tmp_path / "a.txt")


def test_a_figure_is_drawn_alike_each_time_and_without_pyplot():
    def draw():
        drawn, axes = figure("A line")
        axes[0, 0].plot([0, 1], [1, 0], label="down", **style(2))
        axes[0, 0].legend()
        return svg(drawn)

    assert draw() == draw() and "A line" in draw()
    code = "import sys, lirpa_ext.analysis, lirpa_ext.analysis.gather; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_differ_in_colour_dash_and_marker():
    looks = [style(number) for number in range(14)]
    for part in ("color", "linestyle", "marker"):
        assert len({str(look[part]) for look in looks[:7]}) == 7
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 14


def test_results_are_saved_as_json_and_csv(tmp_path):
    Numbers((1.5, math.inf), "w").save(tmp_path / "deep" / "n.json")
    content = read_result(tmp_path / "deep" / "n.json")
    assert content is not None and content["analysis"] == "Numbers" and content["summary"] == "2 numbers, w."
    assert content["rows"] == [{"x": 1.5, "word": "w", "seed": 7}, {"x": None, "word": "w", "seed": 7}]
    assert (tmp_path / "deep" / "n.csv").read_text().splitlines() == ["x,word,seed", "1.5,w,7", ",w,7"]
    assert text_table([]) == ""
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        Numbers((1.0,)).save(tmp_path / "file" / "n")


def test_metrics_come_back_as_numbers(folder):
    rows = read_metrics(folder / "metrics.csv")
    assert rows[1] == {"epoch": 1, "step": 20, "loss": 1.5, "eps": 0.25, "val_clean": 0.7, "val_verified": 0.3} | {
        "ramp_done": False
    }
    pgd = plot_metrics(rows).axes[1].lines[1]
    assert list(pgd.get_xdata()) == [1, 3] and list(pgd.get_ydata()) == pytest.approx([40, 60])


def test_markdown_loads_nothing():
    made = markdown("# Head\n\n![picture](x.png) <img src=x> [a](javascript:x)\n\n|a|\n|---|\n|1|\n")
    found = Reader(str(made))
    assert found.all("img") == [] and found.all("a") == [{"href": "x.png"}] and found.said("h3") == ["Head"]
    assert found.all("div")[0]["class"] == "scroll"


# --- in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs headless Chromium on a page: (stdout, stderr)."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")

    def run(*arguments: str) -> tuple[str, str]:
        profile = tmp_path_factory.mktemp("profile")
        command = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={profile}", *arguments,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr

    return run


MEASURE = """<!DOCTYPE html><title>m</title><iframe id="f" style="width:360px;height:800px;border:0"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images], scrolls = [...page.querySelectorAll(".scroll")];
  document.title = JSON.stringify({
    wide: root.scrollWidth, shown: root.clientWidth, drawn: images.filter(i => i.naturalWidth > 0).length,
    images: images.length,
    outside: [...page.querySelectorAll("figure")].filter(i => i.getBoundingClientRect().right > 360).length,
    small: images.filter(i => i.closest(".wide") && i.width < 700).length,
    tables: scrolls.filter(s => s.getBoundingClientRect().right > 360).length,
    letters: parseFloat(frame.contentWindow.getComputedStyle(page.body).fontSize),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")).length,
  });
};
frame.src = "page.html";
</script>"""


@pytest.mark.slow
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE)
    dom, log = browser("--dump-dom", "--virtual-time-budget=5000", (tmp_path / "measure.html").as_uri())
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", dom).group(1))
    assert found["wide"] <= found["shown"] <= 360
    assert (
        found["drawn"] == found["images"] == 4
        and found["outside"] == found["small"] == found["tables"] == found["fetched"] == 0
    )
    assert found["letters"] >= 16
    assert "CONSOLE" not in log


@pytest.mark.slow
def test_the_console_stays_empty_and_the_page_prints(browser, page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    printed = tmp_path / "page.pdf"
    _, log = browser(f"--print-to-pdf={printed}", "--no-pdf-header-footer", (tmp_path / "page.html").as_uri())
    assert "CONSOLE" not in log
    content = printed.read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", content)) >= 2


@pytest.mark.slow
def test_the_console_is_looked_at(browser, page, tmp_path):
    """The checks above fail for a page with a script that fails, or one that fetches."""
    broken = page.replace("</body>", '<script>null.x</script><img alt="" src="https://example.org/x.png"></body>')
    (tmp_path / "page.html").write_text(broken, encoding="utf-8")
    _, log = browser("--dump-dom", (tmp_path / "page.html").as_uri())
    assert log.count("CONSOLE") >= 2  # the policy forbids both


def test_a_page_of_its_own():
    made = Page("Title", (), (Section("One", ("Text & more",), code="a < b"),))
    found = Reader(made.html())
    assert found.said("h2") == ["One"] and found.said("pre") == ["a < b"] and found.all("nav") == []
