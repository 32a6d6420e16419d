"""Part 2: whether the device says what the CPU says, in fp32 and in bf16.

Every quantity is computed on the CPU in fp32, on the CPU in bf16, and on the device in both. In
fp32 the device must agree with the CPU to the tolerances of the reference cases. In bf16 it must
not be further from the CPU's fp32 than `FACTOR` times what the CPU itself is in bf16: the same
rounding, in another order. A sample made to a tolerance is held by its certificate, which may be
`FACTOR` times the CPU's: two devices may stop at different sweeps, and both be right.

Knows the quantities and their tolerances. Knows nothing of speed.

Shapes: B batch (1 here), T latent frames, C channels, h, w latent cells.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.fixtures import REFERENCE, TRAINED, Fixture, load_fixture
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from flow.certificate import Certificate, certificate
from flow.flow import FlowModel
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, sample

FACTOR = 2.0
LOOSE, TIGHT = (1e-4, 0.0), (1e-5, 1e-5)
"""Absolute and relative tolerance in fp32: of tokens and samples, and of the rest. A gradient's is
`LOOSE` times its largest element."""
CERTIFICATE_FLOOR = 1e-3
"""A certificate of that size is rounding, whatever the CPU's is."""
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What a model is asked: data, text, null text, and the noise of a sample."""

    name: str
    model: FlowModel
    data: Tensor
    text: Tensor
    null: Tensor
    noise: Tensor
    guidance: float

    @staticmethod
    def of(fixture: Fixture, frames: int) -> Case:
        """The first clip of a fixture, cut to `frames` latent frames."""
        tensors = fixture.tensors
        data = tensors.get("data", tensors["sample_guided"])
        return Case(
            fixture.name,
            fixture.model,
            data[:1, :frames].clone(),
            tensors["text"][:1],
            tensors["text_null"][:1],
            tensors["noise"][:1, :frames].clone(),
            fixture.guidance,
        )

    def on(self, device: torch.device, dtype: torch.dtype) -> Case:
        """The same on a device, weights in `dtype`, inputs in fp32."""
        model = copy.deepcopy(self.model).to(device, dtype)
        moved = {name: getattr(self, name).to(device) for name in ("data", "text", "null", "noise")}
        return replace(self, model=model, **moved)

    def spec(self, schedule: str, *, exact: bool) -> SampleSpec:
        """A sample with the schedule's default tolerance, or exact."""
        frames, (h, w) = self.noise.shape[1], self.noise.shape[-2:]
        tolerance = 0.0 if exact else SampleSpec.tolerance
        return SampleSpec(
            num_frames=frames,
            grid=(h, w),
            guidance=self.guidance,
            schedule=schedule,  # type: ignore[arg-type]
            tolerance=tolerance,
        )


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All rows of the part, and the verdict."""
    rows: list[bool] = []
    for folder in (REFERENCE, TRAINED):
        load = functools.partial(load_fixture, folder)
        fixture = recorder.attempt(f"the case in {folder}", load)
        if fixture is not None:
            case = Case.of(fixture, shapes.case_frames)
            hold = functools.partial(_hold, recorder, case, device, rows)
            recorder.attempt(case.name, hold)
    wrong = rows.count(False)
    verdict = f"{wrong} of {len(rows)} differ by more than the tolerance" if wrong else "right"
    if not rows:
        verdict = "nothing could be compared"
    recorder.row("verdict", verdict=verdict, compared=len(rows), outside=wrong)


def _hold(recorder: Recorder, case: Case, device: torch.device, rows: list[bool]) -> None:
    """Every quantity of a case on both devices in both dtypes."""
    recorder.say(f"{case.name}: on the CPU")
    on_cpu = {name: answers(case.on(CPU, dtype)) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        recorder.say(f"{case.name}: on the device in {name}")
        ask = functools.partial(_answers_on, case, device, dtype)
        own = recorder.attempt(f"{case.name} in {name}", ask)
        if own is None:
            rows.append(False)
            continue
        rows += _rows(recorder, case.name, name, own, on_cpu)


@dataclass(frozen=True)
class Answers:
    """What one device says in one dtype: tensors on the CPU in fp32, and certificates."""

    tensors: dict[str, Tensor]
    certificates: dict[str, Certificate]


def _answers_on(case: Case, device: torch.device, dtype: torch.dtype) -> Answers:
    return answers(case.on(device, dtype))


def answers(case: Case) -> Answers:
    """All quantities of a case where its model is."""
    tensors = {name: value.detach().float().cpu() for name, value in _tensors(case)}
    certificates = {}
    for schedule in ("sequential", "jacobi", "sliding"):
        spec = case.spec(schedule, exact=False)
        u_BTHWC = _deep_sample(case, spec)
        if schedule == "sequential":
            tensors["deep sample, sequential"] = u_BTHWC.float().cpu()
        certificates[schedule] = certificate(
            case.model.flow, u_BTHWC, case.text, case.null, spec, noise=lambda n: case.noise[:, n]
        )
    return Answers(tensors, certificates)


def _tensors(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Prior, log-determinants, gradient, denoiser, and an exact sample after all networks."""
    model, text = case.model, case.text
    data = case.data.clone().requires_grad_()
    out = model.flow(data, text)
    out.loss().backward()
    yield "prior", out.z_BTHWC
    yield "log-determinants", torch.stack(out.block_log_det)
    assert data.grad is not None
    yield "gradient", data.grad
    with torch.no_grad():
        if model.denoiser is not None:
            yield "denoiser", model.denoiser(case.data, text)
        spec = case.spec("jacobi", exact=True)
        learned = "learned" if model.denoiser is not None else "none"
        yield (
            "clean sample, jacobi, exact",
            sample(
                model, text, case.null, spec, denoiser=learned, noise=lambda n: case.noise[:, n]
            ),
        )


def _deep_sample(case: Case, spec: SampleSpec) -> Tensor:
    stream = DeepStream(
        case.model.flow, case.text, case.null, spec, noise=lambda n: case.noise[:, n]
    )
    return torch.cat([stream.next_frame() for _ in range(spec.num_frames)], dim=1)


def _rows(
    recorder: Recorder, case: str, dtype: str, own: Answers, on_cpu: dict[str, Answers]
) -> list[bool]:
    """One row for every quantity; whether each is within its tolerance."""
    verdicts = []
    for name, value in own.tensors.items():
        truth, peer = on_cpu["float32"].tensors[name], on_cpu[dtype].tensors[name]
        if dtype == "float32":
            absolute, relative = TIGHT if name in ("log-determinants", "denoiser") else LOOSE
            absolute *= float(truth.abs().max()) if name == "gradient" else 1.0
            difference = float((value - truth).abs().max())
            excess = (value - truth).abs() - relative * truth.abs()
            within = bool((excess <= absolute).all())
            kind, tolerance, cpus = "max abs", absolute, 0.0
        else:
            kind, difference, cpus = "relative rms", _rms(value, truth), _rms(peer, truth)
            tolerance = FACTOR * cpus
            within = difference <= tolerance
        verdicts.append(within)
        recorder.row(
            "device against CPU in fp32", case=case, dtype=dtype, quantity=name, measure=kind,
            difference=difference, tolerance=tolerance, cpu_in_this_dtype=cpus, within=within,
        )  # fmt: skip
    for schedule, proof in own.certificates.items():
        peer_proof = on_cpu[dtype].certificates[schedule]
        tolerance = max(CERTIFICATE_FLOOR, FACTOR * peer_proof.p999_abs)
        within = proof.p999_abs <= tolerance
        verdicts.append(within)
        recorder.row(
            "certificates of the default tolerances", case=case, dtype=dtype, schedule=schedule,
            p999=proof.p999_abs, tolerance=tolerance, cpu_p999=peer_proof.p999_abs,
            max=proof.max_abs, cpu_max=peer_proof.max_abs, within=within,
        )  # fmt: skip
    return verdicts


def _rms(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth; infinite where that is NaN."""
    ratio = float((value - truth).norm() / truth.norm())
    return float("inf") if math.isnan(ratio) else ratio
