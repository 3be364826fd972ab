"""A row: all its methods on one video, one after the other in one process, a record each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.baselines import Baseline
from bench.cases import Method, label, plain, slug
from bench.gpu import card
from bench.gpu.clock import OutOfTime, at_most
from bench.gpu.measure import Run, Video, difference, give_back, host_stats, measure, repeated
from bench.gpu.rows import LEAST, Call, Row
from bench.gpu.session import Session
from bench.memory import is_out_of_memory
from chopgrad.memory import available_bytes


def the_row(session: Session, row: Row) -> None:
    """All methods of a row, each a record. What an earlier run of the same code measured is not measured again."""
    names = {method: name_of(row, *method) for method in row.methods}
    if all(session.has(name) for name in names.values()):
        return
    try:
        with at_most(session.clock.left):
            video = Video(row, session.dtype, session.device)
            forward = min(card.clock(video.forward, session.device) for _ in range(2))
    except Exception as error:
        session.say(f"{row.name}: {reason(error)}")
        return
    session.clock.learn_forward(row.vae, row.megapixels, forward)
    exact = in_float32(session, video) if row.error else None
    reference: Reference | None = None
    for (call, method), name in names.items():
        if session.has(name) and reference is not None:
            continue
        ran = a_method(session, video, call, method, name, reference, forward, exact)
        reference = reference or ran
        give_back(host=host_is_full())


class Reference(NamedTuple):
    """What the other methods of a row are compared with."""

    run: Run
    label: str
    gradient: Tensor


def a_method(
    session: Session,
    video: Video,
    call: Call,
    method: Method,
    name: str,
    reference: Reference | None,
    forward: float,
    exact: Tensor | None,
) -> Reference | None:
    """One method: its record, and itself as a reference; None where it did not run."""
    clock, row, title = session.clock, video.row, f"{video.row.name}, {call} {label(method)}"
    calls = 1 + row.rounds * (1 if reference is None else 2) + row.repeats
    expected, pins = clock.estimate(row.vae, row.megapixels, calls, method), clock.host_gib(row.megapixels, method)
    if expected > clock.left:
        session.say(f"{title}: would take {expected:.0f} s, {clock.left:.0f} s are left")
        return None
    free = (available_bytes("cpu") or 2**62) / 2**30
    if session.device == "cuda" and pins > 0.8 * free and not chooses_every(method):
        session.say(f"{title}: would pin {pins:.0f} GiB, {free:.0f} GiB of host memory are free")
        return None
    settings = row.case(method, session.dtype, session.device).settings() | {
        "row": row.name, "call": call, "channels_last": row.channels_last, "rounds": row.rounds,
    }  # fmt: skip
    metrics: dict[str, Any] = {"forward_s": forward, "expected_s": expected}
    run = video.run(call, method)
    try:
        with at_most(min(clock.left, 3 * expected + 30)):
            found, gradient = measure(run, reference and reference.run, row.rounds, session.device)
            metrics |= found
            if row.repeats:
                metrics |= repeated(run, row.repeats, session.device)
    except Exception as error:
        if is_out_of_memory(error):
            session.write(name, settings, metrics | {"out_of_memory": True})
        session.say(f"{title}: {reason(error)}")
        return None
    if isinstance(method, Baseline):
        metrics.pop("pinned_peak_bytes", None)  # counted by the library, of its own
    metrics |= {"out_of_memory": False, "reference": reference.label if reference else None}
    if exact is not None:
        metrics["error_to_float32"] = difference(gradient, exact)
    if reference is not None:
        metrics["difference_from_reference"] = difference(gradient, reference.gradient)
    took = min([*found["seconds"], found["first_s"] - found.get("pinning_s", 0)])
    clock.learn(row.vae, row.megapixels, method, took)
    session.write(name, settings, metrics)
    session.say(f"{title}: {summary(metrics)}")
    return Reference(run, label(method), gradient)


def in_float32(session: Session, video: Video) -> Tensor | None:
    """The exact gradient of the same weights, latents and target in float32 (and not TensorFloat-32).

    None where there is no memory or time for it.
    """
    subject, dtype = video.subject, video.subject.dtype
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    latents, target = subject.latents, subject.target
    try:
        with at_most(session.clock.left):
            nn.Module.float(subject.decoder.vae)  # diffusers' own warns
            subject.latents, subject.target = latents.float(), target.float()
            return subject.run(LEAST)[1].cpu()
    except Exception as error:
        session.say(f"{video.row.name}, the gradient in float32: {reason(error)}")
        return None
    finally:
        nn.Module.to(subject.decoder.vae, dtype)  # bfloat16 comes back as it was
        subject.latents, subject.target = latents, target
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        give_back(host=host_is_full())


def chooses_every(method: Method) -> bool:
    """Whether it looks for itself how much host memory is free."""
    inner = plain(method)
    return isinstance(inner, Baseline) or inner.plan().every is None


def name_of(row: Row, call: Call, method: Method) -> str:
    return f"{row.name}-{call.replace('_', '-')}-{slug(method)}"


def reason(error: Exception) -> str:
    """Out of memory or of time, or what else went wrong, in a line."""
    if isinstance(error, OutOfTime):
        return "stopped, its time was over"
    first = (str(error).splitlines() or [""])[0][:200]
    return "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {first}"


def summary(metrics: dict[str, Any]) -> str:
    words = [f"first {metrics['first_s']:.2f} s"]
    if "stopped" in metrics:
        words.append(metrics["stopped"])
    if metrics["seconds"]:
        words.append(f"then {min(metrics['seconds']):.2f} s")
    if metrics.get("time_ratio") is not None:
        words.append(f"ratio {metrics['time_ratio']:.2f}")
    for key in ("allocated_peak_bytes", "reserved_peak_bytes", "pinned_peak_bytes"):
        if key in metrics:
            words.append(f"{key.removesuffix('_peak_bytes')} {metrics[key] / 2**30:.2f} GiB")
    for key in ("every", "error_to_float32", "difference_from_reference", "repeat_difference"):
        if metrics.get(key) is not None:
            words.append(f"{key} {metrics[key]:.3g}")
    return ", ".join(words)


def host_is_full() -> bool:
    """Whether what PyTorch keeps pinned is more than a third of the host's memory; pinning it again takes long."""
    if not torch.cuda.is_available():
        return False
    kept, there = host_stats().get("allocated_bytes.current", 0), card.host_bytes()
    return there is not None and kept > there / 3
