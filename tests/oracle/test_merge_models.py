"""Merging models: every method against the formula written down on whole tensors, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.gram_folder import Grams
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods.models import _merge
from moesurg.surgery.sweep import simplex
from tests.conftest import Result
from tests.oracle.helpers import drift, grams_of, operate, rewrite, stock, tensors

Checkpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
BASED = ["task-arithmetic", "ties", "dare", "della", "breadcrumbs", "model-stock", "sce"]


@pytest.fixture(scope="module")
def folders(checkpoint: Checkpoint) -> list[Path]:
    """A base and two fine-tunes in float32."""
    return [checkpoint("llama", seed=seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tensors of the small models come in several blocks."""
    monkeypatch.setattr(_merge, "BLOCK", 1000)


def merge(method: str, sources: list[Path], output: Path, **options: Any) -> Tensors:
    operate("merge", method, sources, output, **options)
    return tensors(output)


def flat(values: Tensors, name: str) -> torch.Tensor:
    return values[name].double()


def check(found: Tensors, wanted: Callable[[str], torch.Tensor], tolerance: float = 2e-7) -> None:
    assert found
    for name, values in found.items():
        right = wanted(name)
        assert values.shape == right.shape
        error = float((values.double() - right).norm() / right.norm().clamp_min(1e-30))
        assert error < tolerance, (name, error)


def keep(change: torch.Tensor, density: float) -> torch.Tensor:
    """What a stable sort of the magnitudes keeps."""
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    order = change.abs().reshape(-1).argsort(descending=True, stable=True)
    kept[order[: int(density * change.numel())]] = True
    return kept.reshape(change.shape)


def test_linear_is_the_weighted_mean(folders: list[Path], tmp_path: Path) -> None:
    before = [tensors(folder) for folder in folders]
    found = merge("linear", folders, tmp_path / "mean", weights="1,2,5")
    check(
        found,
        lambda n: (
            sum((w * flat(b, n) for w, b in zip((1, 2, 5), before, strict=True)), torch.zeros(()))
            / 8
        ),
    )
    raw = merge("linear", folders, tmp_path / "sum", weights="1,2,-3", normalize=False)
    check(raw, lambda n: flat(before[0], n) + 2 * flat(before[1], n) - 3 * flat(before[2], n))


def test_task_arithmetic_adds_changes(folders: list[Path], tmp_path: Path) -> None:
    a, b, c = (tensors(folder) for folder in folders)
    found = merge("task-arithmetic", folders, tmp_path / "out", weights="2,-1", scale=0.5)
    check(found, lambda n: flat(a, n) + flat(b, n) - flat(a, n) - 0.5 * (flat(c, n) - flat(a, n)))
    alone = merge("task-arithmetic", folders[:2], tmp_path / "alone")
    assert all(torch.equal(alone[name], b[name]) for name in b)


def test_ties_trims_elects_and_averages(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = (tensors(folder) for folder in folders)

    def wanted(name: str) -> torch.Tensor:
        changes = [flat(t, name) - flat(base, name) for t in tuned]
        changes = [change * keep(change, 0.3) for change in changes]
        stack = torch.stack(changes)
        sign = torch.where((stack[0] + 3 * stack[1]) >= 0, 1.0, -1.0)
        weights = torch.tensor([1.0, 3.0]).reshape(2, *[1] * (stack.dim() - 1)).double()
        agree = (stack.sign() == sign) * weights
        return flat(base, name) + 0.7 * (stack * agree).sum(0) / agree.sum(0).clamp_min(1e-30)

    found = merge("ties", folders, tmp_path / "out", density=0.3, weights="1,3", scale=0.7)
    check(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_trims_whole_models(dtype: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As the paper has it; changes of bfloat16 are coarse, so that many equal the last one that is kept."""
    folders = [checkpoint("llama", seed=seed, dtype=dtype) for seed in range(3)]
    base, *tuned = (tensors(folder) for folder in folders)

    def layer(name: str) -> int:
        return int(name.split(".")[2]) if name.startswith("model.layers.") else -1

    # Tensors outside layers come first, in the order of the architecture.
    names = sorted(Model.open(folders[0]).names(), key=layer)
    kept: list[Tensors] = []
    for one in tuned:
        whole = torch.cat([(flat(one, n) - flat(base, n)).reshape(-1) for n in names])
        left = whole * keep(whole, 0.3)
        parts = left.split([base[n].numel() for n in names])
        kept.append({n: part.reshape(base[n].shape) for n, part in zip(names, parts, strict=True)})

    def wanted(name: str) -> torch.Tensor:
        stack = torch.stack([one[name] for one in kept])
        agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        return flat(base, name) + (stack * agree).sum(0) / agree.sum(0).clamp_min(1)

    found = merge("ties", folders, tmp_path / "out", density=0.3, trim="model")
    check(found, wanted, 2e-7 if dtype == "float32" else 5e-3)
    if dtype == "bfloat16":
        changed = sum(int((found[n] != base[n]).sum()) for n in names)
        assert changed == sum(int((wanted(n).bfloat16() != base[n]).sum()) for n in names)


def test_breadcrumbs_keep_the_middle(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = (tensors(folder) for folder in folders)

    def wanted(name: str) -> torch.Tensor:
        total = flat(base, name).clone()
        for t in tuned:
            change = flat(t, name) - flat(base, name)
            order = change.abs().reshape(-1).argsort(descending=True, stable=True)
            size = change.numel()
            top, kept = int(0.05 * size), int(0.4 * size)
            mask = torch.zeros(size, dtype=torch.bool)
            mask[order[top : top + kept]] = True
            total += change * mask.reshape(change.shape)
        return total

    check(merge("breadcrumbs", folders, tmp_path / "out", density=0.4, gamma=0.05), wanted)


def test_sce_selects_calculates_and_erases(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = (tensors(folder) for folder in folders)

    def wanted(name: str) -> torch.Tensor:
        stack = torch.stack([flat(t, name) - flat(base, name) for t in tuned])
        variance = stack.var(dim=0, unbiased=False)
        share = 0.4 * int(torch.count_nonzero(variance)) / variance.numel()
        stack = stack * keep(variance, share + 1e-9)
        energy = stack.square().sum(dim=tuple(range(1, stack.dim())))
        weight = (energy / energy.sum().clamp_min(1e-30)).reshape(2, *[1] * (stack.dim() - 1))
        agree = (stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)) * weight
        return flat(base, name) + (stack * agree).sum(0) / agree.sum(0).clamp_min(1e-30)

    check(merge("sce", folders, tmp_path / "out", density=0.4), wanted)


def test_model_stock_follows_the_mean_cosine(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = (tensors(folder) for folder in folders)

    def wanted(name: str) -> torch.Tensor:
        a, b = (flat(t, name) - flat(base, name) for t in tuned)
        cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
        ratio = 2 * max(0.0, cosine) / (1 + max(0.0, cosine))
        return flat(base, name) + ratio * (a + b) / 2

    check(merge("model-stock", folders, tmp_path / "out"), wanted)


def test_slerp_turns_by_the_angle(folders: list[Path], tmp_path: Path) -> None:
    a, b = (tensors(folder) for folder in folders[:2])

    def wanted(name: str) -> torch.Tensor:
        x, y = flat(a, name), flat(b, name)
        cosine = (x * y).sum() / (x.norm() * y.norm())
        if abs(float(cosine)) > 0.9995:
            return 0.7 * x + 0.3 * y
        angle = cosine.acos()
        return ((0.7 * angle).sin() * x + (0.3 * angle).sin() * y) / angle.sin()

    check(merge("slerp", folders[:2], tmp_path / "out", t=0.3), wanted)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_dropping_is_unbiased(method: str, folders: list[Path], tmp_path: Path) -> None:
    """The mean over seeds approaches the full change as one over the root of their number."""
    base, tuned = (tensors(folder) for folder in folders[:2])
    name = "model.embed_tokens.weight"
    change = flat(tuned, name) - flat(base, name)
    options = {"density": 0.5, **({"elect": False} if method == "della" else {})}
    total = torch.zeros_like(change)
    for seed in range(12):
        found = merge(method, folders[:2], tmp_path / str(seed), seed=seed, **options)
        left = flat(found, name) - flat(base, name)
        total += left
        assert float((left.abs() > 1e-6).double().mean()) == pytest.approx(0.5, abs=0.03)
    # The variance of one draw is change^2 (1 - p) / p.
    error = float((total / 12 - change).norm() / change.norm())
    assert error < 1.3 / 12**0.5
    assert float((total / 12 * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.03)


def test_dare_can_keep_the_norm_of_every_tensor(folders: list[Path], tmp_path: Path) -> None:
    base, tuned = (tensors(folder) for folder in folders[:2])
    found = merge("dare", folders[:2], tmp_path / "out", density=0.3, rescale="l1")
    for name in base:
        before = (flat(tuned, name) - flat(base, name)).abs().sum()
        after = (flat(found, name) - flat(base, name)).abs().sum()
        assert float(after) == pytest.approx(float(before), rel=1e-5)


@pytest.mark.parametrize("method", ["linear", "slerp", "karcher"])
def test_equal_models_give_themselves(method: str, folders: list[Path], tmp_path: Path) -> None:
    found = merge(method, [folders[1]] * 2, tmp_path / "out")
    check(found, lambda name: flat(tensors(folders[1]), name), 1e-7)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 1.0}),
        ("model-stock", {}),
        ("sce", {"density": 1.0}),
        ("tsv-m", {"rank": 99}),
    ],
)
def test_equal_fine_tunes_give_themselves(
    method: str, options: dict[str, Any], folders: list[Path], tmp_path: Path
) -> None:
    found = merge(method, [folders[0], folders[1], folders[1]], tmp_path / "out", **options)
    check(found, lambda name: flat(tensors(folders[1]), name), 3e-7)


@pytest.mark.parametrize("method", BASED)
def test_fine_tunes_equal_to_the_base_give_the_base(
    method: str, folders: list[Path], tmp_path: Path
) -> None:
    found = merge(method, [folders[0]] * 3, tmp_path / "out")
    base = tensors(folders[0])
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_types_widen_and_the_config_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, second = checkpoint("llama"), checkpoint("llama", dtype="bfloat16", seed=1)
    found = merge("linear", [second, first], tmp_path / "out")
    a, b = tensors(first), tensors(second)
    check(found, lambda n: (flat(a, n) + flat(b, n)) / 2, 1e-7)
    assert {values.dtype for values in found.values()} == {torch.float32}
    assert stock(tmp_path / "out").config.dtype == torch.float32


def test_a_stored_head_that_is_tied_is_left_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = checkpoint("llama", tie_word_embeddings=True)
    embedding = tensors(plain)["model.embed_tokens.weight"]
    stored = rewrite(plain, tmp_path / "stored", {"lm_head.weight": embedding.clone()})
    found = merge("linear", [plain, stored], tmp_path / "out")
    assert found.keys() == tensors(plain).keys()
    assert drift(plain, tmp_path / "out") == 0


@pytest.mark.parametrize("method", ["ties", "tsv-m"])
def test_mixtures_are_merged_like_other_models(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A rule for matrices sees those of every expert, whatever tensor holds them."""
    layouts = ["per-expert", "fused"] if method == "tsv-m" else ["per-expert"]
    results = []
    for layout in layouts:
        sources = [checkpoint("qwen3_moe", layout=layout, seed=seed) for seed in range(3)]
        merge(method, sources, tmp_path / layout)
        results.append(tmp_path / layout)
        stock(tmp_path / layout)
    assert drift(results[0], results[-1]) < 1e-5


def test_what_does_not_belong_together_is_refused(
    checkpoint: Checkpoint, folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is qwen3"):
        merge("linear", [folders[0], checkpoint("qwen3")], out)
    with pytest.raises(InputError, match="2 or more models"):
        merge("linear", folders[:1], out)
    with pytest.raises(InputError, match="base model and 1 or more") as caught:
        merge("ties", folders[:1], out)
    assert caught.value.hint == "the first source is the base"
    with pytest.raises(InputError, match="base model and 2 or more"):
        merge("model-stock", folders[:2], out)
    with pytest.raises(InputError, match="between two models"):
        merge("slerp", folders, out)
    with pytest.raises(UsageError, match="3 numbers for 2 models"):
        merge("ties", folders, out, weights="1,1,1")
    with pytest.raises(UsageError, match="have the sum 0"):
        merge("linear", folders, out, weights="1,1,-2")
    with pytest.raises(UsageError, match="probabilities from"):
        merge("della", folders, out, density=1.0, window=0.2)
    with pytest.raises(UsageError, match="--density"):
        merge("ties", folders, out, density=0.0)
    assert not out.exists()


def test_a_sweep_makes_every_mixture_and_a_manifest(
    folders: list[Path], tmp_path: Path, call_cli: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    made = call_cli(
        "merge", *folders[:2], "--method", "linear", "--sweep", "simplex:step=0.5", "-o", out, "-q"
    )
    assert made.code == 0, made.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["weights"] for entry in manifest["outputs"]] == [[0, 1], [0.5, 0.5], [1, 0]]
    names = {entry["folder"] for entry in manifest["outputs"]}
    assert {path.name for path in out.iterdir()} == names | {"manifest.json"}
    before = [tensors(folder) for folder in folders[:2]]
    check(tensors(out / "w_0_1"), lambda name: flat(before[1], name), 1e-7)
    check(
        tensors(out / "w_0.5_0.5"), lambda name: (flat(before[0], name) + flat(before[1], name)) / 2
    )
    assert call_cli("verify", out / "w_0.5_0.5", "-q").code == 0
    for wrong in ("simplex:step=0.3", "grid", "simplex:step=0"):
        with pytest.raises(UsageError, match="is no grid"):
            merge("linear", folders, tmp_path / "x", sweep=wrong)
    with pytest.raises(UsageError, match="exclude"):
        merge("linear", folders, tmp_path / "x", sweep="simplex:step=1", weights="1,1,1")


def test_a_simplex_has_as_many_points_as_there_are_ways_to_share() -> None:
    found = simplex("simplex:step=0.25", 3)
    assert len(found) == len(set(found)) == 15
    assert all(sum(weights) == 1 for weights in found)


# RegMean


@pytest.fixture(scope="module")
def grams(folders: list[Path]) -> list[Path]:
    """Gram matrices of the inputs of every model."""
    return [grams_of(folder) for folder in folders[:2]]


def test_regmean_solves_the_least_squares(
    folders: list[Path], grams: list[Path], tmp_path: Path
) -> None:
    """The gradient of the weighted loss on each model's inputs vanishes, but for what the damping adds."""
    from moesurg.surgery.architectures.linears import linears
    from moesurg.surgery.architectures.model import Model

    both = ",".join(map(str, grams))
    options = {"grams": both, "ratio": 1.0, "damping": 1e-9, "weights": "1,3"}
    found = merge("regmean", folders[:2], tmp_path / "out", **options)
    before = [tensors(folder) for folder in folders[:2]]
    for linear in linears(Model.open(folders[0])):
        name, pull, size = linear.region.tensor, torch.zeros(()).double(), 0.0
        for weight, model, folder in zip((0.25, 0.75), before, grams, strict=True):
            gram, rows = Grams.open(folder).read(linear.layer, linear.module)
            part = weight * (flat(found, name) - flat(model, name)) @ gram.double() / rows
            pull, size = pull + part, size + float(part.norm())
        assert float(pull.norm()) < 1e-4 * size, name
    norm = "model.norm.weight"
    mean = (flat(before[0], norm) + 3 * flat(before[1], norm)) / 4
    assert torch.allclose(flat(found, norm), mean, atol=1e-7)


def test_regmean_of_equal_models_and_of_wrong_folders(
    folders: list[Path], grams: list[Path], tmp_path: Path
) -> None:
    twice = f"{grams[0]},{grams[0]}"
    found = merge("regmean", [folders[0]] * 2, tmp_path / "out", grams=twice)
    check(found, lambda name: flat(tensors(folders[0]), name), 1e-7)
    with pytest.raises(InputError, match="statistics of another model"):
        merge("regmean", folders[:2], tmp_path / "x", grams=f"{grams[1]},{grams[0]}")
    with pytest.raises(UsageError, match="1 folders for 2 models"):
        merge("regmean", folders[:2], tmp_path / "x", grams=str(grams[0]))
