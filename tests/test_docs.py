"""The documents: generated parts are up to date, names exist, examples are those that run."""

import ast
import configparser
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from lirpa_ext.cli import _parser
from lirpa_ext.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")])
NAME = re.compile(r"\blirpa_ext((?:\.[A-Za-z_]\w*)+)")


def resolve(dotted: str) -> object:
    """The object of that name: an attribute, a field of a dataclass, or a module."""
    found: object = importlib.import_module("lirpa_ext")
    parts = dotted.split(".")
    for position, part in enumerate(parts[1:], 1):
        if hasattr(found, part):
            found = getattr(found, part)
        elif dataclasses.is_dataclass(found) and part in {field.name for field in dataclasses.fields(found)}:
            return found
        else:
            found = importlib.import_module(".".join(parts[: position + 1]))
    return found


def snippets(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist(path: Path) -> None:
    for dotted in sorted(set(NAME.findall(path.read_text(encoding="utf-8")))):
        if dotted.rpartition(".")[2] not in ("py", "git"):
            resolve(f"lirpa_ext{dotted}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_import_what_exists(path: Path) -> None:
    for snippet in snippets(path):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lirpa_ext"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), snippet


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_are_accepted(path: Path) -> None:
    for line in re.findall(r"^lirpa-ext (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        _parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert target in targets


def test_readme_example_is_the_one_that_runs() -> None:
    source = (ROOT / "examples" / "certify_torch_model.py").read_text(encoding="utf-8")
    assert snippets(ROOT / "README.md")[0] == source.partition('"""\n\n')[2]


@pytest.mark.parametrize("name", METHODS)
def test_readme_lists_every_method_and_its_options(name: str) -> None:
    (row,) = re.findall(rf'^\| `"{name}"` .*$', (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    options = [p for p in inspect.signature(METHODS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [option.name for option in options if f"`{option.name}`" not in row] == []
    assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_support_table_is_up_to_date() -> None:
    path = ROOT / "docs" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.PATH.read_text(encoding="utf-8")
    assert written == module.support_table(), "run: python docs/support_table.py"


def test_an_installation_has_every_file():
    """Files that are no Python are listed, or a wheel lacks them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = {name.strip() for name in config["options.package_data"]["lirpa_ext"].split(",")}
    package = ROOT / "lirpa_ext"
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith((".py", ".pyc"))} == listed
