import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from drawn import redraw

from teachers import MaskedDiffusionPipeline, MaskGITSampler, MaskGITTransformer, PatchTokenizer
from teachers.data import DataConfig, load_data

pytest_plugins = ["captioned", "fake_gpu", "student_runs"]

SHARED = Path(__file__).parents[2] / "shared"
SCRIPTS = Path(__file__).parents[1] / "scripts"


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_report_header(config):
    packages = ("torch", "torchvision", "diffusers", "accelerate", "transformers", "peft", "datasets", "safetensors")
    return "on: " + ", ".join(f"{name} {version(name)}" for name in (*packages, "omegaconf", "scipy", "scikit-learn"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden numbers and data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> torch.Tensor:
    return load_data(DataConfig(split="test")).images()


def tiny_teacher(digits: torch.Tensor) -> MaskedDiffusionPipeline:
    """An untrained teacher on the digits: 4x4 tokens, a codebook of 16."""
    tokenizer = PatchTokenizer.fit(digits, patch_size=2, codebook_size=16)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "mlp_size": 32}
    denoiser = redraw(MaskGITTransformer(16, 10, (4, 4), **sizes), 0.1)
    with torch.no_grad():  # an untrained network hardly sees its input; make it look
        for parameter in denoiser.parameters():
            if parameter.dim() == 1:
                parameter.mul_(5)
    return MaskedDiffusionPipeline(denoiser.eval(), tokenizer, MaskGITSampler(order="random", num_inference_steps=4))


@pytest.fixture
def teacher(digits) -> MaskedDiffusionPipeline:
    return tiny_teacher(digits)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs a script in tmp_path; returns its exit status, the last line of stdout, and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return status, (captured.out.splitlines() or [""])[-1], captured.err

    return command
