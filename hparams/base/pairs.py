"""Write `hparams/<pair>.yaml` for every pair of `pairs.yaml`, by `python hparams/base/pairs.py`.

Pairs differ in few lines, but SpeechBrain's YAML cannot include a file at its top level and still take each of its keys
as a flag. So `pair.yaml.jinja` holds what is common and `pairs.yaml` what differs; a test compares the files.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

BASE = Path(__file__).resolve().parent
JINJA = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


def pair_files() -> dict[str, str]:
    """Give the text of each pair's YAML file by the pair's name."""
    table = yaml.safe_load((BASE / "pairs.yaml").read_text(encoding="utf-8"))
    template = (BASE / "pair.yaml.jinja").read_text(encoding="utf-8")
    return {name: _filled(name, pair, table, template) for name, pair in table["pairs"].items()}


def _filled(name: str, pair: dict, table: dict, template: str) -> str:
    values = {**table["families"][pair["family"]], **pair, "pair": name}
    source, target, teacher = (
        {"key": pair[role], **table["corpora"][pair[role]]} for role in ("source", "target", "teacher")
    )
    values |= {"source": source, "target": target, "teacher": teacher}
    values["roles"] = [
        ("target", target, "data_folder", target["adapt"]),
        ("source", source, "source_data_folder", source["train"]),
        ("teacher", teacher, "teacher_data_folder", teacher["train"]),
    ]
    values["header"] = JINJA.from_string(values["header"]).render(values)
    return JINJA.from_string(template).render(values)


if __name__ == "__main__":
    for pair_name, text in pair_files().items():
        (BASE.parent / f"{pair_name}.yaml").write_text(text, encoding="utf-8")
