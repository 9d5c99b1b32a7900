"""What a file or a prompt of somebody else's may try; nothing in it is ever run."""

import contextlib
import io
import json
import pickle
import struct
import zlib
from functools import partial
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_published import meissonic_folder
from tiny_text import amused_folder

from distill.config import load_config
from distill.jobs.student import StudentJob, load_teacher
from distill.methods.dimo import DiMOConfig
from eval import inception
from teachers import MaskedDiffusionPipeline
from teachers.conditions.prompts import PromptConfig, clean_prompts, load_prompts
from teachers.data import DataConfig, load_data
from teachers.released.checkpoint import read_checkpoint

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


class Attack:
    """Unpickled by a careless reader, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def folder(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def refused(folder, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_teacher(str(folder))


def test_a_pickle_in_place_of_weights_is_not_opened(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    with (folder / "denoiser" / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump({"weights": Attack(tmp_path / "made")}, file)
    refused(folder, "safetensors")
    with pytest.raises(ValueError, match=r"refused|cannot be read"):
        read_checkpoint(str(folder / "denoiser" / "diffusion_pytorch_model.bin"))
    assert not (tmp_path / "made").exists()


def lying_offsets():
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}
    return with_header(json.dumps(header).encode())


def overlapping_offsets():
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return with_header(json.dumps({"a": entry, "b": entry}).encode())


def with_header(header):
    return struct.pack("<Q", len(header)) + header + bytes(16)


HOSTILE_SAFETENSORS = {
    "offsets past the end": lying_offsets(),
    "offsets that overlap": overlapping_offsets(),
    "a header of a gigabyte": struct.pack("<Q", 1 << 30) + b"{" + bytes(1000),
    "a header of more than there is": struct.pack("<Q", (1 << 63) - 1) + b"{}",
    "nothing": b"",
    "a header that nests": with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
}


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS.keys())
def test_safetensors_that_lie_are_refused(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "denoiser|load|Error|header")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(str(folder / WEIGHTS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    weights = load_file(folder / WEIGHTS)
    weights["output_bias"][0, 3] = value
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, "not finite numbers: output_bias")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("denoiser", ["evil", "Network"]),
        ("denoiser", ["evil", "MaskGITTransformer"]),
        ("denoiser", ["teachers.evil", "Network"]),
        ("denoiser", ["diffusers", "UNet2DModel"]),
        ("denoiser", ["teachers.released.checkpoint", "read_checkpoint"]),
        ("sampler", ["os", "system"]),
        ("../outside", ["teachers.networks.maskgit", "MaskGITTransformer"]),
        ("/etc", ["teachers.networks.maskgit", "MaskGITTransformer"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
    ],
)
def test_an_index_that_names_other_classes_or_places_is_refused(folder, tmp_path, monkeypatch, name, entry):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Network: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: entry}))
    refused(folder, "model_index.json is refused")
    assert not (tmp_path / "imported").exists()


def saved_again(path):
    MaskedDiffusionPipeline.from_pretrained(amused_folder(path.with_name("amused"))).save_pretrained(path)
    return path


TEXT_LAYOUTS = {"amused": amused_folder, "monetico": partial(meissonic_folder, resampling=False), "ours": saved_again}
NETWORKS = [(layout, part) for layout in ("amused", "monetico") for part in ("transformer", "vqvae", "text_encoder")]
NETWORKS += [("ours", part) for part in ("denoiser", "tokenizer", "text_encoder")]


@pytest.fixture
def text_folder(request, tmp_path):
    """A teacher of text in a layout, and the file with the weights of one of its networks."""
    layout, part = request.param
    folder = TEXT_LAYOUTS[layout](tmp_path / "teacher")
    (weights,) = (folder / part).glob("*.safetensors")
    return folder, weights


every_network = pytest.mark.parametrize("text_folder", NETWORKS, ids="-".join, indirect=True)


@every_network
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_of_any_network_that_are_no_numbers_are_refused(text_folder, value):
    folder, path = text_folder
    weights = load_file(path)
    key = max(weights)
    weights[key].flatten()[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    refused(folder, rf"not finite numbers: (\w+\.)?{key}")


@every_network
def test_a_pickle_in_place_of_any_network_s_weights_is_not_opened(text_folder):
    folder, path = text_folder
    name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
    torch.save(load_file(path), path.with_name(name))
    path.unlink()
    refused(folder, "safetensors")


@every_network
def test_damaged_weights_of_any_network_are_refused(text_folder):
    folder, path = text_folder
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"cannot be read|Unable to load")


@pytest.mark.parametrize(
    "text_folder", [case for case in NETWORKS if case[1] != "text_encoder"], ids="-".join, indirect=True
)
def test_missing_weights_are_named(text_folder):
    folder, path = text_folder
    weights = load_file(path)
    key = max(weights)
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    refused(folder, rf"has no weights (\w+\.)?{key}")


@pytest.mark.parametrize("layout", ["amused", "monetico"])
@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("transformer", ["evil", "Network"]),
        ("transformer", ["evil", "UVit2DModel"]),
        ("vqvae", ["diffusers", "AutoencoderKL"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("scheduler", ["os", "system"]),
        ("../outside", ["diffusers", "VQModel"]),
    ],
)
def test_an_index_of_a_published_layout_that_names_other_classes_is_refused(tmp_path, layout, name, entry):
    folder = TEXT_LAYOUTS[layout](tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: entry}))
    refused(folder, "model_index.json is refused")


@pytest.mark.parametrize("layout", ["amused", "monetico"])
@pytest.mark.parametrize("part", ["transformer", "vqvae"])
@pytest.mark.parametrize("name", ["UNet2DModel", None])
def test_a_published_configuration_of_another_class_is_refused(tmp_path, layout, part, name):
    path = TEXT_LAYOUTS[layout](tmp_path / "teacher") / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    refused(tmp_path / "teacher", f"{part}/config.json is refused: it names diffusers.{name}")


def test_code_beside_the_weights_is_not_imported(folder, tmp_path):
    files = ("pipeline", "MaskGITTransformer", "modeling", "__init__", "None", "teachers", "one_step_mdm.teachers")
    for place in (folder, folder / "denoiser", folder / "tokenizer", folder / "sampler"):
        for name in (*files, "teachers.samplers", "one_step_mdm.teachers.samplers"):
            (place / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    MaskedDiffusionPipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "MaskedDiffusionPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(folder, "holds a")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "text",
    [
        "output: !!python/object/apply:os.system ['touch made']",
        "output: !!python/object/new:pathlib.Path [made]",
        "!!python/name:os.system : 1",
        "training: !!python/tuple [1]",
    ],
)
def test_yaml_makes_no_objects(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ValueError, match="not a YAML file of settings"):
        load_config(StudentJob, tmp_path / "job.yaml")
    assert not (tmp_path / "made").exists()


def png_of(width, height):
    """A grey PNG of that size in a few hundred kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def small_image():
    file = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "image", [png_of(40_000, 40_000), small_image()[:45], b"no image"], ids=["bomb", "torn", "text"]
)
def test_an_image_that_cannot_be_taken_is_named(tmp_path, image):
    rows = {"image": [{"bytes": small_image(), "path": None}, {"bytes": image, "path": None}], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = load_data(DataConfig(name=str(tmp_path)))
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        data.images()


HOSTILE_PROMPT = "a car\x1b]0;title\x07\x1b[31m \x00\ud800 on fire\r\nEOF"


def test_control_characters_of_prompts_are_spaces(tmp_path):
    (prompt,) = clean_prompts([HOSTILE_PROMPT])
    assert prompt == "a car ]0;title [31m   on fire EOF"
    assert clean_prompts(["family \U0001f468\u200d\U0001f469, caf\u00e9"]) == [
        "family \U0001f468\u200d\U0001f469, caf\u00e9"
    ]
    datasets.Dataset.from_dict({"text": ["a\x1b[2Jb"]}).to_parquet(tmp_path / "prompts.parquet")
    assert load_prompts(PromptConfig(str(tmp_path / "prompts.parquet"))) == ["a [2Jb"]


def test_inception_weights_of_another_hash_are_not_opened(tmp_path, monkeypatch):
    """They are TorchScript, which runs when it is opened; clean-fid would take them from /tmp as they are."""
    monkeypatch.setattr(inception, "InceptionV3W", lambda *arguments, **settings: pytest.fail("it was opened"))
    (tmp_path / inception.WEIGHTS).write_bytes(b"what somebody put there")
    with pytest.raises(ValueError, match="is refused"):
        inception.InceptionFeatures(tmp_path)


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "teacher",
    "training",
    "training.num_steps",
    "training.batch_size",
    "method",
    "method.name",
    "method.beta",
    "auxiliary_learning_rate",
    "alarms.lowest_token_entropy",
    "initial.mask_ratio",
]


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(KEYS) | words, value=values)
def test_any_override_is_taken_or_is_a_value_error(key, value):
    try:
        job = load_config(StudentJob, overrides=[f"{key}={json.dumps(value)}"])
    except ValueError:
        return
    assert isinstance(job, StudentJob)
    assert isinstance(job.training.num_steps, int)
    assert isinstance(job.method, DiMOConfig)


@pytest.mark.parametrize(
    "overrides",
    [["method=null"], ["method=dimo"], ["method.name=[a]"], ["auxiliary_learning_rate=1", "method=dimo"]],
)
def test_a_method_is_chosen_by_its_name_and_not_otherwise(overrides):
    with pytest.raises(ValueError, match=r"method=.*say method\.name=\.\.\., one of dimo"):
        load_config(StudentJob, overrides=overrides)


@settings(max_examples=300, deadline=None)
@given(
    content=st.binary(max_size=400) | st.dictionaries(words, values, max_size=4).map(lambda x: json.dumps(x).encode())
)
def test_any_configuration_file_is_taken_or_is_a_value_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert isinstance(load_config(StudentJob, path), StudentJob)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damaged_checkpoint_is_read_or_is_a_value_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / data.draw(st.sampled_from(["a.pth", "a.safetensors"]))
    tensors = {"layers.0.weight": torch.ones(3, 4), "layers.0.bias": torch.zeros(3)}
    if path.suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checkpoint = read_checkpoint(str(path))
    except ValueError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.tensors.values())
