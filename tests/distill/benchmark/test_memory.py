"""That the memory worked out on tensors without contents is what real ones hold."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.benchmark.memory import (
    CAST,
    SHARDED,
    WHOLE,
    Distillation,
    Hollow,
    Ledger,
    gpu_autocast,
    layer_bytes,
    root_bytes,
)
from distill.benchmark.step import PeakMemory
from distill.config import load_config
from distill.jobs.student import StudentJob
from distill.loop.state import trained_parameters
from teachers.cost import peak_memory

KIB = 1024


@pytest.fixture(autouse=True)
def process():
    """The precision of a process's first Accelerator is that of all; here each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_chain_of_tensors_holds_what_real_ones_do():
    with Hollow(), Ledger((1,)) as ledger:
        first = torch.zeros(1 * KIB)
        second = first + 1
        view = second.view(32, 32)
        del first
        third = view.double()
        del second, view, third
        torch.zeros(KIB // 2)
    assert ledger.peaks == {1: 4 * KIB + 8 * KIB}
    assert ledger.bytes[WHOLE] == 0


def test_nothing_is_computed_and_no_memory_touched():
    """A product of 2^51 operations, of matrices that take 4 GiB each: hours, and more than there may be."""
    before = peak_memory(torch.device("cpu"))
    with Hollow(), Ledger((1,)) as ledger:
        wide = torch.randn(2**15, 2**15)
        for _ in range(2**6):
            wide = wide @ wide
    assert ledger.peaks[1] == 2 * 2**32
    assert peak_memory(torch.device("cpu")) - before < 100  # MiB


def test_what_cannot_be_known_is_the_most_that_it_can_be():
    with Hollow():
        mask = torch.rand(3, 5) < 0.5
        assert mask.flatten().nonzero().shape == (15, 1)
        assert torch.rand(3, 5, 7)[mask].shape == (15, 7)
        assert mask.sum().item() == 1
        assert mask.sum(-1).tolist() == [0, 0, 0]


def test_shards_are_divided_and_weights_cast_only_where_they_are_whole():
    weight = nn.Parameter(torch.zeros(KIB, KIB))
    ledger = Ledger((1, 8))
    ledger.hold([weight], SHARDED)
    with Hollow(), ledger, torch.autocast("cpu", torch.bfloat16):
        hidden = torch.zeros(1, KIB) @ weight
        assert ledger.bytes[CAST] == 2 * KIB**2
    assert ledger.peaks[1] == 6 * KIB**2 + ledger.bytes[WHOLE] + 4 * KIB + 2 * KIB - hidden.nbytes
    assert ledger.peaks[8] == ledger.peaks[1] - 2 * KIB**2 - 4 * KIB**2 * 7 / 8


def test_norms_are_in_float32_under_autocast_and_where_they_are_computed_again():
    norm, inputs, seen = nn.LayerNorm(4), torch.randn(2, 4, dtype=torch.bfloat16), []

    def layer(hidden):
        hidden = norm(hidden)
        seen.append(hidden.dtype)
        return hidden.square()

    with torch.autocast("cpu", torch.bfloat16), gpu_autocast():
        checkpoint(layer, inputs, use_reentrant=False).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def small_job(settings):
    usual = ["method.mask_ratio_range=[1, 1]", "initial.random_tokens=uniform", "initial.embedding_noise=0.1"]
    return load_config(StudentJob, overrides=[*usual, "training.batch_size=4", "training.tracker=none", *settings])


@pytest.mark.parametrize(
    "settings",
    [
        ["method.guidance_scale=2"],
        ["method.auxiliary_samples=fresh", "training.gradient_checkpointing=true"],
        ["adapter_rank=2", "training.gradient_accumulation_steps=2"],
        ["training.mixed_precision=bf16", "teacher_dtype=bfloat16"],
    ],
    ids=str,
)
def test_a_step_takes_what_one_with_contents_takes(teacher, tmp_path, settings):
    job = small_job(settings)
    with Hollow():
        found = Distillation(job, copy.deepcopy(teacher), tmp_path).training()["one card"]
    with PeakMemory() as memory:
        real = Distillation(job, copy.deepcopy(teacher), tmp_path)
        elsewhere = memory.held - real.ledger.on_each(1)  # the copies of the averaged network, which are no card's
        memory.peak = memory.held
        real.trainer.train_step(measured=True)
    assert found == pytest.approx(memory.peak - elsewhere, rel=0.01)


def test_weights_moments_averages_and_gradients_are_what_is_sharded(teacher, tmp_path):
    job = small_job(["freeze_embeddings=false"])
    with Hollow():
        run = Distillation(job, teacher, tmp_path)
        weights = 4 * sum(parameter.numel() for parameter in teacher.denoiser.parameters())
        steps = 2 * 4 * len(list(teacher.denoiser.parameters()))  # Adam's counts of steps
        assert run.ledger.bytes[SHARDED] == 2 * 3 * weights + weights + steps
        whole, found = run.ledger.bytes[WHOLE], run.training()
        assert run.ledger.bytes[SHARDED] == 2 * 3 * weights + weights + steps
        assert run.ledger.bytes[WHOLE] == pytest.approx(whole, abs=64)  # flags that are still to be read
    assert found["DDP"] - found["one card"] == 2 * weights
    gathered = layer_bytes(teacher.denoiser) + 2 * root_bytes(teacher.denoiser)
    saved = found["one card"] - (found["FSDP2, 8 cards"] - gathered)
    assert 0 < saved <= 7 / 8 * (2 * 4 * weights + weights + steps)


def test_what_fsdp2_gathers():
    network = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 3, 4))
    network[1].requires_grad_(False)
    network._no_split_modules = ["Linear"]
    assert layer_bytes(network) == (2 * 2 + 2 + 4) * 20
    assert root_bytes(network) == 2 * 28


def test_adapters_learn_on_shards_of_their_own(teacher, tmp_path):
    with Hollow():
        run = Distillation(small_job(["adapter_rank=2"]), teacher, tmp_path)
        learnt = sum(p.nbytes for n in run.trainer.networks.values() for p in trained_parameters(n).values())
        found = run.training()
    assert found["DDP"] - found["one card"] == learnt
    frozen = 4 * sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    assert found["FSDP2, 8 cards"] - found["FSDP2, 32 cards"] >= 2 * frozen * (1 / 8 - 1 / 32)


def test_the_command_at_a_released_size(command):
    """174 M parameters: the teacher, two networks, their moments and the averages are 8 times that in float32."""
    status, last, errors = command("benchmark.py", "memory", "--sizes", "maskgit-256", "--adapter-rank", 2)
    assert status == 0, errors
    gib = {row["what"]: row["gib"] for row in json.loads(last)["rows"]}
    whole, adapters = gib["step, all weights, checkpointing"], gib["step, adapters of rank 2, checkpointing"]
    assert whole["one card"] > 8 * 4 * 173.9e6 / 2**30
    assert whole["one card"] - whole["FSDP2, 8 cards"] > 7 / 8 * 7 * 4 * 170e6 / 2**30 - 1
    assert whole["one card"] - adapters["one card"] > 7 * 4 * 170e6 / 2**30
    assert whole["one card"] < gib["step, all weights"]["one card"]
    assert gib["sampling, student in bfloat16"]["one card"] < 0.6 * gib["sampling, student in float32"]["one card"]
