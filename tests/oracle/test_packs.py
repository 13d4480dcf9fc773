"""Packs: what is taken out is what went in, as far as the basis reaches; sizes are what the formulas say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.adapters.adapter import Adapter
from moesurg.surgery.errors import InputError, RefusedError, UsageError
from moesurg.surgery.linalg import reversible
from moesurg.surgery.packs import Pack, task_names
from tests.conftest import Result
from tests.oracle.helpers import drift, operate, peft, tensors, token_ids

Checkpoint = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """The change of every linear module's weight."""
    adapter, stored = Adapter.open(folder), tensors(folder)
    return {
        name: module.scale * stored[module.up.tensor].double() @ stored[module.down.tensor].double()
        for name, module in adapter.modules.items()
    }


def distance(first: Path, second: Path) -> float:
    one, two = changes(first), changes(second)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).norm() / two[name].norm()) for name in one)


def pack(adapters: list[Path], folder: Path, **options: Any) -> dict[str, Any]:
    operate("merge", "rmm", adapters, folder, **{"allow_larger": True, **options})
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def taken(folder: Path, name: str, output: Path) -> Path:
    operate("revert", Pack.open(folder).kind, folder, output, task=name)
    return output


# The fit


@pytest.mark.parametrize("shared", [False, True])
def test_the_known_answer(shared: bool) -> None:
    """One position, so that both bases are the same; numbers from the principal components on paper."""
    x = torch.tensor([[[1.0, 3.0, 5.0], [0.0, 1.0, -1.0]]]).double()
    found = reversible.fit(x, 1, shared=shared)
    assert found.mean_PR.tolist() == [[3, 0]]
    wanted = [[1.167950, 2.722650, 5.109400], [0.554700, 0.083975, -0.638675]]
    rebuilt = torch.stack([found.rebuild(task)[0] for task in range(3)], dim=-1)
    assert torch.allclose(rebuilt, torch.tensor(wanted).double(), atol=1e-6)
    assert float((rebuilt - x[0]).square().sum()) == pytest.approx(1.394449, abs=1e-6)
    assert found.tails[1] ** 2 * float(x.square().sum()) == pytest.approx(1.394449, abs=1e-6)
    full = reversible.fit(x, 2, shared=shared)
    assert all(torch.allclose(full.rebuild(task), x[..., task]) for task in range(3))


@pytest.mark.parametrize("shared", [False, True])
def test_more_directions_never_lose_more(shared: bool) -> None:
    x = torch.randn(7, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = reversible.fit(x, 4, shared=shared)
    for count in range(5):
        rebuilt = torch.stack([full.rebuild(task, count) for task in range(5)], dim=-1)
        error = float((rebuilt - x).norm() / x.norm())
        assert error == pytest.approx(full.tails[count], abs=1e-9)
    assert full.tails == sorted(full.tails, reverse=True)
    # Order of the adapters changes the order of the coefficients alone.
    order = [3, 0, 4, 1, 2]
    other = reversible.fit(x[..., order], 2, shared=shared)
    for place, task in enumerate(order):
        assert torch.allclose(other.rebuild(place), full.rebuild(task, 2), atol=1e-9)


def test_procrustes_undoes_a_rotation() -> None:
    generator = torch.Generator().manual_seed(1)
    down, up = (
        torch.randn(2, *s, dtype=torch.float64, generator=generator) for s in ((3, 8), (6, 3))
    )
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    mixed = reversible.turned((down, up), turn)
    assert torch.allclose(mixed[1] @ mixed[0], up @ down)
    found = reversible.turned(mixed, reversible.turn(mixed, (down, up)))
    assert torch.allclose(found[0], down)
    assert torch.allclose(found[1], up)


# Adapters


@pytest.fixture(scope="module")
def adapters(checkpoint: Checkpoint) -> list[Path]:
    """Different alphas and scales, one rank."""
    return [
        checkpoint("adapter", seed=0),
        checkpoint("adapter", seed=1, alpha=5, use_rslora=True),
        checkpoint("adapter", seed=2, alpha=9),
        checkpoint("adapter", seed=3),
    ]


@pytest.mark.parametrize("form", ["position", "global"])
@pytest.mark.parametrize("align", ["procrustes", "none"])
def test_a_full_basis_gives_every_adapter_back(
    form: str, align: str, adapters: list[Path], tmp_path: Path
) -> None:
    pack(adapters, tmp_path / "pack", basis=3, form=form, align=align)
    names = Pack.open(tmp_path / "pack").names
    for name, adapter in zip(names, adapters, strict=True):
        assert distance(taken(tmp_path / "pack", name, tmp_path / name), adapter) < 1e-6


def test_peft_runs_what_is_taken_out_like_what_went_in(
    checkpoint: Checkpoint, adapters: list[Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    pack(adapters, tmp_path / "pack", basis=3)
    found = taken(tmp_path / "pack", Pack.open(tmp_path / "pack").names[1], tmp_path / "out")
    ids = token_ids(base)
    with torch.no_grad():
        before, after = (peft(base, f)(input_ids=ids).logits for f in (adapters[1], found))
    assert float((before - after).abs().max()) < 1e-4


@pytest.mark.parametrize("form", ["position", "global"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_factors_come_back_as_they_were(
    form: str, dtype: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Also of different ranks and scales: same config, same type, and in half precision the same values."""
    folders = [
        checkpoint("adapter", seed=0, rank=2, dtype=dtype),
        checkpoint("adapter", seed=1, rank=4, alpha=5, use_rslora=True, dtype=dtype),
        checkpoint("adapter", seed=2, rank=3, alpha=-9, dtype=dtype),
    ]
    made = tmp_path / "pack"
    pack(folders, made, basis=2, form=form, pad=True, exact_factors=True)
    for name, folder in zip(Pack.open(made).names, folders, strict=True):
        out = taken(made, name, tmp_path / name)
        mine, own = tensors(out), tensors(folder)
        assert mine.keys() == own.keys()
        for key, value in own.items():
            assert mine[key].dtype == value.dtype
            torch.testing.assert_close(mine[key], value, atol=1e-6, rtol=0)
            if dtype == "bfloat16":
                assert float((mine[key] == value).float().mean()) > 0.99
        assert Adapter.open(out).config.raw == Adapter.open(folder).config.raw


@pytest.mark.slow
def test_trained_adapters_compute_what_they_did(smollm2: Path, tmp_path: Path) -> None:
    """Three adapters of a real model, of ranks 8 and 16, stored in bfloat16."""
    folders = [ROOT / "fixtures" / "adapters" / name for name in ("bible", "german", "python")]
    made = tmp_path / "pack"
    pack(folders, made, basis=2, form="global", pad=True, exact_factors=True)
    ids = token_ids(smollm2, length=32, rows=1)
    for name, folder in zip(Pack.open(made).names, folders, strict=True):
        out = taken(made, name, tmp_path / name)
        with torch.no_grad():
            before, after = (peft(smollm2, f)(input_ids=ids).logits for f in (folder, out))
        assert float((before - after).abs().max()) < 1e-4


def test_a_scale_of_zero_cannot_be_taken_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = [checkpoint("adapter", seed=seed, alpha=alpha) for seed, alpha in ((0, 0), (1, 4))]
    with pytest.raises(InputError, match="has the scale 0"):
        pack(folders, tmp_path / "pack", basis=1, exact_factors=True)


def test_fewer_directions_lose_what_the_report_says(adapters: list[Path], tmp_path: Path) -> None:
    report = pack(adapters, tmp_path / "pack", basis=1)
    names = Pack.open(tmp_path / "pack").names
    found = max(
        distance(taken(tmp_path / "pack", name, tmp_path / name), adapter)
        for name, adapter in zip(names, adapters, strict=True)
    )
    units = report["units"].values()
    assert found == pytest.approx(max(unit["error"] for unit in units), rel=1e-4)
    for unit in units:
        errors = [error for _, _, error in unit["curve"]]
        assert errors[-1] < 1e-9 < errors[1] < errors[0]
        # (p (r + T) + r) / (r T) at every position, with r = 3 and T = 4
        assert [size for _, size, _ in unit["curve"]] == pytest.approx(
            [(p * 7 + 3) / 12 for p in range(4)]
        )
        assert unit["truncation"][-1][2] < 1e-6


def test_alignment_makes_a_basis_independent_of_rotations(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Adapters that differ by a rotation of their ranks alone are one adapter, and need no direction."""
    plain = checkpoint("adapter")
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2))).Q
    from safetensors.torch import save_file

    save_file(
        {
            name: (turn @ value if "lora_A" in name else value @ turn.T).contiguous()
            for name, value in tensors(plain).items()
        },
        turned / "adapter_model.safetensors",
    )
    report = pack([plain, turned], tmp_path / "pack", basis=0)
    assert max(unit["error"] for unit in report["units"].values()) < 1e-6
    loose = pack([plain, turned], tmp_path / "loose", basis=0, align="none")
    assert max(unit["error"] for unit in loose["units"].values()) > 0.1


def test_ranks_that_differ_are_padded_on_request(checkpoint: Checkpoint, tmp_path: Path) -> None:
    mixed = [checkpoint("adapter", rank=2), checkpoint("adapter", rank=4, seed=1)]
    with pytest.raises(InputError, match="has the ranks 2, 4"):
        pack(mixed, tmp_path / "pack", basis=1)
    pack(mixed, tmp_path / "pack", basis=1, pad=True)
    for name, adapter in zip(Pack.open(tmp_path / "pack").names, mixed, strict=True):
        found = taken(tmp_path / "pack", name, tmp_path / name)
        assert distance(found, adapter) < 1e-6
        assert Adapter.open(found).config.rank == Adapter.open(adapter).config.rank


def test_a_module_that_one_adapter_lacks_is_not_given_to_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    some = [checkpoint("adapter", targets=("self_attn.q_proj",)), checkpoint("adapter", seed=1)]
    pack(some, tmp_path / "pack", basis=1)
    for name, adapter in zip(Pack.open(tmp_path / "pack").names, some, strict=True):
        assert distance(taken(tmp_path / "pack", name, tmp_path / name), adapter) < 1e-6


def test_packs_that_save_nothing_and_bases_that_cannot_be_are_refused(
    checkpoint: Checkpoint, adapters: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="times the bytes"):
        pack(adapters, tmp_path / "pack", basis=3, allow_larger=False)
    with pytest.raises(UsageError, match="should be 0 to 3"):
        pack(adapters, tmp_path / "pack", basis=4)
    biased = checkpoint("adapter", lora_bias=True, extra=None)
    with pytest.raises(InputError, match="has lora_B"):
        pack([biased, biased], tmp_path / "pack", basis=1)
    assert not (tmp_path / "pack").exists()


# Models


@pytest.fixture(scope="module")
def low_rank(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes whose matrices changed by rank 2."""
    from tests.oracle.helpers import rewrite

    base = checkpoint("llama")
    folder = tmp_path_factory.mktemp("tuned")
    found = [base]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        changed = {}
        for name, value in tensors(base).items():
            change = torch.randn(value.shape[0], 2, generator=generator) * 0.05
            if value.dim() == 2:
                changed[name] = value + change @ torch.randn(2, value.shape[1], generator=generator)
            else:
                changed[name] = value + change[:, 0]
        found.append(rewrite(base, folder / f"task{seed}", changed))
    return found


def test_fine_tunes_of_low_rank_come_back(low_rank: list[Path], tmp_path: Path) -> None:
    operate("merge", "tsv-c", low_rank, tmp_path / "pack", rank=2)
    held = Pack.open(tmp_path / "pack")
    assert held.names == ["task0", "task1"]
    for name, original in zip(held.names, low_rank[1:], strict=True):
        found = taken(tmp_path / "pack", name, tmp_path / name)
        assert drift(found, original) < 1e-4
        norms = "model.norm.weight"
        assert torch.equal(tensors(found)[norms], tensors(original)[norms])
    size = sum(value.numel() for value in tensors(tmp_path / "pack").values())
    base = tensors(low_rank[0])
    wanted = sum(
        value.numel() + 2 * (2 * sum(value.shape) if value.dim() == 2 else value.numel())
        for value in base.values()
    )
    assert size == wanted


def test_less_rank_loses_the_tail_of_the_singular_values(
    low_rank: list[Path], tmp_path: Path
) -> None:
    operate("merge", "tsv-c", low_rank, tmp_path / "pack", rank=1)
    report = json.loads((tmp_path / "pack" / "report.json").read_text())
    before, after = tensors(low_rank[0]), tensors(low_rank[1])
    found = tensors(taken(tmp_path / "pack", "task0", tmp_path / "out"))
    for name, value in after.items():
        if value.dim() == 2:
            change = (value - before[name]).double()
            sigma = torch.linalg.svdvals(change)
            wanted = float(sigma[1:].norm() / sigma.norm())
            assert report["units"][f"0.{name}"]["error"] == pytest.approx(wanted, rel=1e-4)
            error = float((found[name].double() - value.double()).norm() / sigma.norm())
            assert error == pytest.approx(wanted, rel=1e-3)


def test_a_pack_of_mixtures_has_factors_for_every_expert(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    sources = [checkpoint("qwen3_moe", layout="fused", seed=seed) for seed in range(3)]
    operate("merge", "tsv-c", sources, tmp_path / "pack", rank=30, allow_larger=True)
    name = Pack.open(tmp_path / "pack").names[0]
    found = taken(tmp_path / "pack", name, tmp_path / "out")
    assert tensors(found).keys() == tensors(sources[1]).keys()


# The command


def test_revert_all_names_folders_after_the_inputs(
    low_rank: list[Path], tmp_path: Path, call_cli: Callable[..., Result]
) -> None:
    operate("merge", "tsv-c", low_rank, tmp_path / "pack", rank=2)
    made = call_cli("revert", tmp_path / "pack", "--all", "-o", tmp_path / "out", "--json", "-q")
    assert made.code == 0, made.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["task0", "task1"]
    assert call_cli("verify", tmp_path / "out" / "task1", "-q").code == 0
    assert call_cli("verify", tmp_path / "pack", "-q").code == 0
    every = json.loads(call_cli("verify", tmp_path / "out", "--json", "-q").out)
    assert [Path(output["folder"]).name for output in every["outputs"]] == ["task0", "task1"]
    assert "2 outputs" in call_cli("verify", tmp_path / "out", "-q").out
    weights = tmp_path / "out" / "task1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    broken = call_cli("verify", tmp_path / "out", "-q")
    assert broken.code == 5
    assert str(weights) in broken.err
    unknown = call_cli("revert", tmp_path / "pack", "--task", "x", "-o", tmp_path / "x", "-q")
    assert unknown.code == 2
    assert "task0, task1" in unknown.err
    assert call_cli("revert", tmp_path / "pack", "-o", tmp_path / "x", "-q").code == 2
    nested = call_cli(
        "merge", tmp_path / "pack", low_rank[0], "--method", "linear", "-o", tmp_path / "x"
    )
    assert nested.code == 3
    assert "revert" in nested.err


def test_inputs_of_one_name_are_numbered() -> None:
    cached = Path("/c/models--o--n/snapshots/0123abcd")
    assert task_names([Path("/a/x"), Path("/b/x"), cached]) == ["x-1", "x-2", "n"]


@pytest.mark.parametrize("damage", ["rank", "tasks", "basis"])
def test_a_pack_that_was_changed_is_refused_by_name(
    damage: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pair = [checkpoint("adapter", seed=seed) for seed in (1, 2)]
    operate("merge", "rmm", pair, tmp_path / "pack", basis=1, allow_larger=True)
    file = tmp_path / "pack" / "pack.json"
    document = json.loads(file.read_text())
    for part in document["parts"].values():
        del part[damage]
    file.write_text(json.dumps(document))
    task = document["tasks"][0]["name"]
    with pytest.raises(InputError, match=r"pack\.json: does not say what"):
        operate("revert", "rmm", tmp_path / "pack", tmp_path / "out", task=task)
    assert not (tmp_path / "out").exists()
