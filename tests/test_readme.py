"""The README's tables of flags, in both languages, against what the scripts say of themselves."""

import re

import pytest
from made_up import ROOT

SCRIPTS = ("vfm_feature.py", "train.py", "encode.py")


def flags_of_the_script(script, run_here):
    """Flag -> default, None where --help shows none."""
    found = {}
    for entry in re.split(r"\n  (?=--)", run_here(script, "--help").stdout)[1:]:
        default = re.search(r"\(default: (.*?)\)", " ".join(entry.split()))
        found[re.match(r"--\w+", entry)[0]] = default and default[1]
    return found


def flags_of_the_readme(script):
    """For each table under a heading that names the script: flag -> the cell of its default."""
    text = (ROOT / "README.md").read_text()
    sections = re.findall(rf"^###+ .*`{re.escape(script)}`.*\n((?:(?!^#).*\n)*)", text, re.MULTILINE)
    tables = []
    for section in sections:
        rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `--")]
        if rows:
            tables.append({flag: row[1].strip() for row in rows for flag in re.findall(r"--\w+", row[0])})
    return tables


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tables_of_flags_are_those_of_the_scripts(script, run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # argparse wraps no path then
    ours = flags_of_the_script(script, run_here)
    tables = flags_of_the_readme(script)
    assert len(tables) == 2, "one in English, one in Chinese"
    for table in tables:
        assert table.keys() == ours.keys()
        for flag, default in ours.items():
            shown = re.findall(r"`([^`]*)`", table[flag])
            if shown and default not in (None, "False"):
                assert any(same(one, default) for one in shown), (flag, table[flag], default)


def same(shown, default):
    try:
        return float(shown) == float(default)
    except ValueError:
        return shown.removeprefix("./") == default
