"""Options as flags, as variables and in a file; and what means nothing is refused."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from embedmill.commands.main import cli
from embedmill.commands.options import check_environment, load_config, shared, split_names
from embedmill.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG", "MODEL", "TO", "RPM", "TEXT_FIELD"):
        monkeypatch.delenv(f"EMBEDMILL_{name}", raising=False)


def write_config(text: str) -> None:
    Path("embedmill.toml").write_text(text, encoding="utf-8")


def refusal_of_config(text: str) -> str:
    write_config(text)
    with pytest.raises(ConfigurationError) as caught:
        load_config()
    return str(caught.value)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("EMBEDMILL_MODLE", "EMBEDMILL_MODEL"),
        ("EMBEDMILL_DIMENSION", "EMBEDMILL_DIMENSIONS"),
        ("EMBEDMILL_REDIS_URL", "EMBEDMILL_REDIS"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_near_one(variable: str, near: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_environment({variable: "x", "PATH": "/bin"})
    assert str(caught.value) == f"the environment sets {variable}, which is no setting; did you mean {near}?"


def test_an_unknown_variable_with_no_near_one_gets_the_list() -> None:
    with pytest.raises(ConfigurationError, match=r"there are: EMBEDMILL_API_BASE, .*EMBEDMILL_MODEL"):
        check_environment({"EMBEDMILL_QQQQQQ": "x"})


def test_known_variables_and_those_of_others_pass() -> None:
    check_environment({"EMBEDMILL_MODEL": "x", "EMBEDMILL_CONFIG": "x", "HOME": "/", "embedmill_x": ""})


def test_without_a_file_there_are_no_settings() -> None:
    assert load_config() == {}


def test_a_file_sets_options_with_hyphens_or_underscores() -> None:
    write_config('model = "null/8"\ntext-field = "title"\napi_base = "http://x/v1"\nrpm = 60\n')
    assert load_config() == {"model": "null/8", "text_field": "title", "api_base": "http://x/v1", "rpm": 60}


@pytest.mark.parametrize("text", ["model = ", "model", "\x00", "a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_named(text: str) -> None:
    assert refusal_of_config(text).startswith("cannot read embedmill.toml: ")


def test_a_file_in_another_encoding_is_named() -> None:
    Path("embedmill.toml").write_bytes(b'model = "\xff"\n')
    with pytest.raises(ConfigurationError, match=r"cannot read embedmill\.toml"):
        load_config()


def test_a_folder_in_place_of_the_file_is_named() -> None:
    Path("embedmill.toml").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot read embedmill\.toml"):
        load_config()


def test_a_setting_that_does_not_exist_is_refused_with_the_near_one() -> None:
    assert refusal_of_config('modle = "x"') == ("embedmill.toml sets 'modle', which is no setting; did you mean model?")


@pytest.mark.parametrize(("text", "kind"), [("model = ['a', 'b']", "list"), ("[model]\nname = 'a'", "dict")])
def test_a_setting_takes_one_value(text: str, kind: str) -> None:
    assert refusal_of_config(text) == f"embedmill.toml: model takes one value, not {kind}"


def test_a_file_that_was_named_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBEDMILL_CONFIG", str(tmp_path / "other.toml"))
    with pytest.raises(ConfigurationError, match=r"EMBEDMILL_CONFIG names .*other\.toml, which does not exist"):
        load_config()
    (tmp_path / "other.toml").write_text("rpm = 5\n")
    write_config("rpm = 6\n")
    assert load_config() == {"rpm": 5}


@click.command()
@shared("model", "rpm", "text_field")
def probe(model: str, rpm: int | None, text_field: str) -> None:
    click.echo(f"{model} {rpm} {text_field}")


def probed(*arguments: str, file: dict[str, object] | None = None, **environment: str) -> str:
    result = CliRunner().invoke(probe, list(arguments), env=environment, default_map=file)
    return result.output.strip()


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default() -> None:
    file: dict[str, object] = {"model": "file/x", "rpm": 5}
    assert probed() == "local/minilm None text"
    assert probed(file=file) == "file/x 5 text"
    assert probed(file=file, EMBEDMILL_MODEL="env/x") == "env/x 5 text"
    assert probed("--model", "flag/x", "--rpm", "7", file=file, EMBEDMILL_MODEL="env/x") == "flag/x 7 text"


def test_a_value_that_cannot_be_is_refused_wherever_it_stands() -> None:
    for output in (probed("--rpm", "0"), probed(EMBEDMILL_RPM="0"), probed(file={"rpm": 0})):
        assert "0 is not in the range x>=1" in output


@pytest.mark.parametrize("command", ["run", "push"])
def test_a_command_takes_its_options_from_the_file_of_its_folder(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("sys.argv", ["embedmill", command])
    write_config("dimensions = 0\n")
    result = CliRunner().invoke(cli, [command, "x.jsonl"])
    assert result.exit_code == 2
    assert "Invalid value for '--dimensions'" in result.output


def test_names_are_split_at_commas() -> None:
    assert split_names(" title, text ,,") == ("title", "text")
    assert split_names("") == ()
