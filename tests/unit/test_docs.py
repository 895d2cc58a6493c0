"""What the pages promise: links, commands and notebooks that work, a site that builds."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from functools import cache
from pathlib import Path

import processes
import pytest
import yaml

from speechbrain_mifuse import __version__
from speechbrain_mifuse.cli import main as cli
from speechbrain_mifuse.experiments.registry import plain_values

ROOT = Path(__file__).resolve().parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "speechbrain_mifuse"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
CORPUS_PAGES = [folder / "README.md" for folder in sorted((ROOT / "recipes").iterdir()) if folder.is_dir()]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *CORPUS_PAGES, *PAGES, *NOTEBOOKS]
YAMLS = sorted({*(ROOT / "hparams").rglob("*.yaml")} - {ROOT / "hparams" / "base" / "pairs.yaml"})
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
# Generated parts speak of other programs' commands, but for the tables of recipes.
GENERATED = re.compile(r"<!-- begin (?!recipes )(.*?) -->.*?<!-- end \1 -->", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"(python3? (?:recipes|benchmarks)/|speechbrain-mifuse [a-z]|torchrun |make [a-z]|\.\.\. +--)")
EXTERNAL = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
RUN_NOTEBOOK = """
import json, sys
names = {"__name__": "__main__"}
for place, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {place}", "exec"), names)
"""


def relative(path):
    return str(path.relative_to(ROOT))


@cache
def text_of(path):
    """Text of a page, or the written cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


@cache
def hooks():
    """The module of mkdocs' hooks."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slug(heading):
    """Anchor of a heading, as mkdocs makes it."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def anchors(path):
    """Anchors of a page."""
    return {slug(line.lstrip("#")) for line in FENCED.sub("", text_of(path)).splitlines() if line.startswith("#")}


# Links and navigation.


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_relative_link_leads_to_something_in_the_repository(path):
    found = [link for link in LINK.findall(FENCED.sub("", text_of(path))) if not re.match(r"\w+:", link)]
    missing = []
    for link in found:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_links_of_the_repository_become_links_of_the_site():
    text = "[a](../speechbrain_mifuse/corpora/manifest.py) [b](notebooks/equations.ipynb) [c](method.md#x) [d](https://h/e)"
    assert hooks().linked(text, "adding_a_corpus.md") == (
        "[a](api/corpora.md#speechbrain_mifuse.corpora.manifest) [b](notebooks/equations.md) [c](method.md#x) [d](https://h/e)"
    )
    assert hooks().linked("[a](../../speechbrain_mifuse/utils/audio.py)", "tutorials/x.md") == (
        "[a](../api/use.md#speechbrain_mifuse.utils.audio)"
    )
    assert hooks().linked("[a](../speechbrain_mifuse/utils/texts.py)", "x.md") == "a"


def pages_of(nav):
    """Pages of a navigation, at any depth."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def site():
    """What `mkdocs.yml` says."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_and_every_notebook_is_in_the_navigation_once():
    pages = [path.relative_to(DOCS).as_posix() for path in PAGES]
    pages += [path.relative_to(DOCS).with_suffix(".md").as_posix() for path in NOTEBOOKS]
    assert sorted(pages_of(hooks().nav_with_results(site()["nav"], DOCS))) == sorted(pages)


def reference():
    """Modules of the reference, each with the names that are shown of it; none are named of a whole room."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    entries = re.findall(r"^::: ([\w.]+)\n(?:    options:\n      members: \[(.*)\]\n)?", text, re.MULTILINE)
    return [(module, names.split(", ") if names else []) for module, names in entries]


def test_the_reference_shows_each_module_once():
    modules = [module for module, _ in reference()]
    assert len(set(modules)) == len(modules) > 30


@pytest.mark.parametrize(("module", "names"), reference())
def test_what_the_reference_shows_is_there_and_told_in_full(module, names):
    found = importlib.import_module(module)
    told = [inspect.getdoc(getattr(found, name)) or "" for name in names]
    assert not [name for name, doc in zip(names, told, strict=True) if "\n" not in doc]


def test_nothing_of_the_site_is_loaded_from_elsewhere():
    assert site()["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & site().keys()
    assert not [relative(path) for path in DOCS.rglob("*.svg") if re.search(r"(href|src)=\"http", path.read_text())]


# Commands.


def run_options():
    """Flags that SpeechBrain itself takes, read from its source, because importing it takes seconds."""
    folder = Path(importlib.util.find_spec("speechbrain").origin).parent
    tree = ast.parse((folder / "utils" / "run_opts.py").read_text(encoding="utf-8"))
    fields = {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    return {name for name in fields if not name.startswith("_")}


@cache
def run_option_names():
    found = run_options()
    assert {"device", "precision", "distributed_backend"} <= found
    return found


@cache
def keys_of(name):
    """Flags of a recipe with a YAML file; of any recipe if none is named."""
    named = [ROOT / name] if name else YAMLS
    return run_option_names().union(*(plain_values(path) for path in named))


@cache
def parser_of_the_command():
    """The argument parser of `speechbrain-mifuse`, caught on its way."""

    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_known_args", catch)
        with pytest.raises(Caught) as caught:
            cli.main(["recipes"])
    return caught.value.args[0]


def subcommands(parser):
    return next((action.choices for action in parser._actions if isinstance(action, _SubParsersAction)), {})


def options_of(parser):
    return {name for action in parser._actions for name in action.option_strings}


def spans(text):
    """Code of a page: lines of its blocks, with continued ones joined, and code between single ticks."""
    text = GENERATED.sub("", text)
    blocks = [found[0] for found in FENCED.finditer(text)]
    rest = FENCED.sub("", text)
    blocks += re.findall(r"(?:^ {4}.*\n?)+", rest, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest))]


def commands_of(path):
    """Commands that a page shows; for a YAML file those of its head, with `...` standing for the one before."""
    if path.suffix != ".yaml":
        return [line for line in spans(text_of(path)) if COMMAND.match(line)]
    head = path.read_text(encoding="utf-8").replace("\\\n#", " ").splitlines()
    lines = [line.lstrip("# ").split("   ")[0] for line in head if line.startswith("#")]
    return [line for line in lines if COMMAND.match(line)]


def words_of(command):
    """Words of a command, up to a pipe or a second command."""
    words = shlex.split(command, comments=True)
    ends = [place for place, word in enumerate(words) if word in ("&&", "&", "|", ";")]
    return words[: min(ends, default=len(words))]


def wrong_flags(words, known):
    flags = [word[2:].split("=")[0] for word in words if re.match(r"--[a-zA-Z]", word)]
    return [f"--{flag}" for flag in flags if flag not in known]


def wrong_methods(words):
    """Names after --method or --methods that no recipe knows."""
    joined = " ".join(words)
    found = re.findall(r"--methods?[ =](\[[^\]]*\]|[\w,]+)", joined)
    names = [name.strip() for group in found for name in group.strip("[]").split(",")]
    known = {*plain_values(ROOT / "hparams" / "nemo2rav.yaml")["adaptation"]["methods"], *shown_methods()}
    return [name for name in names if name not in known and not name.isupper()]


@cache
def shown_methods():
    """Methods that a page shows how to add."""
    return re.findall(r"^ +(\w+): !new:speechbrain_mifuse.adaptation", "\n".join(map(text_of, PAGES)), re.MULTILINE)


def missing_files(words):
    """Files of the repository that a command names and that are not there."""
    named = [word for word in words if re.match(r"(recipes|hparams|benchmarks|docs)/\S+\.\w+$", word)]
    named += [f"hparams/{name}" for word in words for name in re.findall(r"!include:(lalm/\S+)", word)]
    return [name for name in named if not (ROOT / name).exists()]


def wrong_in_recipe(words):
    yaml_file = next((word for word in words if word.startswith("hparams/") and word.endswith(".yaml")), None)
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return wrong_flags(words[script + 1 :], keys_of(yaml_file))


def wrong_in_console_script(words):
    parser, rest = parser_of_the_command(), words[1:]
    while subcommands(parser) and rest:
        if rest[0] not in subcommands(parser):
            return [rest[0]]
        parser, rest = subcommands(parser)[rest[0]], rest[1:]
    known = {name.removeprefix("--") for name in options_of(parser)}
    if "--" in rest:
        place = rest.index("--")
        return wrong_flags(rest[:place], known) + wrong_flags(rest[place + 1 :], keys_of(None))
    if parser.get_default("recipe_flags"):
        named = next((word for word in rest if word.startswith("hparams/")), "hparams/rav2folder.yaml")
        known |= keys_of(named)
    if parser.prog.endswith(" sweep"):
        pairs = [word for word in rest[: next((n for n, w in enumerate(rest) if w[0] == "-"), None)] if word.islower()]
        return [pair for pair in pairs if not (ROOT / "hparams" / f"{pair}.yaml").exists()] + wrong_flags(rest, known)
    return wrong_flags(rest, known)


def benchmark_flags(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\(\s*\"--(\w+)\"", text))


def wrong_in(words):
    """What does not exist of what a command names."""
    wrong = missing_files(words) + wrong_methods(words)
    if wrong:
        return wrong
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [word for word in words[1:2] if word not in targets]
    if words[0] == "speechbrain-mifuse":
        return wrong_in_console_script(words)
    if words[0] == "...":
        return wrong_flags(words, keys_of(None))
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        return []
    return wrong_in_recipe(words) if script.startswith("recipes/") else wrong_flags(words, benchmark_flags(script))


@pytest.mark.parametrize("path", [*TEXTS, *YAMLS], ids=relative)
def test_every_command_names_files_and_flags_that_exist(path):
    wrong = {command: found for command in commands_of(path) if (found := wrong_in(words_of(command)))}
    assert not wrong


def test_the_check_of_commands_finds_what_is_wrong():
    good = "python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml --seed 2 --device cpu"
    assert wrong_in(words_of(good)) == []
    assert wrong_in(words_of(f"{good} --sed 1")) == ["--sed"]
    assert wrong_in(words_of(good.replace("nemo2rav", "nemo2mars"))) == ["hparams/nemo2mars.yaml"]
    assert wrong_in(words_of(f"{good} --method '[mi_fuse, mi_fudge]'")) == ["mi_fudge"]
    assert wrong_in(words_of("speechbrain-mifuse sweep nemo2mars --seeds 1")) == ["nemo2mars"]
    assert wrong_in(words_of("speechbrain-mifuse labels merge a b --onto c")) == ["--onto"]
    assert wrong_in(words_of("speechbrain-mifuse guess a.wav")) == ["guess"]
    assert wrong_in(words_of("make nothing")) == ["nothing"]


def test_pages_show_many_commands():
    assert sum(len(commands_of(path)) for path in TEXTS) > 60
    assert sum(len(commands_of(path)) for path in YAMLS) > 60


@cache
def known_flags():
    """Flags of anything that belongs to this project."""
    found, left = set(keys_of(None)), [parser_of_the_command()]
    while left:
        parser = left.pop()
        found |= {name.removeprefix("--") for name in options_of(parser)}
        left += subcommands(parser).values()
    return found.union(*(benchmark_flags(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py")))


# Of pip, torchrun, simulators and SpeechBrain's launchers, which pages speak of too.
FOREIGN = {"nproc_per_node"}


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_flag_that_is_spoken_of_exists(path):
    said = [words for words in spans(text_of(path)) if words.startswith("--")]
    flags = {match[1] for words in said for match in re.finditer(r"(?:^| )--([a-zA-Z]\w*)", words)}
    assert not flags - known_flags() - FOREIGN


# Sources, notebooks, releases.


def test_every_source_file_says_what_it_is():
    folders = ("speechbrain_mifuse", "recipes", "benchmarks", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert paths and not [relative(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_a_notebook_holds_no_output_and_little_text(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert path.stat().st_size < 20_000 and {cell["cell_type"] for cell in cells} == {"markdown", "code"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_a_notebook_runs_from_its_first_cell_to_its_last_without_network(path, tmp_path):
    # Whoever asks for the network here gets an address where nobody answers; the API on this machine needs no proxy.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    alone = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    alone |= {"TMPDIR": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MIFUSE_")}
    (tmp_path / "notebook.py").write_text(RUN_NOTEBOOK)
    arguments = ("notebook.py", [str(path)], str(tmp_path), {**environment, **nowhere, **alone}, str(tmp_path / "log"))
    process = processes.start(processes.run_script, *arguments)
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log.err").read_text()[-3000:]


def test_a_notebook_becomes_a_page():
    text = hooks().notebook_text(DOCS / "notebooks" / "equations.ipynb")
    assert text.startswith("# ") and text.count("```python") > 5 and text.count("```") % 2 == 0


def test_version_is_the_same_in_package_citation_and_changelog():
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    first = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == __version__
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings", "griffe") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f'{", ".join(missing)} not installed: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    assert not {found for page in pages for found in EXTERNAL.findall(page.read_text(encoding="utf-8"))}
    assert "fused_label" in (tmp_path / "site" / "api" / "adaptation.html").read_text(encoding="utf-8")
