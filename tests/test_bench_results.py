"""`fastllm bench`: stored runs, the tables made of them, and the README's."""

import json
from pathlib import Path

import pytest

from fastllm.cli import main
from fastllm.cli.app import CliError
from fastllm.cli.bench import readme, report, results, rows

ROOT = Path(__file__).parent.parent


def row(**changes):
    made = rows.Row(
        "rms_norm", "norm", "8x8-fp32", "float32", "forward", 1, "cpu", 1 << 21, 1 << 19, False
    )
    made.microseconds = {"fastllm": 10.0, "eager": 20.0, "compiled": 9.0, "copy": 8.0}
    made.speedup = {"eager": [2.0, 1.9, 2.1], "compiled": [0.9, 0.89, 0.91], "copy": [0.8] * 3}
    made.quartiles = {name: [0.97 * x, 1.03 * x] for name, x in made.microseconds.items()}
    made.limit_share, made.bound = 0.8, "memory"
    for name, value in changes.items():
        setattr(made, name, value)
    return made.json()


def test_losses_are_marked():
    lost = row()
    assert lost["losses"] == ["compiled"]  # the copy is a limit, not a rival
    assert row(speedup={"eager": [0.98, 0.9, 1.0], "copy": [0.5] * 3})["losses"] == []
    assert report.tally([lost, row(wrong="no")]).startswith("1 of 2 rows lose")
    page = report.markdown(stored([lost]))
    assert "**loses to compiled**" in page
    assert "0.90x" in page
    assert "2.00x (1.90-2.10)" in page


def stored(found):
    run = results.header("cpu") | {"complete": True, "planned": len(found), "seconds": 1.0}
    run |= {"limits": [], "rows": found, "overhead": [], "absent": {}}
    return json.loads(json.dumps(run))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda run: run.pop("limits"), "limits"),
        (lambda run: run.update(schema=99), "schema"),
        (lambda run: run["rows"][0].pop("speedup"), "speedup"),
        (lambda run: run["rows"][0].update(nbytes="many"), "nbytes"),
        (lambda run: run["rows"].append(None), "rows[1]"),
    ],
)
def test_stored_runs_are_checked(spoil, word, tmp_path):
    run = stored([row()])
    results.check(run, "here")
    spoil(run)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    with pytest.raises(CliError, match=word.replace("[", r"\[")):
        results.read(path)
    with pytest.raises(CliError):
        results.write(path, run)


@pytest.mark.parametrize("change", [{"build": "another"}, {"complete": True}, {"schema": 1}])
def test_only_the_same_unfinished_run_is_gone_on_with(change, tmp_path):
    path = tmp_path / "run.json"
    run = stored([row()]) | {"complete": False}
    path.write_text(json.dumps(run))
    assert results.resumable(path, "cpu") == run
    path.write_text(json.dumps(run | change))
    assert results.resumable(path, "cpu") is None


def test_truncated_run_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"schema": 2, ')
    with pytest.raises(CliError, match=r"run\.json"):
        results.read(path)


def test_readme_table_is_generated(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    folder = tmp_path / "bench" / "results"
    small = row(case="tiny", nbytes=64, speedup={"eager": [3.0] * 3, "copy": [1.0] * 3})
    lost = row(case="slow", nbytes=32, direction="backward")
    big = row(case="big", nbytes=1 << 30, speedup={"eager": [3.0] * 3, "copy": [1.0] * 3})
    results.write(folder / "chip.json", stored([row(), small, lost, big]))
    assert main(["bench", "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert "| slow | backward | 1 | cpu | compiled (0.90x) |" in text
    assert "tiny" not in text
    assert "2 of 4 rows lose" in text
    assert readme.updated(page) == text


def test_readme_without_markers_is_refused(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("nothing here\n")
    assert main(["bench", "--readme", str(page)]) == 2
    assert "bench: generated" in capsys.readouterr().err
    assert page.read_text() == "nothing here\n"


def test_readme_agrees_with_the_stored_runs():
    page = ROOT / "README.md"
    if not readme.run_files(page):
        pytest.skip("no results are stored")
    assert readme.updated(page) == page.read_text()
