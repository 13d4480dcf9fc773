"""MixLoRA scaffolds: every adapter's change is in its expert, and what the loader reads computes the mixture."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesurg.surgery.adapters.adapter import Adapter
from moesurg.surgery.checkpoint import fs
from moesurg.surgery.errors import InputError, RefusedError, UsageError, VerificationError
from moesurg.surgery.job import plan_of
from moesurg.surgery.methods import load
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.faults.harness import digest, effects, observed
from tests.oracle.helpers import operate, stock, token_ids
from tests.oracle.test_adapter_tools import adapted
from tests.oracle.test_adapters import changes

Checkpoint = Callable[..., Path]
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALL = ("self_attn.q_proj", "self_attn.o_proj", *FEED_FORWARD)
SHAPES = {"q_proj": (32, 32), "o_proj": (32, 32), "gate_proj": (48, 32), "up_proj": (48, 32)}
SHAPES["down_proj"] = (32, 48)


def mixed(checkpoint: Checkpoint) -> list[Path]:
    """Three adapters with different ranks, scales and targets; the second lacks the last layer."""
    return [
        checkpoint("adapter", seed=1, rank=2, alpha=8, targets=ALL),
        checkpoint("adapter", seed=2, rank=3, use_rslora=True, targets=FEED_FORWARD[1:], layers=2),
        checkpoint(
            "adapter", seed=3, rank=4, alpha=-3, targets=("self_attn.q_proj", FEED_FORWARD[2])
        ),
    ]


def scaffold(folders: list[Path], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors that the loader reads."""
    operate("adapter", "to-moe", folders, out, form="mixlora", act_fn="silu", **options)
    found: dict[str, torch.Tensor] = torch.load(
        out / "mixlora" / "adapter_model.bin", weights_only=True
    )
    return found


def product(stored: dict[str, torch.Tensor], place: str) -> torch.Tensor:
    down, up = (stored[f"mixlora.layers.{place}.lora_{part}.weight"].double() for part in "AB")
    return up @ down


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "mixlora" / "adapter_config.json").read_text())
    return found


def mixture_logits(base: Path, out: Path) -> torch.Tensor:
    """The mixture in float64, from its definition: dense experts, weighted by renormalised top-k shares."""
    stored = torch.load(out / "mixlora" / "adapter_model.bin", weights_only=True)
    config, model = config_of(out), stock(base).double()
    scale = config["lora_alpha"] / config["r"]
    for index, layer in enumerate(model.model.layers):
        for name in config["target_modules"]:
            if hasattr(layer.self_attn, name):
                weight = getattr(layer.self_attn, name).weight
                weight.data += scale * product(stored, f"{index}.self_attn.{name}")

        def forward(x: torch.Tensor, index: int = index, mlp: Any = layer.mlp) -> torch.Tensor:
            gate = stored[f"mixlora.layers.{index}.mlp.moe_gate.weight"].double()
            top, chosen = (x @ gate.T).softmax(-1).topk(config["top_k"], dim=-1)
            shares = torch.zeros(*x.shape[:-1], config["num_experts"], dtype=torch.float64)
            shares.scatter_(-1, chosen, top / top.sum(-1, keepdim=True))
            total = torch.zeros_like(x)
            for expert in range(config["num_experts"]):
                weights = {
                    name: getattr(mlp, name).weight
                    + scale * product(stored, f"{index}.mlp.{name}.experts.{expert}")
                    if name in config["target_modules"]
                    else getattr(mlp, name).weight
                    for name in ("gate_proj", "up_proj", "down_proj")
                }
                inner = torch.nn.functional.silu(x @ weights["gate_proj"].T)
                inner = inner * (x @ weights["up_proj"].T)
                total += shares[..., expert, None] * (inner @ weights["down_proj"].T)
            return total

        layer.mlp.forward = forward
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids(base)).logits
    return found


def test_every_expert_is_its_adapter_and_attention_their_mean(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders, out = mixed(checkpoint), tmp_path / "out"
    stored = scaffold(folders, out)
    own = [changes(folder) for folder in folders]
    expected_names = {f"mixlora.layers.{layer}.mlp.moe_gate.weight" for layer in range(3)}
    for layer in range(3):
        for target in ALL:
            part, name = target.split(".")
            there = [found.get(f"model.layers.{layer}.{target}") for found in own]
            experts = range(3) if part == "mlp" else (None,)
            for expert in experts:
                place = f"{layer}.{part}.{name}" + ("" if expert is None else f".experts.{expert}")
                expected_names |= {f"mixlora.layers.{place}.lora_{p}.weight" for p in "AB"}
                assert stored[f"mixlora.layers.{place}.lora_A.weight"].shape[0] == 4
                expected = torch.zeros(SHAPES[name], dtype=torch.float64)
                if expert is None:
                    expected += sum(change for change in there if change is not None) / 3
                    u, s, vt = torch.linalg.svd(expected)
                    expected = u[:, :4] * s[:4] @ vt[:4]
                elif there[expert] is not None:
                    expected += there[expert]
                torch.testing.assert_close(product(stored, place), expected, atol=1e-5, rtol=1e-5)
    assert set(stored) == expected_names
    gates = torch.stack([stored[name] for name in expected_names if "gate.weight" in name])
    assert gates.shape == (3, 3, 32)
    assert gates.std() == pytest.approx(0.02, rel=0.2)
    twin = load_file(out / "mixlora" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in twin.items())
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], config["num_experts"]) == (4, 4, 3)
    assert config["top_k"] == 2
    listing = json.loads((out / "shelf.json").read_text())
    assert listing["trained"] is False
    assert listing["members"] == {}
    assert "untrained" in (out / "README.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert report["output"]["files"]["mixlora/adapter_model.bin"]["of"] in report["output"]["files"]
    scaffold(folders, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(out)
    other = scaffold(folders, tmp_path / "other", seed=1)
    name = "mixlora.layers.0.mlp.moe_gate.weight"
    assert not torch.equal(other[name], stored[name])


def test_experts_that_are_all_one_adapter_are_that_adapter(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Whatever the routers say."""
    base = checkpoint("llama")
    one = checkpoint("adapter", seed=5, rank=3, alpha=9, targets=ALL, std=0.1)
    scaffold([one, one], tmp_path / "out", top_k=1)
    found = mixture_logits(base, tmp_path / "out").float()
    torch.testing.assert_close(found, adapted(base, one), atol=1e-4, rtol=1e-4)


def test_padding_contributes_nothing_and_can_be_trained(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = mixed(checkpoint)
    plain = scaffold(folders, tmp_path / "plain")
    wide = scaffold(folders, tmp_path / "wide", rank=9, layers=4)
    for layer, expert in ((0, 0), (2, 1)):
        place = f"{layer}.mlp.up_proj.experts.{expert}"
        torch.testing.assert_close(product(wide, place), product(plain, place))
    # A layer that no adapter changes, and which the loader asks for all the same.
    for place in ("3.self_attn.q_proj", "3.mlp.down_proj.experts.2"):
        assert not product(wide, place).any()
        down = wide[f"mixlora.layers.{place}.lora_A.weight"]
        assert down.abs().amin(dim=1).gt(0).all()
        assert down.abs().max() <= down.shape[1] ** -0.5
    assert wide["mixlora.layers.3.mlp.moe_gate.weight"].any()


def test_the_error_of_attention_is_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = mixed(checkpoint)
    own = [changes(folder) for folder in folders]
    name = "model.layers.0.self_attn.q_proj"
    mean = sum(found[name] for found in own if name in found) / 3
    scaffold(folders, tmp_path / "out")
    s = torch.linalg.svdvals(torch.as_tensor(mean))
    units = json.loads((tmp_path / "out" / "report.json").read_text())["units"]
    expected = float(s[4:].norm() / s.norm())
    assert expected > 0.05
    assert units["layers.0.self_attn.q_proj"]["error"] == pytest.approx(expected, rel=1e-6)
    checked = verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())
    assert checked["exactness"]["measured"] >= expected
    exact = scaffold(folders, tmp_path / "exact", rank=6)
    torch.testing.assert_close(product(exact, "0.self_attn.q_proj"), mean, atol=1e-5, rtol=1e-5)
    dropped = scaffold(folders, tmp_path / "dropped", attention="drop")
    assert not [name for name in dropped if "self_attn" in name]
    assert config_of(tmp_path / "dropped")["target_modules"] == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]


def test_the_loader_computes_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import mixlora

    base, out = checkpoint("llama"), tmp_path / "out"
    scaffold(mixed(checkpoint), out)
    config, weights = mixlora.load_adapter_weights(str(out / "mixlora"), device="cpu")
    model = stock(base)
    mixlora.inject_adapter_in_model(model, config, weights)
    with torch.no_grad():
        found = model(input_ids=token_ids(base)).logits
    expected = mixture_logits(base, out).float()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def fake(checkpoint: Checkpoint, tmp_path: Path, name: str) -> Path:
    """An adapter whose feed-forward module goes by another name."""
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    extra = {f"base_model.model.{name}.lora_A.weight": down}
    extra[f"base_model.model.{name}.lora_B.weight"] = up
    from fixtures import random_adapters

    targets = [name.rpartition(".")[2]]
    return random_adapters.build(
        tmp_path / name, targets=(), extra=extra, rank=2, target_modules=targets
    )


def test_activations_are_told_by_names_where_they_can_be(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for name, expected in (("fc1", "gelu_new"), ("gate_up_proj", "silu")):
        folder = fake(checkpoint, tmp_path, f"model.layers.0.mlp.{name}")
        operate("adapter", "to-moe", [folder, folder], tmp_path / expected, form="mixlora")
        assert config_of(tmp_path / expected)["act_fn"] == expected


@pytest.mark.parametrize(
    ("adapter", "options", "error", "message"),
    [
        ({}, {}, UsageError, "cannot be told"),
        ({}, {"rank": 2}, UsageError, "at least 3"),
        ({}, {"layers": 2}, UsageError, "--layers 2 should be at least 3"),
        ({}, {"hidden_size": 32}, UsageError, "--hidden-size is for --form x-lora"),
        ({}, {"temperature": 2.0}, UsageError, "--temperature is not for"),
        ({}, {"form": "arrow", "rank": 4}, UsageError, "--rank is for --form mixlora"),
        (
            {"layers_to_transform": [0, 1, 2]},
            {"act_fn": "silu"},
            UsageError,
            "how many the base has",
        ),
        (
            {"base_model_name_or_path": None},
            {"act_fn": "silu"},
            InputError,
            "base_model_name_or_path",
        ),
        ({"task_type": "SEQ_CLS"}, {"act_fn": "silu"}, InputError, "task_type is 'SEQ_CLS'"),
        ({"targets": ALL[:1]}, {"act_fn": "silu"}, InputError, "would all be the same"),
    ],
)
def test_what_the_loader_cannot_take_is_refused(
    adapter: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    folder = checkpoint("adapter", **{"targets": FEED_FORWARD, **adapter})
    with pytest.raises(error, match=message):
        operate(
            "adapter",
            "to-moe",
            [folder, folder],
            tmp_path / "out",
            **{"form": "mixlora", **options},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.language_model.layers.0.mlp.fc1", "MixLoRA knows no other"),
        ("model.layers.0.mlp.w1", "mlp.w1, and no model type"),
    ],
)
def test_modules_that_the_loader_never_sees_are_refused(
    name: str, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = fake(checkpoint, tmp_path, name)
    with pytest.raises(InputError, match=message):
        operate("adapter", "to-moe", [folder, folder], tmp_path / "out", form="mixlora")


def test_the_archive_fails_stops_resumes_and_is_verified(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("adapter", targets=FEED_FORWARD[:1], layers=1)
    sources, options = (str(folder), str(folder)), {"form": "mixlora", "act_fn": "silu"}
    request = Request("adapter", "to-moe", sources, tmp_path / "out", options, workers=1)
    archive = "adapter_model.bin"
    whole = Request("adapter", "to-moe", sources, tmp_path / "whole", options, workers=1)
    seen = effects(lambda: run(whole, Silent()))
    count = sum(path.name == archive for _, path in seen)
    assert count > 10

    def at(k: int, error: BaseException) -> Callable[[str, Path], None]:
        left = [k]

        def before(effect: str, path: Path) -> None:
            left[0] -= path.name == archive
            if left[0] < 0:
                left[0] = 10**9
                raise error

        return before

    for k in range(0, count, 3):
        with (
            observed(at(k, OSError(errno.ENOSPC, "No space left on device"))),
            pytest.raises(RefusedError, match="disk full"),
        ):
            run(request, Silent())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
        with observed(at(k, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
            run(request, Silent())
        run(Request(**{**vars(request), "resume": True}), Silent())
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")
        fs.rmtree(tmp_path / "out")
    file = tmp_path / "whole" / "mixlora" / archive
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=archive):
        verify(str(tmp_path / "whole"), reference=None, device="cpu", progress=Silent())


def test_the_archive_counts_as_room_that_is_needed(checkpoint: Checkpoint) -> None:
    adapters = [Adapter.open(checkpoint("adapter", targets=FEED_FORWARD))] * 2
    method = load("adapter", "to-moe", "adapters")
    options = method.parse({"form": "mixlora", "act_fn": "silu"})
    request = Request("adapter", "to-moe", (), None)
    plan = plan_of(request, adapters, method.plan(adapters, options), options)
    assert plan.disk_bytes > 2 * plan.bytes
    assert type(plan).from_json(plan.to_json()).archives == plan.archives
