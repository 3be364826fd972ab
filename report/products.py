"""What a reader may look for in ``results/``: the paper's figures and tables, and what was measured beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """What a reader looks for: a figure, a table or a list of records.

    Args:
        paper: figure, table or section of the paper.
        question: what it answers.
        shown: files for people, relative to ``results/``; those that do not exist are left out.
        records: patterns of the records behind it, relative to ``results/``.
        command: what makes it, with the options that people add.
    """

    paper: str
    question: str
    shown: tuple[str, ...]
    records: tuple[str, ...]
    command: str


BENCH = "How much memory and time does each strategy take, and each thing that people do without the library?"
ON_CPU = "`tox -e bench -- --out results`"
ON_CLIPS = "`tox -e theory -- --full` (`--clips DIR` adds videos)"
TASKS = "`tox -e tasks -- --full`"
PRODUCTS = (
    Product(
        "Fig. 3", "Does the influence of a latent decay with temporal distance? (`--snapshots DIR`: in training)",
        ("theory/temporal_locality.png",), ("theory/temporal_locality*.json",), ON_CLIPS,
    ),
    Product(
        "Fig. 4", "How wrong is the truncated gradient of backbone parameters, and is it an error of magnitude?",
        ("theory/backbone_gradient*.png",), ("theory/backbone_gradient*.json",), "`tox -e theory -- --full`",
    ),
    Product(
        "Fig. 5", "How wrong is a truncated gradient at the decoder input? `*-driving`: two driving clips",
        ("gradient_bias/*.png", "gradient_bias/*.md"), ("gradient_bias/*.json",),
        "`python analysis/gradient_bias.py` (`*-driving`: `--clips DIR --frames 33`)",
    ),
    Product(
        "Figs. 4, 5", "How much of the bias is that of a residual which the decoder cannot draw?",
        ("theory/residuals.png",), ("theory/residuals-*.json",), ON_CLIPS,
    ),
    Product(
        "Fig. 6", f"{BENCH} Embedded decoders, CPU: peak memory", ("bench-cpu.md", "bench-cpu.png"),
        ("memory/*-cpu-*.json",), ON_CPU,
    ),
    Product("Fig. 6", "The same: time", ("bench-cpu.md", "bench-cpu.png"), ("time/*-cpu-*.json",), ON_CPU),
    Product(
        "Fig. 6", "The same: memory as the planner predicts it, beside what was measured", ("bench-cpu.md",),
        ("prediction/*-cpu-*.json",), ON_CPU,
    ),
    Product(
        "Fig. 6", "The same for the published architectures on GPUs, random weights", ("gpu/README.md", "gpu/*.png"),
        ("gpu/*/*.json", "gpu/predicted/*/*.json"), "`python -m bench.gpu --out results/gpu`",
    ),
    Product(
        "Fig. 6", "The same in hours instead of minutes, each case in a process of its own",
        ("bench-full-cuda.md", "bench-full-cuda.png", "bench-full-cuda-frontier.png"),
        ("memory/*-cuda-*.json", "time/*-cuda-*.json", "prediction/*-cuda-*.json"),
        "`tox -e bench -- --full --out results`",
    ),
    Product(
        "Fig. 6", "The same for the published architectures without a GPU: short and small videos, random weights",
        ("bench-published.md", "bench-published.png", "bench-published-frontier.png"), ("published/*/*.json",),
        "`tox -e bench -- --published --out results`",
    ),
    Product(
        "Fig. 6", "What would each strategy take on the published architectures? **Predicted, not measured**",
        ("predicted_memory/README.md", "predicted_memory/curves.png"), ("predicted_memory/*.json",),
        "`python analysis/predicted_memory.py`",
    ),
    Product(
        "Fig. 7", "How local is the gradient in space?", ("theory/spatial_locality.png",),
        ("theory/spatial_locality*.json",), ON_CLIPS,
    ),
    Product(
        "Fig. 7", "How wrong is a gradient truncated in space, beside independent tiles and exact strips?",
        ("theory/spatial_truncation.png",), ("theory/spatial_truncation*.json", "theory/whole_picture*.json"), ON_CLIPS,
    ),
    Product(
        "frontier", "What does each strategy cost, and how wrong is its gradient? Which targets are reached?",
        ("bench-cpu.md", "bench-cpu-frontier.png"), ("gradient_error/*.json",), ON_CPU,
    ),
    Product(
        "Sec. 3.2", "Do the bounds of the truncation error hold, and the rule for D? (Every claim: theory.md)",
        ("theory.md", "theory/error_bound.png"), ("theory/error_bound*.json",), ON_CLIPS,
    ),
    Product(
        "Sec. 3.2", "The same on toys with a closed form", ("theory.md",), ("theory/toys.json",),
        "`tox -e theory -- --full`",
    ),
    Product(
        "ours", "How far does each decoder look back?", ("theory.md",), ("theory/receptive_field*.json",),
        "`tox -e theory -- --full`",
    ),
    Product(
        "Sec. 3.3", "Does truncation change where training ends?", ("theory.md", "theory/training_bias.png"),
        ("theory/training_bias*.json", "theory/training_bias/*.json"), "`tox -e theory -- --full`",
    ),
    Product(
        "ours", "Are there better estimators than truncation?", ("theory.md", "theory/estimators.png"),
        ("theory/estimators*.json",), "`tox -e theory -- --full`",
    ),
    Product(
        "Table 1", "End task: video super-resolution", ("tasks/super-resolution.md", "tasks/super-resolution.png"),
        ("tasks/super-resolution-*.json",), TASKS,
    ),
    Product(
        "Table 2", "End task: artifact removal in novel-view synthesis",
        ("tasks/artifact-removal.md", "tasks/artifact-removal.png"), ("tasks/artifact-removal-*.json",), TASKS,
    ),
    Product(
        "Table 3", "End task: video inpainting",
        ("tasks/inpainting.md", "tasks/inpainting.png", "tasks/inpainting-objects.md", "tasks/inpainting-objects.png"),
        ("tasks/inpainting-*.json",), TASKS,
    ),
    Product(
        "Table 4", "End task: controlled driving video", ("tasks/driving.md", "tasks/driving.png"),
        ("tasks/driving-*.json",), TASKS,
    ),
    Product(
        "Table 4", "Is the gain in driving video the loss's, or the trained decoder's?", ("tuned_decoder/README.md",),
        ("tuned_decoder/*.json",), "`python -m bench.tasks run --full --tasks driving --out results/tuned_decoder`",
    ),
    Product(
        "ours", "Why do LPIPS trainings lose PSNR: the loss, or the gradient through the decoder?",
        ("lost_psnr/README.md",), ("lost_psnr/*.json",), "`python analysis/lost_psnr.py --full`",
    ),
    Product(
        "ours", "What pays inside the engine? (Table: docs/engine.md)", (), ("variants/*.json",),
        "`python -m bench.variants`",
    ),
    Product(
        "ours", "How good are the embedded decoders?", ("reconstruction/*.md",), ("reconstruction/*.json",),
        "`python weights/evaluate.py`",
    ),
)  # fmt: skip
