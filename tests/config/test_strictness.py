"""Tests that an invalid configuration ends with exit code 2 and one message with a hint, before torch is imported."""

import sys

import pytest

from clip_exp.cli import run
from clip_exp.config import targets
from clip_exp.config.command_line import quote
from clip_exp.config.compose import compose
from clip_exp.config.files import read_run_config, to_yaml
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.training.preflight import check_train
from tests.compose import compose_config, train_config

REFUSED = {
    "unknown option": (["model=vit_b23"], "did you mean 'vit_b32'"),
    "unknown group": (["optimzer=sgd"], "did you mean 'optimizer'"),
    "unknown key": (["data.trian=x"], "did you mean 'data.train'"),
    "Lightning's accumulation": (["trainer.accumulate_grad_batches=4"], "micro_batch_size"),
    "Lightning's accumulation at the top": (["accumulate_grad_batches=4"], "micro_batch_size"),
    "Lightning's accumulation with +": (["+trainer.accumulate_grad_batches=4"], "micro_batch_size"),
    "a group without options": (["trainer=default"], "set its keys (trainer.<key>=…)"),
    "a typo of a group without options": (["trainr=x"], "did you mean 'trainer'"),
    "unknown key with +": (["+data.trian=x"], "did you mean 'data.train'"),
    "unknown optimizer key": (
        ["optimizer.momentum=0.9"],
        "optimizer.momentum is a key of optimizer._target_=torch.optim.SGD",
    ),
    "unknown optimizer key with +": (["+optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
    "wrong type": (["seed=abc"], "seed"),
    "wrong type in an optimizer": (["optimizer.lr=fast"], "optimizer.lr"),
    "fraction for a count": (["global_batch_size=1.5"], "global_batch_size"),
    "unknown choice": (["loss.same_caption=maybe"], "positive, negative"),
    "unreadable override": (["model"], "key=value"),
    "no optimizer": (["optimizer=null"], "adamw"),
    "number for an option": (["strategy=3"], "ddp"),
    "key below an empty node": (["logger.wandb.project=x"], "logger=wandb"),
    "generated rows of a table": (["data=csv", "data.generate.rows=5"], "select data=digits"),
    "Hydra's rerun": (
        ["--experimental-rerun", "config.pickle"],
        "--experimental-rerun is not supported, since it executes code",
    ),
    "Hydra's rerun in one word": (["--experimental-rerun=config.pickle"], "--experimental-rerun is not supported"),
    "Hydra's rerun abbreviated": (["--exp=config.pickle"], "--experimental-rerun is not supported"),
    "folder in a bucket": (["output_dir=s3://bucket/runs"], "output_dir=s3://bucket/runs is a URL"),
}


@pytest.mark.parametrize(("arguments", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_override_ends_with_code_2_and_one_message(refused, tmp_path, arguments, expected) -> None:
    result = refused("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.startswith("error:")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_override_of_a_fresh_command_gives_no_traceback(command, tmp_path) -> None:
    result = command("train.py", "model=vit_b23", cwd=tmp_path, cold=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error:")
    assert "did you mean 'vit_b32'" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_composing_and_checking_import_neither_torch_nor_duckdb(command, tmp_path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\nfrom clip_exp.cli import run\n"
        "assert run('train', ['data.trian=1']) == 2 and run('train', ['global_batch_size=0']) == 2\n"
        "assert run('train', ['--cfg', 'job']) == 0\nassert not {'torch', 'duckdb'} & {*sys.modules}, 'torch or duckdb was imported'\n"
    )
    result = command(str(script), cwd=tmp_path, cold=True, PYTHONPATH=sys.path[0])
    assert result.returncode == 0, result.stderr


def test_all_problems_are_reported_at_once(tmp_path) -> None:
    config = train_config(
        "global_batch_size=7", "trainer.devices=2", "trainer.accelerator=cpu", "max_steps=10", "scheduler.warmup_steps=20",
        "data=csv", "data.train=missing.csv", "patience=3",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_train(config)
    message = str(caught.value)
    for part in (
        "multiple of the 2 processes",
        "warmup_steps=20 is longer",
        "missing.csv does not exist",
        "set monitor",
    ):
        assert part in message
    assert len(message.splitlines()) == 4


CROSS_FIELD = {
    "zero batch": (["global_batch_size=0"], "global_batch_size=0 must be greater than 0"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr"),
    "both lengths": (["max_steps=5", "epochs=2"], "set only one"),
    "missing table": (["data=csv", "data.train=no.csv"], "does not exist"),
    "no table": (["data=csv"], "data.train has no value"),
    "address as table": (["data=csv", "data.train=https://user:pw@host/x.csv"], "is a URL"),
    "more rows than there are": (["global_batch_size=100000"], "is more than the"),
    "warm-up longer than the epochs": (["epochs=1", "scheduler.warmup_steps=5000"], "longer than the run"),
    "average under ZeRO": (["strategy=deepspeed_stage_2", "callbacks=ema"], "callbacks.ema_decay"),
    "offload without Adam": (["strategy=deepspeed_stage_2_offload", "optimizer=sgd"], "CPU Adam"),
    "half precision on a CPU": (["precision=16-mixed", "trainer.accelerator=cpu"], "16-mixed"),
    "heads that do not divide": (["model.image.heads=3"], "multiple of model.image.heads"),
    "heads of a resnet that do not divide": (
        ["model=rn50", "model.image.heads=30"],
        "heads=30 must divide 2048, the channels",
    ),
    "layers of a resnet": (
        ["model=rn50", "model.image.layers=3"],
        "model.image.layers is a key of model.image.kind=siglip and of model.image.kind=vit, which is not selected",
    ),
    "a backbone's name of a tower of ours": (
        ["model.image.name=resnet18"],
        "model.image.name is a key of model.image.kind=open_clip and of model.image.kind=timm, which is not selected",
    ),
    "layers of an encoder": (
        ["model/text=huggingface", "model.text.name=x", "model.text.layers=2"],
        "model.text.layers is a key of model.text.kind=clip and of model.text.kind=siglip, which is not selected",
    ),
    "width of open_clip's": (
        ["model=open_clip", "model.name=ViT-B-32", "model.image.width=8"],
        "model.image.width is a key of",
    ),
    "a backbone's weights of a tower of ours": (["model.image.pretrained=true"], "which is not selected"),
    "odd name": (["name=a/b"], "not a valid folder name"),
    "long name": ([f"name={'x' * 300}"], "has 300 bytes, but at most 200 are allowed"),
    "long name in Chinese": ([f"name='{'猫' * 70}'"], "has 210 bytes"),
    "name with a line break": (['name="a\nb"'], r"name='a\nb' is not a valid folder name"),
    "name with a control character": (['name="a\x1bb"'], r"name='a\x1bb' is not a valid folder name"),
    "bad weights": (["pretrained=none.pt"], "none.pt does not exist"),
    "template without a place": (["data.templates=[photo]"], "must contain {}"),
    "no template": (["data.templates=[]"], "data.templates=[] must not be empty"),
    "not a number": (["optimizer.lr=nan"], "optimizer.lr=nan must be"),
    "infinite": (["optimizer.lr=inf"], "optimizer.lr=inf must be"),
    "negative clipping": (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1"),
    "clipping to nan": (["trainer.gradient_clip_val=nan"], "trainer.gradient_clip_val=nan"),
    "negative seed": (["seed=-1"], "seed=-1 must be"),
    "one beta": (["optimizer.betas=[0.9]"], "must have 2 values"),
    "no layers": (["model.text.layers=0"], "model.text.layers=0 must be greater than 0"),
    "no patch": (["model.image.patch_size=0"], "model.image.patch_size=0"),
    "small vocabulary": (["model.text.vocab_size=10"], "at least 49408"),
    "unknown profiler": (["trainer.profiler=foo"], "simple, advanced, pytorch"),
    "superscript devices": (["trainer.devices='²'"], "trainer.devices"),
    "listed CPUs": (["trainer.devices=[0,1]", "trainer.accelerator=cpu"], "lists GPUs"),
    "no average": (["callbacks.ema_every_n_steps=0"], "ema_every_n_steps=0"),
    "unknown metric": (["monitor=val/recal@1_i2t"], "did you mean 'val/recall@1_i2t'"),
    "name of a metric in older versions": (["monitor=val/zeroshot_top1"], "did you mean 'val/top1'?"),
    "name of an option in older versions": (["finetune=linear_probe"], "set finetune=lp_ft"),
    "name of a key in older versions": (["finetune.linear_probe_steps=3"], "type finetune.freeze_towers_steps=3."),
    "labels that are not there": (["data=shapes", "monitor=val/top1"], "data.label_key"),
    "bias of a softmax": (["loss.init_logit_bias=1"], "of loss.name=sigmoid, which is not selected"),
    "crop larger than the image": (["data.augmentation.scale=[0.5,2]"], "at most 1"),
    "flip more often than always": (["data.augmentation.horizontal_flip=2"], "must be at most 1"),
    "empty path among sources": (["data=csv", "data.train=[{path: a.csv},'']"], "data.train[1]= must not be empty"),
    "folder as a table": (
        ["data=csv", "data.train=tests/config"],
        "data.train: The folder tests/config has neither tables nor images",
    ),
    "pattern that finds nothing": (["data=csv", "data.train=*.none"], "data.train: The table *.none matches no file"),
    "no blocks": (["data.shuffle_block=0"], "data.shuffle_block=0 must be greater than 0"),
    "no window": (["data.shuffle_window=0"], "data.shuffle_window=0 must be greater than 0"),
    "format that nobody reads": (["data.image_formats=[JPGG]"], "data.image_formats: "),
    "no bytes": (["data.max_image_bytes=0"], "data.max_image_bytes=0 must be greater than 0"),
    "filter that is not a condition": (["data.filter='width >'"], "data.filter='width >' is not a valid condition"),
    "no time": (["strategy.timeout_s=0"], "strategy.timeout_s=0"),
}


@pytest.mark.parametrize(("overrides", "expected"), CROSS_FIELD.values(), ids=CROSS_FIELD.keys())
def test_values_that_contradict_each_other_are_refused(overrides, expected) -> None:
    with pytest.raises(ConfigError, match=None) as caught:
        check_train(train_config(*overrides))
    assert expected in str(caught.value)


URLS = [
    ("train", "output_dir=s3://bucket/runs", "output_dir=/local/path"),
    ("train", "output_dir=file:///scratch/runs", "output_dir=/scratch/runs"),
    ("train", "resume=gs://bucket/run", "resume=/local/path"),
    ("train", "data.val=[a.csv,hdfs://host/b.csv]", "data.val=/local/path"),
    ("train", "data.train=[{path: s3://b/c.csv, weight: 1}]", "data.train.path=/local/path"),
    ("train", "data.image_root=s3://bucket/images", "data.image_root=/local/path"),
    ("train", "+task.t.root=s3://bucket/images", "task.t.root=/local/path"),
    ("evaluate", "run=s3://bucket/run", "run=/local/path"),
    ("evaluate", "+task.t.train.table=s3://bucket/a.csv", "task.t.train.table=/local/path"),
    ("predict", "images=[a.jpg,https://host/b.jpg]", "images=/local/path"),
    ("search", "index=s3://bucket/a.index", "index=/local/path"),
    ("export", "output=simplecache::s3://bucket/model", "output=/local/path"),
    ("check-data", "output_dir=s3://bucket", "output_dir=/local/path"),
    ("embed", "output=s3://bucket/features", "output=/local/path"),
    ("make-shards", "output=s3://bucket/shards", "output=/local/path"),
]


@pytest.mark.parametrize(("command", "override", "expected"), URLS)
def test_a_url_is_refused_as_a_path(command: str, override: str, expected: str) -> None:
    group = ["data=csv"] if "data." in override else ["task.t.kind=knn"] if "task.t." in override else []
    with pytest.raises(ConfigError, match=f"is a URL, .*set {expected}"):
        compose(command, [*group, override])


def test_a_url_is_accepted_where_clip_exp_reads_no_path() -> None:
    config = train_config("pretrained=https://host/x", "logger.extra.mlflow={_target_: x, path: 'http://host'}")
    assert (config.pretrained, config.logger.extra["mlflow"].arguments) == ("https://host/x", {"path": "http://host"})


def test_requesting_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="finds no GPU"):
        check_train(train_config("trainer.accelerator=gpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="requests 4 GPUs, but this machine has 2"):
        check_train(train_config("trainer.accelerator=gpu", "trainer.devices=4"))


def test_a_configuration_survives_its_yaml(tmp_path) -> None:
    config = train_config("optimizer=lion", "max_steps=7", "callbacks=ema", "logger=tensorboard", "data=shapes")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: &a [1]\nb: &b [*a, *a]\nmodel: [*b, *b]", "it has aliases"),
        ("name: x\n" + "# \n" * 400_000, "it has 1,200,008 bytes"),
        ("- a", "it is not a mapping"),
        ("model: [", "while parsing"),
        ("[" * 1200 + "]" * 1200, "recursion"),
    ],
)
def test_a_run_folder_with_an_invalid_configuration_is_refused(tmp_path, content: str, problem: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.yaml is not a valid configuration: .*{problem}"):
        read_run_config(tmp_path)


def test_a_message_has_no_control_characters(capsys) -> None:
    assert run("models", ["+\x1b[2J=1"]) == 2
    output = capsys.readouterr().err
    assert "\\x1b[2J" in output
    assert output.replace("\n", "").isprintable()


def test_every_default_is_written_out() -> None:
    config = train_config()
    assert (config.max_steps, config.epochs) == (None, 30)


@pytest.mark.parametrize(
    "value",
    [
        "/data/a=b/x.csv",
        "/data/一只 猫.csv",
        "/data/a (1).csv",
        "shard-{000..009}.tar",
        "it's.csv",
        "a, b.csv",
        r"C:\data\x.csv",
    ],
)
def test_values_outside_hydras_grammar_are_unchanged(value: str) -> None:
    assert compose_config("data=csv", f"data.train={value}").data.train == value


@pytest.mark.parametrize(
    "condition",
    [
        "width >= 256 AND split = 'train'",
        "title LIKE '%dog%' OR width / height BETWEEN 0.5 AND 2",
        "kind IN ('photo', 'it''s') AND \"aspect ratio\" <> 1",
        "contains(title, 'a, b = {c} [d]')",
        r"regexp_matches(title, '^\d+\s\$')",
        "NOT ok",
    ],
)
def test_a_filter_is_read_as_typed(condition: str) -> None:
    assert compose_config("data=csv", f"data.filter={condition}").data.filter == condition


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[a dog,a cat]", ["a dog", "a cat"]),
        ("[a (small, brown) dog, it's a cat!]", ["a (small, brown) dog", "it's a cat!"]),
        ("[一只狗,x=1,50% off; now,]", ["一只狗", "x=1", "50% off; now"]),
        ("[\"a dog, running\",'it is 5, ok',猫]", ["a dog, running", "it is 5, ok", "猫"]),
        ("[a photo of a {}.,{}]", ["a photo of a {}.", {}]),
        ("[img[0-9].jpg,b (1).jpg]", ["img[0-9].jpg", "b (1).jpg"]),
        ("[sad :(,happy]", ["sad :(", "happy"]),
    ],
)
def test_lists_are_parsed_as_typed(typed: str, expected: list) -> None:
    assert compose_config(f"texts={typed}", command="predict").texts == expected


def test_quoting_leaves_lists_numbers_and_sweeps_alone() -> None:
    overrides = ["data.augmentation.scale=[0.5,1.0]", "seed=3", "optimizer.lr=1e-3,3e-4"]
    assert quote(overrides, sweeping=True) == overrides


def test_a_target_that_runs_commands_or_does_not_exist_is_refused() -> None:
    from torch import nn

    from clip_exp.training.optim import build_optimizer

    model = nn.Linear(2, 2)
    for target, expected in (
        ("os.system", "blocklisted"),
        ("torch.optim.AdmW", "did you mean 'AdamW'"),
        ("pytorch_lightning.cli.os.system", "pytorch_lightning.cli has no os|blocklisted|cannot be imported"),
    ):
        config = train_config("optimizer=custom", f"optimizer._target_={target}", "optimizer.lr=1")
        with pytest.raises(ConfigError, match=expected):
            build_optimizer(model, config.optimizer)


def test_an_argument_that_a_target_lacks_is_refused_by_name() -> None:
    config = train_config(
        "optimizer=custom", "optimizer._target_=torch.optim.RAdam", "optimizer.lr=1", "optimizer.epsilon=1"
    )
    assert list(targets.problems(config)) == [
        "optimizer.epsilon is not an argument of torch.optim.RAdam: did you mean 'eps'?"
    ]


def test_an_extra_callback_without_a_target_and_an_unknown_schedule_are_refused() -> None:
    from torch import nn

    from clip_exp.training.optim import build_optimizer, build_scheduler

    with pytest.raises(ConfigError, match=r"callbacks\.extra\.x\._target_ has no value"):
        train_config("callbacks.extra.x={foo: 1}")
    config = train_config("scheduler._target_=clip_exp.training.schedule.factor")
    with pytest.raises(ConfigError, match="must be a function that maps the completed fraction"):
        build_scheduler(build_optimizer(nn.Linear(2, 2), config.optimizer), config.scheduler, 10)


def test_words_and_paths_are_not_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_KEY", "filepath")
    monkeypatch.setenv("KEY_DIR", "/data/keys1")
    check_train(train_config("output_dir=/data/keys1"))


def test_deepspeeds_own_keys_reach_its_configuration() -> None:
    import torch

    from clip_exp.training.fit import build_strategy

    config = train_config(
        "strategy=deepspeed_stage_2", "+strategy.config.zero_optimization.reduce_bucket_size=1000000"
    ).strategy
    strategy = build_strategy(config, torch.device("cpu"))
    assert strategy.config["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert strategy.config["zero_optimization"]["stage"] == 2


def test_a_custom_option_is_found_in_the_users_folder(command, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [vit_nano]\nname: mine\n")
    result = command(
        "train.py", "--config-dir", str(tmp_path), "model=mine", "--cfg", "job", "--package", "model", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "name: mine" in result.stdout
