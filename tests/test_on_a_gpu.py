"""The steps of training, sampling and measuring, on a GPU that is not there (`fake_gpu.py`): nothing is on the wrong
device, in the wrong precision, or makes the host wait."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import DEVICE, HostWait, MixedDevices, There
from tiny_networks import NETWORKS
from tiny_text import amused_folder

from distill.loop.config import TrainingConfig
from distill.loop.trainer import Trainer
from distill.methods.dimo import DiMO, DiMOConfig
from distill.methods.divergence import _WithGradient
from eval.classifier import Classifier, ClassifierFeatures
from eval.clip_score import ClipFeatures
from students import OneStepPipeline, TokenInitialiser
from students.adapters import make_learner
from teachers import MaskedDiffusionPipeline, PatchTokenizer
from teachers.conditions.condition import ClassLabels
from teachers.objectives.masked import MaskedConfig, MaskedObjective
from teachers.randomness import rand, sample_generators, to_device
from teachers.samplers import (
    ConfidenceThresholdSampler,
    EntropyBoundedSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
    SelfCorrectionSampler,
)
from teachers.tokenizers.vq import VQTokenizer


@pytest.fixture(params=NETWORKS)
def network(request, tmp_path):
    """A network that is still on the CPU, and a condition that is too."""
    torch.manual_seed(0)
    denoiser, condition = NETWORKS[request.param](tmp_path)
    return denoiser.eval(), condition


@pytest.fixture(params=["float32", "bf16"])
def autocast(request):
    if request.param == "bf16":
        return lambda: torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext


def moved(condition):
    return condition._map(lambda tensor: to_device(tensor, DEVICE))


def distillation(denoiser, samples="fresh", **settings):
    """Di[M]O with everything that needs draws: noise, marginals, known tokens, guidance, soft targets."""
    config = DiMOConfig(guidance_scale=2.0, auxiliary_samples=samples, auxiliary_soft_weight=0.5, top_k=5, **settings)
    classes = denoiser.config.num_classes if denoiser.condition_kind == "classes" else 0
    initialiser = TokenInitialiser(
        (4, 4), 24, classes, denoiser.mask_token_id, random_tokens="marginal", embedding_noise=0.3, known_tokens=0.5
    )
    initialiser.marginals.fill([torch.full((max(classes, 1), 16, 24), 1 / 24)])
    return DiMO(config, denoiser, initialiser.to("cuda"), lambda: make_learner(denoiser, True))


def test_what_a_cpu_does_not_notice_is_noticed(gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there + there).device == DEVICE
    assert torch.equal((there + there).cpu(), here + here)
    with pytest.raises(MixedDevices):
        there + here
    with gpu.no_waiting():
        to_device(here, DEVICE)
        for wait in (there.sum().item, there.tolist, there.nonzero, there.cpu, lambda: there[there > 0]):
            with pytest.raises(HostWait):
                wait()
        with pytest.raises(HostWait):
            here.to(DEVICE)


@pytest.mark.parametrize("samples", ["shared", "fresh"])
@pytest.mark.parametrize("measured", [False, True])
def test_a_step_of_distillation_never_waits(gpu, network, autocast, samples, measured):
    denoiser, condition = network
    denoiser.to("cuda")
    method = distillation(denoiser, samples)
    for round in range(2):  # in the first one tables may be made that are kept
        with gpu.no_waiting() if round else contextlib.nullcontext(), autocast():
            for update in method.updates:
                generators = sample_generators(0, places=range(2))
                losses, metrics = method.losses(method.networks, update, moved(condition), generators, measured)
                for value in (*losses.values(), *metrics.values()):
                    assert value.device == DEVICE
                    assert value.dtype == torch.float32


def test_a_frozen_teacher_may_be_of_half_precision(gpu, network):
    """Its learners are made of it before, in float32; what it says is in float32 too."""
    denoiser, condition = network
    denoiser.to("cuda")
    method = distillation(denoiser)
    denoiser.bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        losses, _ = method.losses(
            method.networks, ("student",), moved(condition), sample_generators(0, places=range(2))
        )
    assert losses["student"].dtype == torch.float32
    assert {parameter.dtype for parameter in method.networks["student"].parameters()} == {torch.float32}


def test_the_gradient_of_the_divergence_lies_where_the_logits_do(gpu):
    logits, gradient = torch.zeros(2, 16, 24, device="cuda", dtype=torch.bfloat16), torch.ones(5, 24, device="cuda")
    positions = to_device(torch.tensor([0, 3, 9, 17, 30]), DEVICE)
    context = SimpleNamespace(saved_tensors=(positions, gradient), like=(logits.shape, logits.dtype))
    with gpu.no_waiting():
        whole, _, _ = _WithGradient.backward(context, torch.ones((), device="cuda"))
    assert (whole.device, whole.dtype, whole.cpu().sum()) == (DEVICE, torch.bfloat16, 5 * 24)


@pytest.mark.parametrize("measured", [False, True])
def test_a_step_of_a_teacher_never_waits(gpu, network, autocast, measured):
    denoiser, condition = network
    denoiser.to("cuda")
    objective = MaskedObjective(MaskedConfig(), denoiser)
    for round in range(2):
        with gpu.no_waiting() if round else contextlib.nullcontext(), autocast():
            batch = to_device(torch.randint(24, (2, 16)), DEVICE), moved(condition)
            losses, _ = objective.losses(
                objective.networks, ("denoiser",), batch, sample_generators(0, places=range(2)), measured
            )
            assert losses["denoiser"].dtype == torch.float32


class Alone:
    """What the loop asks of an Accelerator, for one process on the GPU."""

    device, num_processes, process_index, is_main_process, sync_gradients = DEVICE, 1, 0, True, True

    def __init__(self, mixed_precision):
        self.mixed_precision = mixed_precision

    def prepare(self, network, optimizer):
        return network, SimpleNamespace(optimizer=optimizer)

    def unwrap_model(self, network):
        return network

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def gather(self, tensor):
        return tensor

    def log(self, *arguments, **settings):
        pass

    init_trackers = log


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_loop_waits_where_it_writes_a_line_and_nowhere_else(gpu, network, mixed_precision, monkeypatch, tmp_path):
    """All but the backward pass, in whose place gradients are put."""
    denoiser, condition = network
    denoiser.to("cuda")
    method = distillation(denoiser)
    learning = [parameter for learner in method.networks.values() for parameter in learner.parameters()]

    def backward(loss, *arguments):
        for parameter in learning:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("distill.loop.trainer.Throughput", lambda *arguments: None)
    labels = ClassLabels(torch.arange(10))

    def draw_condition(step, places, generators):
        uniform = rand(len(places), 1, generator=generators).squeeze(1)
        if denoiser.condition_kind == "text":
            return moved(condition)
        return labels.condition((10 * uniform).long(), DEVICE)

    config = TrainingConfig(batch_size=2, mixed_precision=mixed_precision, warmup_steps=0, learning_rate=1e-3)
    trainer = Trainer(config, Alone(mixed_precision), method, draw_condition, tmp_path)
    before = next(trainer.networks["student"].layers[0].parameters()).detach().cpu().clone()
    trainer.train_step(measured=False)
    with gpu.no_waiting():
        trainer.train_step(measured=False)
        trainer.train_step(measured=False)
    with gpu.no_waiting(), pytest.raises(HostWait):
        trainer.train_step(measured=True)
    after = next(trainer.networks["student"].layers[0].parameters())
    assert (after.device, after.dtype) == (DEVICE, torch.float32)
    assert not torch.equal(before, after.detach().cpu())
    averaged = next(trainer.averaged_network().parameters())
    assert not isinstance(averaged, There)


SAMPLERS = {
    "MaskGIT": lambda: MaskGITSampler(4),
    "Halton": lambda: HaltonSampler((4, 4), 4),
    "PUNT": lambda: PUNTSampler(verify=True),
    "ReMDM": lambda: ReMDMSampler(4),
    "self-correction": lambda: SelfCorrectionSampler(4, score="leave_one_out"),
    "entropy": EntropyBoundedSampler,
    "confidence": ConfidenceThresholdSampler,
    "first hitting": FirstHittingSampler,
}


def patches():
    tokenizer = PatchTokenizer((8, 8), 3, 2, 24)
    tokenizer.codebook.uniform_()
    return tokenizer


def vq():
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 24, "latent_channels": 4}
    return VQTokenizer((8, 8), levels | settings)


def pipelines(denoiser, sampler, make_tokenizer=patches):
    tokenizer = make_tokenizer()
    initialiser = distillation(denoiser).initialiser
    teacher = MaskedDiffusionPipeline(denoiser, tokenizer, sampler, guidance_scale=2.0)
    return teacher, OneStepPipeline(denoiser, tokenizer, initialiser)


@pytest.mark.parametrize("make_tokenizer", [patches, vq])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_students_sample_in_any_precision_and_without_waiting(gpu, network, dtype, make_tokenizer):
    denoiser, condition = network
    _, student = pipelines(denoiser, MaskGITSampler(4), make_tokenizer)
    student.to("cuda", dtype)
    if denoiser.condition_kind == "text":
        condition = condition._map(lambda tensor: tensor.to(dtype))
    for round in range(2):
        with gpu.no_waiting() if round else contextlib.nullcontext():
            generators = sample_generators(0, places=range(2))
            images = student(condition=moved(condition), generator=generators, output_type="pt").images
            assert (images.device, images.shape) == (DEVICE, (2, 3, 8, 8))
            assert student.encode(images).device == DEVICE
    tokens = student(condition=moved(condition), generator=sample_generators(0, places=range(2)), output_type="tokens")
    assert tokens.tokens.cpu().max() < 24
    assert len(student(condition=moved(condition)).images) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_there_and_draws_what_it_draws_here(gpu, sampler, dtype):
    torch.manual_seed(0)
    denoiser, condition = NETWORKS["maskgit"](None)
    teacher, _ = pipelines(denoiser.eval(), SAMPLERS[sampler]())
    teacher.to(dtype=dtype)
    draws = []
    for device in ("cpu", "cuda"):
        teacher.to(device)
        generators = sample_generators(0, places=range(2))
        output = teacher(condition=condition.to(device), generator=generators, output_type="tokens")
        draws.append(output.tokens.cpu())
    here, there = draws
    assert (there < 24).all()
    assert (here == there).float().mean() > 0.9  # attention is worked out another way, and rounds otherwise


def test_prompts_are_encoded_there(gpu, tmp_path):
    teacher = MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path / "amused"))
    here = teacher(["house", "a red apple"], generator=sample_generators(0, places=range(2)), output_type="pt")
    there = teacher.to("cuda")(
        ["house", "a red apple"], generator=sample_generators(0, places=range(2)), output_type="pt"
    )
    assert there.images.device == DEVICE
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-4, rtol=0)


def test_features_are_taken_there_and_kept_here(gpu, clip_folder):
    torch.manual_seed(0)
    classifier = ClassifierFeatures(Classifier(3, 10), 0.9, "noise")
    clip = ClipFeatures.load(clip_folder, ["a red bar", "a blue cross"])
    images = torch.rand(5, 3, 16, 16)
    for features, network, rows in [(classifier, classifier.classifier, 5), (clip, clip.model, 2)]:
        here = features(images)
        judged = features.judge(here, torch.arange(5) % rows)
        network.to("cuda")
        there = features(images.to("cuda"))
        assert there.device.type == "cpu"
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
        assert features.judge(there, torch.arange(5) % rows) == pytest.approx(judged, abs=1e-4)
