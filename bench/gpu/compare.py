"""A row: all its methods on one video, one after the other in one process, a record each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Inside, Method, label, slug
from bench.gpu import card
from bench.gpu.clock import OutOfTime, at_most
from bench.gpu.measure import Run, Video, difference, give_back, measure, repeated
from bench.gpu.rows import Call, Row
from bench.gpu.session import Session
from bench.memory import is_out_of_memory
from chopgrad import Exact


def the_row(session: Session, row: Row) -> None:
    """All methods of a row, each a record."""
    clock, names = session.clock, {method: name_of(row, *method) for method in row.methods}
    if all(session.has(name) for name in names.values()):
        return
    try:
        with at_most(clock.left):
            video = Video(row, session.dtype, session.device)
            forward = min(card.clock(video.forward, session.device) for _ in range(2))
            exact = in_float32(video) if row.error else None
    except Exception as error:
        session.say(f"{row.name}: {reason(error)}")
        return
    clock.learn(row.vae, row.megapixels, 3 * forward)
    reference: tuple[Run, str, Tensor] | None = None
    for (call, method), name in names.items():
        calls = 1 + row.rounds * (1 if reference is None else 2) + row.repeats
        expected = clock.estimate(row.vae, row.megapixels, calls, method)
        if expected > clock.left:
            session.say(f"{row.name}, {call} {label(method)}: would take {expected:.0f} s, {clock.left:.0f} s are left")
            continue
        settings = row.case(method, session.dtype, session.device).settings() | {
            "row": row.name, "call": call, "channels_last": row.channels_last, "rounds": row.rounds,
        }  # fmt: skip
        metrics: dict[str, Any] = {"forward_s": forward, "expected_s": expected}
        run = video.run(call, method)
        try:
            with at_most(min(clock.left, 3 * expected + 30)):
                found, gradient = measure(run, reference and reference[0], row.rounds, session.device)
                metrics |= found
                if row.repeats:
                    metrics |= repeated(run, row.repeats, session.device)
            metrics |= {"out_of_memory": False, "reference": reference[1] if reference else None}
            if exact is not None:
                metrics["error_to_float32"] = difference(gradient, exact)
            if reference is not None:
                metrics["difference_from_reference"] = difference(gradient, reference[2])
            clock.learn(row.vae, row.megapixels, min([*found["seconds"], found["first_s"] - found.get("pinning_s", 0)]))
            reference = reference or (run, label(method), gradient)
            session.write(name, settings, metrics)
            session.say(f"{row.name}, {call} {label(method)}: {summary(metrics)}")
        except Exception as error:
            if is_out_of_memory(error):
                session.write(name, settings, metrics | {"out_of_memory": True})
            session.say(f"{row.name}, {call} {label(method)}: {reason(error)}")
        gradient = found = None  # type: ignore[assignment]
        give_back(host=host_is_full())


def in_float32(video: Video) -> Tensor:
    """The exact gradient of the same weights, latents and target in float32 (and not TensorFloat-32)."""
    subject, dtype = video.subject, video.subject.dtype
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    latents, target = subject.latents, subject.target
    try:
        nn.Module.float(subject.decoder.vae)  # diffusers' own warns
        subject.latents, subject.target = latents.float(), target.float()
        return subject.run(Inside("frame", Exact(pieces=True, every=1)))[1].cpu()
    finally:
        nn.Module.to(subject.decoder.vae, dtype)  # bfloat16 comes back as it was
        subject.latents, subject.target = latents, target
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        give_back(host=False)


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
    kept, there = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0), card.host()["host_bytes"]
    return there is not None and kept > there / 3
