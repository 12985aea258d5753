"""tools/study.py: whose paths are meant, what is refused before anything runs, and what is said."""

import shlex
from pathlib import Path

import pytest

from lth_plugins.commands import study

ROOT = Path(__file__).resolve().parents[2]

STUDY = """
out: results
archs: [resnet18]
seeds: [0]
rounds: [1]
sources: {mine: {config: configs/pretrain/digits_supervised.yaml}}
tasks:
  cls: {tool: classification, config: cls.yaml, inputs: [data]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a study and what it needs."""
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)
    Path("cls.yaml").write_text((ROOT / "configs/transfer/digits_r18.yaml").read_text())
    Path("data").mkdir()
    return tmp_path


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """The exit code, the commands, and what else was said."""
    code = study.main(["run", *arguments, "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_paths_are_of_the_working_directory_and_configurations_of_the_project(
    folder, capsys
) -> None:
    code, commands, said = dry_run(capsys, "study.yaml")
    assert code == 0 and len(commands) == 3
    search, dense, _ = map(shlex.split, commands)
    assert search[1:5] == [
        *("-m", "lth_plugins", "find"),
        str(ROOT / "configs/pretrain/digits_supervised.yaml"),
    ]
    assert dense[1:5] == ["-m", "lth_plugins", "cls", "cls.yaml"]
    assert [part for part in search if part.startswith("out=results/runs/find-mine-")]
    taken = "configs/pretrain/digits_supervised.yaml"
    assert f"Not in {folder}, so taken from {ROOT / 'configs'}: {taken}." in said


def test_what_is_in_the_working_directory_goes_before_the_checkout(folder, capsys) -> None:
    own = folder / "configs/pretrain/digits_supervised.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((ROOT / "configs/pretrain/digits_supervised.yaml").read_text())
    _, commands, said = dry_run(capsys, "study.yaml")
    assert shlex.split(commands[0])[4] == "configs/pretrain/digits_supervised.yaml"
    assert "taken from" not in said


def test_a_shipped_study_can_be_run_from_anywhere(folder, capsys) -> None:
    code, commands, said = dry_run(capsys, "configs/study/digits_sensitivity.yaml", "out=here")
    assert code == 0 and "configs/study/digits_sensitivity.yaml" in said
    assert all(" -m lth_plugins " in command for command in commands)
    assert not Path("here").exists()


def test_a_dry_run_prints_the_commands_and_writes_nothing(folder, capsys) -> None:
    code, commands, _ = dry_run(capsys, "configs/study/digits.yaml", "out=here")
    assert code == 0 and "lth_plugins scenes --out" in commands[0]
    assert sum("lth_plugins find" in command for command in commands) == 3
    assert sum("lth_plugins cls" in command for command in commands) == 54
    assert not Path("here").exists()


def test_a_dry_run_says_at_once_what_it_is_about_beside_the_commands(folder, capsys) -> None:
    _, _, said = dry_run(capsys, "study.yaml", "seeds=[1,2]")
    first, *_, last = said.splitlines()
    assert first == "Planning the study of study.yaml with 'seeds=[1,2]' …"
    assert last == (
        "A dry run: this would run 5 of 5 runs (1 searches, 4 trainings); results go to results."
    )


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("text", ["no/such", "~/no-such-file", "data/no"])
def test_an_input_that_is_not_there_is_refused_before_anything_runs(
    folder, capsys, dry: list[str], text: str
) -> None:
    assert study.main(["run", "study.yaml", f"tasks.cls.inputs=[{text}]", *dry]) == 2
    printed = capsys.readouterr()
    (error,) = (line for line in printed.err.splitlines() if "error" in line)
    path = Path(text).expanduser()
    assert error.startswith(f"lth study: error: cls needs {path}, which is not there")
    assert str(folder) in error
    assert not Path("results/runs").exists() and "find_ticket" not in printed.out


def test_an_input_that_prepare_may_make_is_said_in_a_dry_run(folder, capsys) -> None:
    Path("make.py").write_text("import pathlib; pathlib.Path('made').mkdir()")
    changes = ("tasks.cls.inputs=[made]", "prepare=[make.py]")
    code, commands, said = dry_run(capsys, "study.yaml", *changes)
    assert code == 0 and commands[0].endswith("make.py")
    assert "Unless make.py makes it: cls needs made, which is not there" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no.yaml"], "found none at no.yaml"),
        (["run", "study.yaml", "prepare=[no.py --fast]", "--dry-run"], "no script at 'no.py'"),
        (["run", "study.yaml", "prepare=['']", "--dry-run"], "no script at ''"),
        (["run", "study.yaml", "prepare=['x.py \"a']", "--dry-run"], "No closing quotation"),
        (["run", "study.yaml", "seed=3"], "unknown key seed"),
        (["status", "nowhere"], "expected a study in nowhere"),
        (["report", "nowhere"], "expected a study in nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder, capsys, arguments: list[str], message: str
) -> None:
    assert study.main(arguments) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("lth study: error: ")]
    assert len(errors) == 1 and message in errors[0]
    # What it was about is said first.
    assert any(arguments[1] in line for line in (printed.out + printed.err).splitlines()[:1])


def test_a_command_of_prepare_that_fails_is_a_failure_and_no_bad_input(folder, capsys) -> None:
    Path("make.py").write_text("raise SystemExit('no data')")
    assert study.main(["run", "study.yaml", "prepare=[make.py]"]) == 1
    assert "Preparing data, make.py failed with exit code 1: no data" in capsys.readouterr().err
    assert not Path("results/runs").exists()


def test_a_plan_of_an_older_version_says_what_to_do(folder, capsys) -> None:
    Path("results").mkdir()
    Path("results/plan.json").write_text('{"config": "study.yaml", "left_out": {}, "runs": []}')
    assert study.main(["status", "results"]) == 2
    assert "start tools/study.py run again, which writes it" in capsys.readouterr().err
