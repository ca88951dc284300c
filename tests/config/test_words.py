"""Tests that people's words work as typed, or are answered with the override to type: names of other frameworks, flags, spellings."""

import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl

from clip_exp.cli import run
from clip_exp.config import registry, words
from clip_exp.config.base import broken_rules
from clip_exp.config.command_line import groups, read
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose
from clip_exp.config.files import conf_dir, options
from clip_exp.config.names import resolve
from clip_exp.config.training import TrainConfig, TrainerConfig
from clip_exp.config.words import DEVICES, FRAMEWORKS, VALUES, Answer, fold
from clip_exp.errors import ConfigError
from tests.compose import train_config
from tests.conftest import REPOSITORY
from tests.keys import leaf_keys

ANSWERED = {
    "batch_size=32": "type global_batch_size=32 on one device, global_batch_size=256 on 8. It counts the samples of all devices",
    "data.batch_size=32": "type global_batch_size=32 on one device, global_batch_size=256 on 8",
    "data.train_batch_size=64": "type global_batch_size=64 on one device, global_batch_size=512 on 8",
    "per_device_train_batch_size=4": "type global_batch_size=4 on one device, global_batch_size=32 on 8",
    "lr=0.001": "type optimizer.lr=0.001.",
    "train=pairs.csv": "type data.train=pairs.csv.",
    "tags=[a,b]": "type logger=wandb 'logger.wandb.tags=[a,b]'.",
    "trainer.max_epochs=5": "type epochs=5.",
    "max_epochs=5": "type epochs=5.",
    "trainer.max_steps=5": "type max_steps=5.",
    "trainer.precision=bf16": "type precision=bf16-mixed.",
    "trainer.precision=16-mixed": "type precision=16-mixed.",
    "precision=bf16": "type precision=bf16-mixed.",
    "precision=amp_bf16": "type precision=bf16-mixed.",
    "precision=amp": "type precision=16-mixed.",
    "precision=fp16": "type precision=16-mixed.",
    "precision=fp32": "type precision=32-true.",
    "precision=16": "type precision=16-mixed.",
    "precision=32": "type precision=32-true.",
    "data.sampler=weighted": "type 'data.train=[{path: a.csv, weight: 2}, {path: b.csv, weight: 1}]'.",
    "+data.sampler={_target_: torch.utils.data.WeightedRandomSampler}": "'data.train=[{path: a.csv, weight: 2},",
    "optimizer.image_lr=1e-5": "type finetune.image.lr_factor=…. It is a factor of optimizer.lr.",
    "optimizer.text_lr=1e-5": "type finetune.text.lr_factor=…. It is a factor of optimizer.lr.",
    "ckpt_path=a.ckpt": "type resume=a.ckpt or pretrained=a.ckpt. resume= continues that run; pretrained= starts a new run",
    "num_workers=4": "type data.num_workers=4.",
    "workers=4": "type data.num_workers=4.",
    "gpus=2": "type trainer.devices=2.",
    "devices=[0,1]": "type 'trainer.devices=[0,1]'.",
    "callbacks.early_stopping.patience=3": "type patience=3.",
    "callbacks.early_stopping.monitor=val/loss": "type monitor=val/loss.",
    "callbacks.model_checkpoint.monitor=val/loss": "type monitor=val/loss.",
    "callbacks.model_checkpoint.every_n_train_steps=100": "type checkpoint_every_n_steps=100.",
    "callbacks.model_checkpoint.save_top_k=3": "type keep_checkpoints=…. It counts the last checkpoints; the one that is best",
    "save_total_limit=3": "type keep_checkpoints=3. The one that is best in `monitor` is kept as well.",
    "callbacks.model_checkpoint.verbose=true": "type monitor=val/loss or checkpoint_every_n_steps=…",
    "+callbacks.early_stopping={_target_: lightning.EarlyStopping, patience: 3}": "callbacks.early_stopping.patience does not exist: type patience=3.",
    "callbacks=early_stopping": "type monitor=val/loss patience=3.",
    "loss=siglip": "type loss=sigmoid.",
    "loss=clip": "type loss=softmax.",
    "resume=latest": "type resume=auto.",
    "logger.project=clip": "type logger=wandb logger.wandb.project=clip.",
    "wandb=true": "type logger=wandb.",
    "wandb=false": "leave it out.",
    "logger.wandb.name=x": "type name=x.",
    "accum_freq=4": "type micro_batch_size=…",
    "warmup=2000": "type scheduler.warmup_steps=2000. It counts optimizer steps",
    "warm_up=0.1": "type scheduler.warmup_steps=…. It counts optimizer steps",
    "wd=0.1": "type optimizer.weight_decay=0.1.",
    "weight_decay=0.1": "type optimizer.weight_decay=0.1.",
    "optimizer.wd=0.1": "type optimizer.weight_decay=0.1.",
    "trainer.accumulate_grad_batches=4": "Increase global_batch_size and set micro_batch_size instead",
    "gradient_accumulation_steps=4": "Increase global_batch_size and set micro_batch_size instead",
    "trainer.val_check_interval=500": "type val_every_n_steps=500.",
    "trainer.val_check_interval=0.5": "type val_every_n_steps=….",
    "+trainer.val_check_interval={hours: 1}": "type val_every_n_steps=….",
    "trainer.logger=false": "type logger=csv.",
    "val_frequency=1": "type val_every_n_steps=…. It counts optimizer steps.",
    "save_frequency=1": "type checkpoint_every_n_steps=…. It counts optimizer steps.",
    "train_data=a.csv": "type data.train=a.csv.",
    "val_data=a.csv": "type data.val=a.csv.",
    "imagenet_val=/data/val": "type task=imagenet task.imagenet.root=/data/val.",
    "model.name=ViT-B-32": "does not select the model ViT-B-32, but only renames the selected one: type model=ViT-B-32.",
    "env_type=pytorchDDP": "type strategy=ddp.",
    "strategy=fsdp": "type strategy=deepspeed_stage_3.",
    "trainer.strategy=ddp_find_unused_parameters_true": "type strategy=ddp.",
    "trainer=gpu": "type trainer.accelerator=gpu.",
    "trainer=ddp": "type strategy=ddp.",
    "debug=fast_dev_run": "type debug=fdr.",
    "data=webdataset": "type data=csv.",
    "scheduler=const": "type scheduler=constant.",
    "optimizer=radam": "type optimizer=custom optimizer.lr=… optimizer._target_=torch.optim.RAdam.",
    "logger=[aim]": "logger.extra.aim={_target_: aim.pytorch_lightning.AimLogger}",
    "learningRate=1": "type optimizer.lr=1.",
    "lr-scheduler=cosine": "type scheduler=cosine.",
    "strategy.config=deepspeed.json": "is not a mapping: files are not read. Type each of its keys: strategy.config.<key>=…",
    "hydra/launcher=joblib": "hydra-joblib-launcher is not installed",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper is not installed",
    "hydra.run.dir=mine": "set output_dir=mine, since results are in <output_dir>/<command>/<name>/<time>.",
    "hydra.sweep.dir=mine": "set output_dir=mine",
    "hydra.sweep.subdir=mine": "set name=mine",
    "hydra.output_subdir=mine": "leave it out, since the folder of a run has its config.yaml",
    "hydra.job.chdir=true": "leave it out, since paths are relative to the folder of the command",
    "--lr 1e-3": "--lr 1e-3 is not a flag: type optimizer.lr=1e-3.",
    "--lr=1e-3": "--lr=1e-3 is not a flag: type optimizer.lr=1e-3.",
    "--batch-size 32": "type global_batch_size=32 on one device, global_batch_size=256 on 8",
    "--train-data x.csv --workers 4": "--workers 4 is not a flag: type data.num_workers=4.",
    "--siglip": "type loss=sigmoid.",
    "--resume latest": "type resume=auto.",
    "--epochs 32": "type epochs=32.",
    "--max-steps=5": "type max_steps=5.",
    "--compile": "type compile=true.",
    "--precision amp_bf16": "type precision=bf16-mixed.",
    "--precision=amp_bf16": "precision=amp_bf16 does not exist: type precision=bf16-mixed.",
    "--optimizer.lrr=1": "did you mean 'optimizer.lr'?",
    "--multi": "--multi is not a flag: type --multirun.",
    "--config_dir mine": "type --config-dir.",
    "--coca-caption-loss-weight 2": "there is no equivalent: leave it out.",
    "--distill-model x": "loss=custom loss._target_=… (examples/extending/distillation.py).",
    "--experiment digits": "type experiment=digits.",
    "--warmup_stepz 5": "did you mean scheduler.warmup_steps=5?",
    "--qqqqqqqq": "keys are set with key=value; --help lists them.",
}
NEEDS = {"strategy.config": "strategy=deepspeed_stage_2", "logger.wandb.name": "logger=wandb"}


def typed(line: str) -> list[str]:
    """Return the arguments of a line, of which an override is one, with what it needs."""
    needed = [option for key, option in NEEDS.items() if line.startswith(f"{key}=")]
    return [*needed, *(line.split() if line.startswith("--") else [line])]


@pytest.mark.parametrize("line", ANSWERED)
def test_a_word_of_another_framework_is_answered_with_what_to_type(refused, tmp_path: Path, line: str) -> None:
    done = refused("train.py", *typed(line), cwd=tmp_path)
    assert done.returncode == 2
    assert ANSWERED[line] in done.stderr
    assert done.stderr.startswith("error:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        ("evaluate", "ckpt_path=x", "ckpt_path does not exist: type pretrained=x or ckpt=x."),
        ("evaluate", "workers=2", "type num_workers=2."),
        ("evaluate", "gpus=2", "type devices=2."),
        ("predict", "precision=bf16", "type precision=bf16-mixed."),
        ("predict", "k=3", "type top_k=3."),
        ("rank", "top=3", "type top_k=3."),
        ("predict", "hydra.run.dir=x", "set output=x"),
        ("embed", "data.train=a.csv", "type table=a.csv."),
        ("make-shards", "table=a.csv", "type data.train=a.csv."),
    ],
)
def test_an_answer_has_only_keys_of_the_command(command: str, line: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        compose(command, [line])


def test_a_word_without_meaning_for_the_command_gets_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate does not exist: valid keys are "):
        compose("convert", ["learning_rate=1"])


@pytest.mark.parametrize("key", ["qqqq", "foo.bar", "xyz_abc", "lo"])
def test_below_some_similarity_no_key_is_suggested(key: str) -> None:
    with pytest.raises(ConfigError, match="does not exist: valid keys are allow_targets, "):
        train_config(f"{key}=1")


# A new argument of the Trainer needs a key in `TrainerConfig`, or a line in `words.LIGHTNING`.
@pytest.mark.parametrize("name", inspect.signature(pl.Trainer).parameters)
def test_every_argument_of_lightnings_trainer_is_a_key_or_is_answered(name: str) -> None:
    if name in TrainerConfig.model_fields:
        return
    key = f"trainer.{name}"
    assert key in words.LIGHTNING
    with pytest.raises(
        ConfigError, match=rf"^{key} does not exist: (type [^.]|.*: leave it out\.$|.*Increase global_batch)"
    ):
        train_config(f"{key}=1")


def test_keys_of_the_trainer_have_names_and_defaults_of_lightning() -> None:
    """All but those that are named here: Lightning's defaults are None, where it chooses, or `enable_…`."""
    parameters = inspect.signature(pl.Trainer).parameters
    assert set(TrainerConfig.model_fields) <= set(parameters)
    ours = TrainerConfig()
    differs = {name for name in TrainerConfig.model_fields if getattr(ours, name) != parameters[name].default}
    assert differs == {
        "num_nodes", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "num_sanity_val_steps", "enable_model_summary",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the tables


def parts(answer: Answer) -> list[str]:
    return [part for each in answer.overrides for part in words._parts(each)]


ALL = [(name, word, answer) for name, of in FRAMEWORKS.items() for word, answer in of.items()]
KEYS = {key for schema in SCHEMAS.values() for key in leaf_keys(schema)}


@pytest.mark.parametrize(("framework", "word", "answer"), ALL, ids=[f"{name}-{word}" for name, word, _ in ALL])
def test_every_answer_names_keys_and_options_that_exist(framework: str, word: str, answer: Answer) -> None:
    assert answer.overrides or answer.note
    assert word == word.lower()
    for part in parts(answer):
        key, _, value = part.partition("=")
        if key in groups() or "/" in key:
            choices = value.strip("[]").split(",")
            filled = {"{value}", "deepspeed_stage_{value}"}
            assert key == "model" or set(choices) <= {*options(key), *filled}, part
        else:
            of_task = re.sub(r"^task\.(\w+)\.root$", r"task", key)
            assert of_task in KEYS, part


def test_a_word_has_one_answer() -> None:
    answers: dict[str, set[Answer]] = {}
    for _, word, answer in ALL:
        answers.setdefault(fold(word.removeprefix("trainer.")), set()).add(answer)
    assert {word for word, found in answers.items() if len(found) > 1} == set()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in VALUES for value in VALUES[key]])
def test_every_translated_value_is_accepted(key: str, value: str) -> None:
    overrides = words._translated(key, value)
    assert overrides is not None
    train_config(*[part.replace("…", "1") for part in words._parts(overrides)])


def rows_of_page(page: str) -> list[tuple[list[str], str]]:
    """Return the words in the first column of a migration page's table of flags or settings, and the text of the second."""
    text = (REPOSITORY / "docs" / f"coming_from_{page}.md").read_text(encoding="utf-8")
    of_settings = re.split(r"^## (?:Calls|Inference)$", text, flags=re.M)[0]
    word = r"--([\w-]+)" if page == "openclip" else r"^(?:[a-z_]+\.)?([a-z_]+)(?==|$)"
    rows = []
    for theirs, ours in re.findall(r"^\| (.+?) \| (.+) \|$", of_settings, re.M):
        quoted = re.findall(r"`([^`]+)`", theirs)
        rows.append(([each.replace("-", "_") for part in quoted for each in re.findall(word, part)], ours))
    return rows


@pytest.mark.parametrize(("page", "least"), [("openclip", 60), ("flagai", 20)])
def test_the_words_of_a_migration_page_have_the_same_answer(page: str, least: int) -> None:
    checked = set()
    for theirs, ours in rows_of_page(page):
        for word in theirs:
            answer = words._find(word)
            keys = [word] if answer is None else [part.partition("=")[0] for part in parts(answer)]
            assert answer is not None or {word} & {*TrainConfig.model_fields, *NO_WORDS}, f"{word} is not in words.py"
            last = [key.rpartition(".")[2] for key in keys]
            assert not keys or word in NO_WORDS or any(key in ours for key in last), (
                f"{word}: {keys}, but the page has {ours}"
            )
            checked.add(word)
    assert len(checked) >= least


# Flags in the pages that belong to a launcher, or whose answer depends on another flag
NO_WORDS = {"nproc_per_node", "cpu_offload"}


GENERATED = ["Lightning", "lightning-hydra-template", "Hugging Face Trainer", "timm"]


def rows_of(framework: str) -> list[str]:
    """Return the rows of a framework's table in docs/coming_from_lightning.md."""
    rows = []
    for word, answer in FRAMEWORKS[framework].items():
        filled = [each.format(value="…") for each in answer.overrides]
        instead = " or ".join(f"`{each}`" for each in filled)
        note = f"{instead}. {answer.note}" if instead and answer.note else instead or answer.note
        rows.append(f"| `{word}` | {note} |")
    return rows


@pytest.mark.parametrize("framework", GENERATED)
def test_the_tables_of_other_frameworks_are_those_of_words(framework: str) -> None:
    text = (REPOSITORY / "docs" / "coming_from_lightning.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(framework)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section is not None
    assert [line for line in section[1].splitlines() if line.startswith("| `")] == rows_of(framework)


# --------------------------------------------------------------------------------------------------- names of options


@pytest.mark.parametrize(
    ("override", "exact"),
    [
        ("optimizer=AdamW", "optimizer=adamw"),
        ("optimizer=SGD", "optimizer=sgd"),
        ("model=ViT_B32", "model=vit_b32"),
        ("model=vit-b-32", "model=vit_b32"),
        ("model=rn50X4", "model=rn50x4"),
        ("strategy=DeepSpeed-Stage-2", "strategy=deepspeed_stage_2"),
        ("logger=[TensorBoard,WandB]", "logger=[tensorboard,wandb]"),
        ("data/augmentation=Strong", "data/augmentation=strong"),
        ("experiment=Pretrain-Shapes", "experiment=pretrain_shapes"),
    ],
)
def test_options_are_found_regardless_of_case_and_dashes(override: str, exact: str) -> None:
    assert train_config(override) == train_config(exact)


def test_names_of_models_are_found_regardless_of_case_and_dashes() -> None:
    assert resolve("vit-b/32") == resolve("ViT-B/32") == resolve("vit_b32")
    assert resolve("vit_b_32_QuickGELU") == resolve("ViT-B-32-quickgelu")
    assert resolve("vit_b_33") is None


def test_options_of_users_are_found_so_too_and_an_ambiguous_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("My_Slow", "two-ways", "two_ways"):
        path = tmp_path / "optimizer" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("_target_: torch.optim.SGD\nlr: 0.7\n")
    monkeypatch.setenv(registry.FOLDERS, str(tmp_path))
    assert train_config("optimizer=my-slow").optimizer.lr == 0.7
    assert train_config("optimizer=two-ways").optimizer.lr == 0.7
    with pytest.raises(
        ConfigError, match=r"^optimizer=Two_Ways is ambiguous: type optimizer=two-ways or optimizer=two_ways\.$"
    ):
        train_config("optimizer=Two_Ways")
    monkeypatch.setenv(registry.FOLDERS, "")
    searched = f"hydra.searchpath=[{tmp_path}]"
    assert train_config(searched, "optimizer=MY_SLOW").optimizer.lr == 0.7


# -------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--optimizer.lr=0.1 --max_steps=5 --data.train=x", "optimizer.lr=0.1 max_steps=5 data.train=x"),
        ("--model/image=timm --experiment=digits --model=vit_b32", "model/image=timm experiment=digits model=vit_b32"),
        ("--local_rank=0 a=1", "a=1"),
        ("--local-rank 0 a=1 --local-rank=1", "a=1"),
        ("a=1 -m b=2", "a=1 b=2 -m"),
        ("model=x --config-dir d y=z -cn c", "model=x y=z --config-dir d -cn c"),
        ("--info defaults a=1 --cfg=job", "a=1 --info defaults --cfg=job"),
        ("--info a=1", "a=1 --info"),
        ("-c job -p model --resolve seed=1", "seed=1 -c job -p model --resolve"),
    ],
)
def test_flags_are_read_wherever_they_stand(line: str, expected: str) -> None:
    assert read("train", line.split()) == expected.split()


def test_a_key_with_the_name_of_a_flag_of_hydra_is_a_key_if_it_has_a_value() -> None:
    assert read("evaluate", ["--run=outputs/x", "--run"]) == ["run=outputs/x", "--run"]


def test_a_positional_argument_is_found_next_to_flags() -> None:
    assert read("convert", ["--trust_pickle=true", "a.pt", "--cfg", "job"]) == [
        "trust_pickle=true", "file=a.pt", "--cfg", "job",
    ]  # fmt: skip


def shown(command, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("train.py", *arguments, cwd=tmp_path)


def test_the_command_of_a_sweep_agent_composes(command, tmp_path: Path) -> None:
    agent = shown(
        command, tmp_path, "--optimizer.lr=0.1", "--cfg", "job", "--local_rank=0", "--loss=sigmoid", "-p", "loss"
    )
    assert agent.returncode == 0, agent.stderr
    assert "name: sigmoid" in agent.stdout


def test_a_key_that_is_given_as_a_flag_must_have_an_effect(refused, tmp_path: Path) -> None:
    done = refused("train.py", "--callbacks.ema_every_n_steps=2", cwd=tmp_path)
    assert (done.returncode, "callbacks.ema_every_n_steps=2 has no effect" in done.stderr) == (2, True)


def test_the_model_of_a_custom_option_or_of_open_clip_has_any_name() -> None:
    assert train_config("model=open_clip", "model.name=ViT-B-32").model.name == "ViT-B-32"
    assert train_config("model=vit_tiny", "model.name=mine").model.name == "mine"


# ------------------------------------------------------------------------------------------------- length of the run


@pytest.mark.parametrize(
    ("overrides", "max_steps", "epochs"),
    [
        (("experiment=digits", "max_steps=5"), 5, None),
        (("debug=fdr", "epochs=3"), None, 3),
        (("experiment=digits", "debug=fdr", "epochs=3"), None, 3),
        (("debug=fdr", "max_steps=7"), 7, None),
        (("experiment=digits", "max_steps=null"), None, 30),
        (("experiment=digits", "max_steps=5", "epochs=null"), 5, None),
    ],
)
def test_the_typed_length_wins_over_that_of_a_recipe(
    overrides: tuple[str, ...], max_steps: int | None, epochs: float | None
) -> None:
    config = train_config(*overrides)
    assert (config.max_steps, config.epochs) == (max_steps, epochs)


def test_both_lengths_typed_are_an_error() -> None:
    config = train_config("experiment=digits", "max_steps=5", "epochs=2")
    assert broken_rules(config) == [
        "max_steps=5 and epochs=2 are both set: set only one (epochs=null or max_steps=null)."
    ]


def test_a_typo_is_answered_without_torch(command, tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\nfrom clip_exp.cli import run\n"
        "assert run('train', ['lr=1', 'batch_size=3']) == 2 and run('train', ['--lr', '1']) == 2\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = command(str(script), cwd=tmp_path, cold=True, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr


def test_words_import_neither_torch_nor_hydra(command, tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\nimport clip_exp.config.words\nassert not {'torch', 'hydra', 'omegaconf'} & {*sys.modules}\n"
    )
    done = command(str(script), cwd=tmp_path, cold=True, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr


def test_an_answer_is_quoted_for_the_shell() -> None:
    with pytest.raises(ConfigError) as caught:
        train_config("train=a b.csv")
    answer = re.search(r"type (.+)\.$", str(caught.value))
    assert answer is not None
    assert shlex.split(answer[1]) == ["data.train=a b.csv"]


def test_the_example_has_as_many_devices_as_it_says() -> None:
    assert f"global_batch_size={4 * DEVICES} on {DEVICES}" in str(words.answer("batch_size", 4, {"global_batch_size"}))


def test_groups_are_the_folders_of_conf() -> None:
    assert {"model", "experiment", "debug"} <= set(groups())
    assert all((conf_dir() / group).is_dir() for group in groups())


def test_a_flag_ends_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", ["--lr", "1", "--batch-size", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], len(lines)) == ("error:", 3)
