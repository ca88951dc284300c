"""ImageNet datasets with a supervised network, compared with torchvision called directly."""

import json
import shutil
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from clip_exp.config.base import parse
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.data.images import normalize
from clip_exp.errors import CheckpointError, ClipExpError, ConfigError
from clip_exp.evaluation import classification
from clip_exp.evaluation.features import EncodeOptions
from clip_exp.evaluation.launch import check, evaluate
from clip_exp.evaluation.sets.class_names import class_set, imagenet_classes
from clip_exp.evaluation.tasks.robustness.supervised import Preset, load_supervised, restrict
from tests.small_runs import write_image

SETS = ("imagenet", "imagenet_v2", "imagenet_r", "objectnet", "imagenet_sketch", "imagenet_a")
CPU = EncodeOptions(torch.device("cpu"))
WEIGHTS = models.ResNet18_Weights.IMAGENET1K_V1
CHAIRS, LAMP = [423, 559, 765], 846  # of ImageNet-1k: barber chair, folding chair, rocking chair; table lamp


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    torch.nn.init.normal_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias)
    return model


@pytest.fixture
def weights(tmp_path: Path, resnet: torch.nn.Module) -> str:
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    return str(tmp_path / "resnet18.pth")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with all six datasets under their usual names, with a few images each, some of which the network classifies correctly."""
    root = tmp_path / "data"
    wnids = [wnid for wnid, _ in imagenet_classes()]
    write_set(root / "ImageNet/val", [*wnids[:2], wnids[657]], 0)
    write_set(root / "imagenetv2-matched-frequency-format-val", ["7", "12", "999"], 20)
    write_set(root / "imagenet-r", class_set("imagenet_r").wnids[5:8], 40)
    write_set(root / "imagenet_a", class_set("imagenet_a").wnids[100:103], 60)
    write_set(root / "sketch", wnids[500:503], 80)
    write_set(root / "objectnet-1.0/images", ["chair", "lamp"], 100)
    write_mappings(root / "objectnet-1.0/mappings")
    return root


def write_set(folder: Path, classes: list[str], seed: int) -> None:
    for position, name in enumerate(classes):
        for number in range(3):
            write_image(folder / name / f"{number}.png", seed + 3 * position + number, (50 + 10 * number, 60))


def write_mappings(folder: Path) -> None:
    """Write the four mappings of ObjectNet for two classes, one of which has three ImageNet classes."""
    folder.mkdir(parents=True)
    labels = {CHAIRS[0]: "barber chair", CHAIRS[1]: "folding chair", CHAIRS[2]: "rocking chair", LAMP: "table lamp"}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps({"chair": "Chair", "lamp": "Desk lamp"}))
    overlap = {"Chair": "folding chair; barber chair; rocking chair", "Desk lamp": "table lamp"}
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(
        json.dumps({str(index): line for line, index in enumerate(labels)})
    )
    (folder / "imagenet_to_label_2012_v2").write_text("\n".join(labels.values()) + "\n")


def config(tmp_path: Path, run_dir: Path, values: dict, **others) -> EvaluateConfig:
    task = {"robustness": {"kind": "robustness", "templates": "a {}.", "baseline": "resnet18", **values}}
    output = str(tmp_path / "outputs")
    settings = {"accelerator": "cpu", "num_workers": 0, "output_dir": output, "task": task, **others}
    return parse(EvaluateConfig, {"run": str(run_dir), **settings})


def direct_logits(model: torch.nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = WEIGHTS.transforms()
    with torch.no_grad():
        return torch.stack([model(transform(Image.open(path).convert("RGB"))[None])[0] for path in paths])


def move_to_best(model: torch.nn.Module, folder: Path, classes: dict[str, list[int]]) -> float:
    """Move every second image to the class that the network predicts; return its accuracy then."""
    right = 0
    paths = sorted(folder.glob("*/*.png"))
    logits = direct_logits(model, paths)
    scores = torch.stack([logits[:, indices].amax(dim=1) for indices in classes.values()])
    best = [list(classes)[row] for row in scores.argmax(dim=0).tolist()]
    for position, (path, name) in enumerate(zip(paths, best, strict=True)):
        if position % 2 == 0:
            (folder / name).mkdir(exist_ok=True)
            path = path.rename(folder / name / f"{position}_{path.name}")
        right += path.parent.name == name
    for leftover in folder.iterdir():
        if not any(leftover.iterdir()):
            leftover.rmdir()
    return right / len(paths)


def test_datasets_are_scored_next_to_the_network_as_torchvision_scores_it(
    tmp_path: Path, run_dir: Path, root: Path, resnet: torch.nn.Module, weights: str
):
    wnids = [wnid for wnid, _ in imagenet_classes()]
    everything = {wnid: [index] for index, wnid in enumerate(wnids)}
    subset = {
        name: dict(zip(class_set(name).wnids, [[index] for index in class_set(name).indices], strict=True))
        for name in ("imagenet_a", "imagenet_r")
    }
    expected = {
        "imagenet": move_to_best(resnet, root / "ImageNet/val", everything),
        "imagenet_v2": move_to_best(
            resnet, root / "imagenetv2-matched-frequency-format-val", {str(index): [index] for index in range(1000)}
        ),
        "imagenet_r": move_to_best(resnet, root / "imagenet-r", subset["imagenet_r"]),
        "objectnet": 0.0,
        "imagenet_sketch": move_to_best(resnet, root / "sketch", everything),
        "imagenet_a": move_to_best(resnet, root / "imagenet_a", subset["imagenet_a"]),
    }
    shutil.rmtree(root / "objectnet-1.0")
    values = {"root": str(root), "baseline_weights": weights, "sets": {"objectnet": None}}
    alone = {
        name: {"kind": "zero_shot", "root": str(folder), "templates": "a {}.", "classes": classes}
        for name, folder, classes in (
            ("imagenet", root / "ImageNet/val", "imagenet"),
            ("imagenet_r", root / "imagenet-r", "imagenet_r"),
        )
    }
    settings = config(tmp_path, run_dir, values)
    settings.task.update(parse(EvaluateConfig, {"task": alone}).task)
    results = evaluate(settings)
    metrics = results["robustness"]["metrics"]
    given = [name for name in SETS if name != "objectnet"]
    assert {name: metrics[f"resnet18/{name}/top1"] for name in given} == pytest.approx(
        {name: expected[name] for name in given}
    )
    assert min(expected[name] for name in given) > 0
    shifted = [expected[name] for name in given if name != "imagenet"]
    assert metrics["resnet18/mean_of_shifted/top1"] == pytest.approx(sum(shifted) / 4)
    own = [metrics[f"{name}/top1"] for name in given if name != "imagenet"]
    assert metrics["mean_of_shifted/top1"] == pytest.approx(sum(own) / 4)
    protocol = results["robustness"]["protocol"]
    assert list(protocol["sets"]) == given
    assert (protocol["images"], protocol["sets"]["imagenet"]["classes"]) == (45, 1000)
    assert protocol["baseline"]["weights"] == str(Path(weights).resolve())
    for name in alone:
        assert metrics[f"{name}/top1"] == results[name]["metrics"]["top1"]
        assert protocol["sets"][name]["classes_sha256"] == results[name]["protocol"]["classes_sha256"]


def test_objectnet_takes_the_best_of_the_imagenet_classes_of_a_label(
    tmp_path: Path, run_dir: Path, root: Path, resnet: torch.nn.Module, weights: str
):
    images = root / "objectnet-1.0/images"
    framed = sorted(images.glob("*/*.png"))
    transform = WEIGHTS.transforms()
    with torch.no_grad():
        logits = torch.stack(
            [
                resnet(transform(image.convert("RGB").crop((2, 2, image.width - 2, image.height - 2)))[None])[0]
                for image in map(Image.open, framed)
            ]
        )
    chair = logits[:, CHAIRS].amax(dim=1) > logits[:, LAMP]
    expected = [path.parent.name == ("chair" if best else "lamp") for path, best in zip(framed, chair, strict=True)]
    sets = {name: None for name in SETS if name != "objectnet"}
    values = {"root": str(root), "baseline_weights": weights, "sets": sets}
    result = evaluate(config(tmp_path, run_dir, values))["robustness"]
    assert result["metrics"]["resnet18/objectnet/top1"] == pytest.approx(sum(expected) / 6)
    assert result["protocol"]["mean_of"] == ["objectnet"]


def test_restricted_logits_are_the_best_of_each_class_and_leave_out_logits_of_no_class():
    logits = torch.tensor([[1.0, 5.0, 3.0, 9.0], [4.0, 2.0, 8.0, 9.0]])
    restricted = restrict(logits, [[1], [0, 2], []])
    assert restricted.tolist() == [[5.0, 3.0, -torch.inf], [2.0, 8.0, -torch.inf]]


def test_a_name_is_embedded_once_for_all_datasets(
    tmp_path: Path, run_dir: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    built: list[str] = []
    build = classification.build_classifier

    def spy(model, tokenizer, class_names, *rest, **others):
        built.extend(class_names)
        return build(model, tokenizer, class_names, *rest, **others)

    monkeypatch.setattr("clip_exp.evaluation.evaluated_model.build_classifier", spy)
    evaluate(config(tmp_path, run_dir, {"root": str(root), "baseline": None}, cache_gb=0.0))
    assert built[:1000] == [name for _, name in imagenet_classes()]
    assert len(built) == 1002, "ObjectNet has two names of its own here"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(300, 200), (61, 400), (31, 17), (224, 256)])
def test_pixels_are_those_of_torchvisions_preset(tmp_path: Path, mode: str, size: tuple[int, int]):
    image = Image.open(write_image(tmp_path / "1.png", 3, size)).convert(mode)
    expected = WEIGHTS.transforms()(image.convert("RGB"))
    pixels = Preset(256, 224, "bilinear")(image)
    assert torch.equal(normalize(pixels[None], WEIGHTS.transforms().mean, WEIGHTS.transforms().std)[0], expected)


def test_a_file_under_a_published_name_has_those_weights_own_preprocessing(tmp_path: Path):
    torch.manual_seed(0)
    model = models.mobilenet_v3_small(weights=None).eval()
    published = models.MobileNet_V3_Large_Weights.IMAGENET1K_V2
    large = models.mobilenet_v3_large(weights=None).eval()
    name = Path(published.url).name
    torch.save(large.state_dict(), tmp_path / name)
    save_file(large.state_dict(), tmp_path / "mine.safetensors")
    image = Image.open(write_image(tmp_path / "1.png", 3, (300, 260)))
    for file, transforms in (
        (name, published.transforms()),
        ("mine.safetensors", models.MobileNet_V3_Large_Weights.IMAGENET1K_V1.transforms()),
    ):
        encoder = load_supervised("mobilenet_v3_large", str(tmp_path / file), "task.robustness", CPU).encoder
        with torch.no_grad():
            expected = large(transforms(image)[None])
        assert torch.allclose(encoder.encode(encoder.transform(image)[None]), expected, atol=1e-6)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match=r"small\.pth does not fit torchvision's mobilenet_v3_large"):
        load_supervised("mobilenet_v3_large", str(tmp_path / "small.pth"), "task.robustness", CPU)


def test_weights_downloaded_by_torchvision_are_used_by_name_without_a_network(
    tmp_path: Path, resnet: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(resnet.state_dict(), tmp_path / "hub/checkpoints" / Path(WEIGHTS.url).name)
    baseline = load_supervised("resnet18", "IMAGENET1K_V1", "task.robustness", CPU)
    path = Path(write_image(tmp_path / "1.png", 3, (300, 260)))
    pixels = baseline.encoder.transform(Image.open(path))
    assert torch.allclose(baseline.encoder.encode(pixels[None]), direct_logits(resnet, [path]), atol=1e-5)
    assert baseline.about["weights_url"] == WEIGHTS.url
    (tmp_path / "hub/checkpoints" / Path(WEIGHTS.url).name).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"resnet18 cannot be downloaded .*resnet18-f37072fd\.pth or read"):
        load_supervised("resnet18", "IMAGENET1K_V1", "task.robustness", CPU)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_transform_their_input_do_so(tmp_path: Path, name: str):
    torch.manual_seed(0)
    direct = models.get_model(name, weights=None, transform_input=True, init_weights=False).eval()
    torch.save(direct.state_dict(), tmp_path / "weights.pth")
    encoder = load_supervised(name, str(tmp_path / "weights.pth"), "task.robustness", CPU).encoder
    image = Image.open(write_image(tmp_path / "1.png", 3, (300, 360)))
    with torch.no_grad():
        expected = direct(models.get_model_weights(name).IMAGENET1K_V1.transforms()(image)[None])
    assert torch.allclose(encoder.encode(encoder.transform(image)[None]), expected, atol=1e-5)


def test_without_a_network_one_message_has_the_file_and_the_alternative(
    tmp_path: Path, run_dir: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    def unreachable(*_, **__):
        raise URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(CheckpointError) as caught:
        evaluate(config(tmp_path, run_dir, {"root": str(root)}))
    message = str(caught.value)
    assert message.startswith(
        "task.robustness: the weights of resnet18 cannot be downloaded from https://download.pytorch"
    )
    assert "name resolution" in message
    assert "task.robustness.baseline_weights=FILE" in message
    assert message.endswith("task.robustness.baseline=null.")
    assert not list(tmp_path.rglob("eval/*.json"))


@pytest.mark.parametrize(
    ("values", "error", "messages"),
    [
        ({}, ConfigError, ["task.robustness.root has no value", *SETS, "task.robustness.sets.imagenet=null"]),
        (
            {"root": "{tmp}/some", "sets": {"imagenet": {"root": "{tmp}/data/ImageNet/val"}}},
            ConfigError,
            [
                "task.robustness.root={tmp}/some does not contain imagenet_v2 (imagenetv2-matched-frequency-format-val",
                "; objectnet (objectnet-1.0 or objectnet); ",
                "task.robustness.sets.imagenet_v2.root=DIR",
                "task.robustness.sets.imagenet_v2=null",
            ],
        ),
        (
            {"root": "{tmp}/data", "sets": {"imagenet": "{tmp}/data"}},
            ConfigError,
            [
                "task.robustness.sets.imagenet={tmp}/data must be a mapping: set its keys (task.robustness.sets.imagenet."
            ],
        ),
        (
            {"sets": {"imagenet_x": {}}},
            ConfigError,
            ["task.robustness.sets.imagenet_x does not exist: did you mean 'imagenet_"],
        ),
        ({"sets": dict.fromkeys(SETS)}, ConfigError, ["leaves out all datasets"]),
        ({"sets": {"imagenet": {"rot": "x"}}}, ConfigError, ["task.robustness.sets.imagenet.rot does not exist"]),
        (
            {"root": "{tmp}/data", "sets": {"imagenet": {"ground_truth": "{tmp}/absent.txt", "split": "val"}}},
            ConfigError,
            [
                "data/ImageNet/val contains no images directly. One folder per class needs no ground_truth",
                "task.robustness.sets.imagenet.split=val has no effect without",
            ],
        ),
        (
            {"root": "{tmp}/data", "sets": {"imagenet": {"root": "{tmp}/absent"}}},
            ConfigError,
            ["task.robustness.sets.imagenet.root={tmp}/absent: no such folder"],
        ),
        (
            {"root": "{tmp}/data", "sets": {"imagenet": {"root": "{tmp}/some", "classes": "labels"}}},
            ConfigError,
            [
                "task.robustness.sets.imagenet.classes cannot be matched with ImageNet's 1,000 classes",
                "task.robustness.baseline=null",
            ],
        ),
        (
            {"root": "{tmp}/data", "baseline_weights": "{tmp}/absent.pth"},
            ConfigError,
            ["task.robustness.baseline_weights={tmp}/absent.pth: no such file"],
        ),
    ],
)
def test_invalid_settings_are_reported_before_the_model_is_loaded(
    tmp_path: Path, run_dir: Path, root: Path, values: dict, error: type[ClipExpError], messages: list[str]
):
    write_image(tmp_path / "some" / "sparrow" / "1.png", 1)
    filled = json.loads(json.dumps(values).replace("{tmp}", str(tmp_path)))
    with pytest.raises(error) as caught:
        check(config(tmp_path, run_dir, filled))
    for message in messages:
        assert message.replace("{tmp}", str(tmp_path)) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baseline": "resnet118"}, "task.robustness.baseline=resnet118 does not exist: did you mean 'resnet18'?"),
        ({"baseline_weights": "IMAGENET1K_V3"}, "must be a file, or weights of resnet18 (IMAGENET1K_V1)"),
    ],
)
def test_an_unknown_network_is_reported_before_anything_is_encoded(
    tmp_path: Path, run_dir: Path, root: Path, values: dict, message: str
):
    with pytest.raises(ConfigError) as caught:
        evaluate(config(tmp_path, run_dir, {"root": str(root), **values}))
    assert message in str(caught.value)
    assert not (tmp_path / "outputs/cache").exists()
