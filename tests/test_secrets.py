"""Tests of the detection of secrets in environment variables and configurations."""

import pytest
from omegaconf import OmegaConf

from clip_exp.cli import run
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose, environment_variable
from clip_exp.errors import ConfigError
from clip_exp.secrets import leaks, redact, secret_values
from tests.compose import train_config

SECRET_NAMES = [
    "GITHUB_PAT", "MYSQL_PWD", "GPG_PASSPHRASE", "BASIC_AUTH", "OPENAI_APIKEY", "SENTRY_DSN", "SLACK_WEBHOOK", "DB_PASSWORD",
    "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "GITHUB_TOKEN", "CI_JOB_TOKEN", "CI_JOB_JWT",
    "CI_REGISTRY_PASSWORD", "CI_DEPLOY_PASSWORD", "ACTIONS_RUNTIME_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "hf_token", "TOKEN2",
    "MY_KEY_2", "DEPLOY_KEY_STAGING", "SSH_PRIVATE", "X_PWD", "SMTP_PASS",
]  # fmt: skip
ORDINARY_NAMES = [
    "PATH", "PWD", "OLDPWD", "AUTHOR", "TOKENIZERS_PARALLELISM", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "SHELL", "TERM", "SHLVL",
    "EDITOR", "DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR", "SSH_AGENT_PID", "SSH_CONNECTION", "SSH_ASKPASS", "TMPDIR", "HOSTNAME",
    "GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "KEYBOARD_LAYOUT", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "HF_HOME", "WANDB_PROJECT", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR", "PASSENGERS", "MONKEY_ISLAND", "COMPASS",
    "CI", "GITHUB_ACTIONS", "GITHUB_SHA", "GITHUB_REF_NAME", "GITHUB_RUN_ID", "GITHUB_WORKSPACE", "GITHUB_REPOSITORY", "GITHUB_ACTOR",
    "GITHUB_PATH", "GITHUB_ENV", "GITHUB_OUTPUT", "RUNNER_TEMP", "RUNNER_OS", "GITLAB_CI", "GITLAB_USER_LOGIN", "CI_COMMIT_SHA",
    "CI_COMMIT_AUTHOR", "CI_PROJECT_DIR", "CI_PIPELINE_ID", "CI_JOB_NAME", "CI_REGISTRY_USER", "CI_SERVER_HOST", "CI_BUILDS_DIR",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_variable_with_the_name_of_a_secret_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of its value."""
    monkeypatch.setenv(name, "a password without a digit")
    with pytest.raises(
        ConfigError, match=rf"^\$\{{oc\.env:{name}\}} is not allowed: {name} looks like the name of a secret"
    ) as caught:
        environment_variable(name)
    assert "without a digit" not in str(caught.value)


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_the_variables_of_a_user_and_of_a_ci_may_be_interpolated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert environment_variable(name) == "value-of-it"


def test_every_interpolation_of_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PAT", "p")
    monkeypatch.setenv("WHICH", "MY_PAT")
    for value in (
        "x-${oc.env:MY_PAT}",
        "${oc.env:MY_PAT,none}",
        "${oc.decode:${oc.env:MY_PAT}}",
        "${oc.env:${oc.env:WHICH}}",
    ):
        with pytest.raises(ConfigError, match="MY_PAT looks like the name of a secret"):
            train_config(f"name={value}")
    with pytest.raises(ConfigError, match="UNSET_PAT looks like the name of a secret"):
        train_config("name=${oc.env:UNSET_PAT,none}")
    assert train_config("name=${oc.env:WHICH}").name == "MY_PAT"


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_command_refuses_it(command: str) -> None:
    key = "output_dir" if "output_dir" in SCHEMAS[command].model_fields else "output"
    with pytest.raises(ConfigError, match="MY_PAT looks like the name of a secret"):
        compose(command, [f"{key}=${{oc.env:MY_PAT}}"])


def test_it_is_refused_in_a_list_too() -> None:
    with pytest.raises(ConfigError, match="MY_PAT looks like the name of a secret"):
        compose("predict", ["images=['${oc.env:MY_PAT}']"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("name=${oc.env:MY_PAT}", "MY_PAT looks like the name of a secret"),
        ("hydra.run.dir=${oc.env:MY_PAT}", "hydra.run.dir=${oc.env:MY_PAT} is not supported"),
    ],
)
def test_the_command_line_refuses_it_too_and_prints_no_value(
    argument: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PAT", "abcdefgh-1")
    assert run("train", [argument]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "abcdefgh-1" not in captured.out + captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_writes_no_secret_and_no_folder_named_by_a_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    """Hydra creates the folder and writes the overrides to it before a job is checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PAT", "abcdefgh-1")
    assert run("train", ["-m", "seed=1,2", "name=x-abcdefgh-1", "output_dir=s3://bucket/x"]) == 2
    output = capsys.readouterr().err
    assert "name contains the value of the environment variable MY_PAT" in output
    assert "output_dir=s3://bucket/x is a URL" in output
    assert list(tmp_path.iterdir()) == []


def test_a_program_keeps_its_own_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PAT", "its own business")
    config = OmegaConf.create({"x": "${oc.env:MY_PAT}"})
    train_config()
    assert config.x == "its own business"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MY_PAT", "github_pat_11AB"), ("MYSQL_PWD", "correct-horse"), ("DB_PASSWORD", "CorrectHorse"),
        ("AWS_SECRET_ACCESS_KEY", "/9j4AAQSkZJRgABA/+1deadbeef=="), ("SLACK_WEBHOOK", "https://hooks.example/T/B/xyz"),
    ],
)  # fmt: skip
def test_a_typed_secret_is_found_and_removed(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert secret_values()[name] == value
    assert redact(f"argv: x={value}") == "argv: x=***"
    (message,) = leaks({"name": f"run of {value}"})
    assert message.startswith(f"name contains the value of the environment variable {name}")
    assert value not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IMAGE_KEY", "filepath"), ("KEY_DIR", "/data/keys1"), ("PAD_TOKEN", "end-of-text"), ("DB_PASSWORD", "checkpoint"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-XXXX1/agent.1"), ("PWD", "/home/me/project1"), ("MY_KEY", "true1"), ("SOME_AUTH", "/etc/passwd"),
    ],
)  # fmt: skip
def test_words_and_paths_are_not_removed_from_a_runs_files(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"x={value}") == f"x={value}"
    assert list(leaks({"data": {"image_key": value}})) == []


def test_secrets_that_contain_each_other_are_removed_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh1")
    monkeypatch.setenv("B_TOKEN", "abcdefgh1-and-more")
    assert redact("abcdefgh1-and-more, abcdefgh1") == "***, ***"


def test_a_long_text_without_a_url_does_not_take_quadratic_time() -> None:
    """It would take half an hour."""
    text = "a" * 300_000
    assert redact(text) == text


def test_an_argument_of_a_users_object_that_sounds_like_a_secret_is_refused() -> None:
    for kind in ("data", "loss", "optimizer", "task"):
        values = {"mine": {"api_token": "hf_abc"}} if kind == "task" else {"api_token": "hf_abc"}
        (message,) = leaks({kind: values})
        assert "api_token looks like a secret" in message
        assert "hf_abc" not in message
    columns = {"image_key": "image", "caption_key": "text", "label_key": "label", "root": "/photos"}
    assert list(leaks({"data": {**columns, "num_tokens": "8"}, "task": {"knn": {"train": columns}}})) == []
