"""What ``inspect`` tells of adapters, packs and shelves, against PEFT, dense products and what is taken out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.errors import InputError
from moesurg.surgery.inspecting import inspect
from tests.conftest import Result
from tests.oracle.helpers import operate, stock
from tests.oracle.test_adapters import changes

Checkpoint = Callable[..., Path]
Cli = Callable[..., Result]


def told(*folders: Path, **options: Any) -> Any:
    return inspect(list(map(str, folders)), **options)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


# Adapters


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A mixture under PEFT with layers, stacked experts, patterns and a module in full, and its saved adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"v_proj": 7},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(stock(checkpoint("qwen3_moe")), config)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(str(folder))
    return model, folder


def wrapped(model: Any) -> dict[str, Any]:
    """PEFT's layers by the names that files have for them."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def test_facts_are_those_of_peft(trained: tuple[Any, Path]) -> None:
    model, folder = trained
    found = told(folder)
    layers, rows = wrapped(model), {row["module"]: row for row in found["per_module"]}
    assert layers.keys() == rows.keys()
    for name, layer in layers.items():
        row = rows[name]
        assert row["rank"] == layer.r["default"]
        assert row["alpha"] == layer.lora_alpha["default"]
        assert row["scale"] == pytest.approx(layer.scaling["default"], rel=1e-12)
        factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        assert row["parameters"] == sum(factor.numel() for factor in factors)
    assert len({(row["rank"], row["alpha"]) for row in found["ranks"]}) == 3
    assert sum(row["modules"] for row in found["ranks"]) == found["modules"]["count"] == len(layers)
    trainable, _ = model.get_nb_trainable_parameters()
    assert found["parameters"]["total"] == trainable
    assert found["parameters"]["full"] == found["full"][0]["parameters"]
    assert found["full"][0]["tensor"] == "lm_head.weight"
    assert found["modules"]["kinds"]["experts"] == found["experts"]["modules"] == 6
    assert found["experts"]["counts"] == [8]
    assert found["experts"]["layout"] == "cannot be told from the file"
    assert found["scaling"] == "alpha / sqrt(rank)"
    assert found["bytes"] == 4 * found["parameters"]["total"]


def test_norms_are_those_of_peft_s_own_changes(trained: tuple[Any, Path]) -> None:
    model, folder = trained
    with pytest.raises(InputError, match="stacks 8 experts of rank 3"):
        told(folder, weights=True)
    found = told(folder, weights=True, layout="peft")
    rows = {row["module"]: row for row in found["per_module"]}
    total = 0.0
    for name, layer in wrapped(model).items():
        with torch.no_grad():
            change = layer.double().get_delta_weight("default")
        assert rows[name]["norm"] == pytest.approx(float(change.norm()), rel=1e-9)
        total += float(change.square().sum())
    assert found["weights"]["norm"] == pytest.approx(math.sqrt(total), rel=1e-9)


def planted(checkpoint: Checkpoint, folder: Path) -> Path:
    """An adapter, one rank of whose first module is zero, and whose second module is zero altogether."""
    shutil.copytree(checkpoint("adapter", lora_bias=True), folder)
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][1] = 0
    stored["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][:] = 0
    save_file(stored, path, metadata={"format": "pt"})
    return folder


def test_measures_are_those_of_dense_changes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = planted(checkpoint, tmp_path / "adapter")
    before = files(folder)
    found = told(folder, weights=True)
    dense, stored = changes(folder), load_file(folder / "adapter_model.safetensors")
    dead = {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.self_attn.q_proj": 3}
    for row in found["per_module"]:
        values = torch.linalg.svdvals(dense[row["module"]])
        assert row["norm"] == pytest.approx(float(values.norm()), rel=1e-9)
        shares = values / values.sum()
        effective = float(torch.special.entr(shares).sum().exp()) if values.any() else 0.0
        assert row["effective_rank"] == pytest.approx(effective, rel=1e-6)
        assert row["dead_ranks"] == dead.get(row["module"], 0)
        bias = stored[f"base_model.model.{row['module']}.lora_B.bias"]
        assert row["bias_norm"] == pytest.approx(float((row["scale"] * bias.double()).norm()))
    assert found["weights"]["dead_ranks"] == 4
    assert found["weights"]["ranks"] == 18
    assert files(folder) == before


def test_cosines_are_those_of_all_changes_as_one_vector(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = checkpoint("adapter")
    options: dict[str, Any] = {"seed": 1, "rank": 2, "alpha": -5, "layers": 2}
    second = checkpoint("adapter", targets=("self_attn.q_proj", "mlp.up_proj"), **options)
    third = tmp_path / "third"  # the first, turned round
    shutil.copytree(first, third)
    config = json.loads((third / "adapter_config.json").read_text())
    config["lora_alpha"] *= -2
    (third / "adapter_config.json").write_text(json.dumps(config))
    found = told(first, second, third, weights=True)
    dense = [changes(folder) for folder in (first, second, third)]
    names = sorted({name for change in dense for name in change})
    shapes = {name: value.shape for change in dense for name, value in change.items()}
    flat = [
        torch.cat(
            [change.get(name, torch.zeros(shapes[name])).double().flatten() for name in names]
        )
        for change in dense
    ]
    for i, mine in enumerate(flat):
        for j, other in enumerate(flat):
            wanted = float(torch.nn.functional.cosine_similarity(mine, other, dim=0))
            assert found["cosines"]["cosines"][i][j] == pytest.approx(wanted, abs=1e-9)
    assert found["cosines"]["cosines"][0][2] == pytest.approx(-1)
    shared = {row["module"]: row["folders"] for row in found["cosines"]["per_module"]}
    assert shared["model.layers.0.self_attn.q_proj"] == [0, 1, 2]
    assert shared["model.layers.2.self_attn.q_proj"] == [0, 2]
    assert "model.layers.0.mlp.up_proj" not in shared
    for record, change in zip(found["sources"], flat, strict=True):
        assert record["weights"]["norm"] == pytest.approx(float(change.norm()), rel=1e-9)


# Packs


def test_a_pack_tells_what_taking_out_gives(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pack = checkpoint("pack", method="rmm", basis=1, allow_larger=True)
    found = told(pack)
    assert found["kind"] == "rmm"
    total = 0
    for task in found["tasks"]:
        out = tmp_path / task["name"]
        operate("revert", "rmm", pack, out, task=task["name"])
        taken = told(out)
        assert (taken["bytes"], taken["tensors"]) == (task["bytes"], task["tensors"])
        assert taken["base"]["name"] == task["of"]
        total += taken["bytes"]
    assert found["size"] == pytest.approx(found["bytes"] / total)
    # All modules are alike: (p (r + T) + r) / (r T) at every position, with r = 3 and T = 3
    sizes = [row["size"] for row in found["curve"]]
    assert sizes == pytest.approx([(p * 6 + 3) / 9 for p in range(3)])
    assert found["curve"][1]["size"] == pytest.approx(found["size"])
    errors = [row["error"] for row in found["curve"]]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-9
    report = json.loads((pack / "report.json").read_text())
    worst = max(unit["curve"][1][2] for unit in report["units"].values())
    assert found["curve"][1]["largest_error"] == worst
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("pack.json", "pack.safetensors"):
        shutil.copy(pack / name, bare / name)
    assert told(bare)["curve"] is None


def test_a_pack_of_models(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pack = checkpoint("pack", method="tsv-c", rank=2)
    found = told(pack)
    name = found["tasks"][1]["name"]
    operate("revert", "tsv-c", pack, tmp_path / "out", task=name)
    assert told(tmp_path / "out")["bytes"] == found["tasks"][1]["bytes"] == found["base_bytes"]
    assert found["size"] == pytest.approx(found["bytes"] / (3 * found["base_bytes"]))
    # An eighth, a quarter and a half of 2 are all 1.
    assert [row["part_of_triplets"] for row in found["curve"]] == [1 / 2, 1]
    errors = [row["error"] for row in found["curve"]]
    assert errors == sorted(errors, reverse=True)
    assert all(row["largest_error"] >= row["error"] for row in found["curve"])


@pytest.mark.parametrize("damage", ["rank", "tasks", "curve"])
def test_a_damaged_pack_is_named(
    damage: str, checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(checkpoint("pack", method="rmm", basis=1, allow_larger=True), folder)
    name = "report.json" if damage == "curve" else "pack.json"
    document = json.loads((folder / name).read_text())
    if damage == "curve":
        next(iter(document["units"].values()))["curve"] = [[0]]
    elif damage == "tasks":
        document["tasks"][1]["ranks"] = None
    else:
        del next(iter(document["parts"].values()))["rank"]
    (folder / name).write_text(json.dumps(document))
    shown = call_cli("inspect", folder)
    assert (shown.code, shown.out) == (3, "")
    assert f"{name}: does not say what this version of moesurg writes" in shown.err


# Folders of several


def test_a_shelf_tells_each_folder_and_its_list(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("adapter", rank=4)
    operate("adapter", "split", source, tmp_path / "out", ranks=3)
    found = told(tmp_path / "out", weights=True)
    assert found["format"] == "adapters"
    assert found["listed"]["sum"]
    assert [member["facts"]["first_rank"] for member in found["members"]] == [0, 3]
    assert found["parameters"] == {"total": told(source)["parameters"]["total"]}
    norms = [member["record"]["weights"]["norm"] for member in found["members"]]
    # Ranks are split by singular values, so that parts are orthogonal.
    whole = told(source, weights=True)["weights"]["norm"]
    assert math.hypot(*norms) == pytest.approx(whole, rel=1e-5)
    assert found["cosines"]["cosines"][0][1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "options"),
    [("arrow", {}), ("x-lora", {"hidden_size": 32}), ("mixlora", {"act_fn": "silu"})],
)
def test_mixtures_of_adapters_tell_their_router(
    form: str, options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    targets = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    folders = [checkpoint("adapter", seed=seed, targets=targets) for seed in (0, 1)]
    out = tmp_path / "out"
    operate("adapter", "to-moe", folders, out, form=form, **options)
    found = told(out)
    assert found["listed"]["router"] == form
    assert found["listed"]["trained"] is False
    assert found["listed"]["call"]
    assert ("router" in found) is (form != "arrow")
    assert found["provenance"]["method"] == "to-moe"
    stored = [load_file(path) for path in out.rglob("adapter_model.safetensors")]
    assert found["bytes"] == sum(value.nbytes for file in stored for value in file.values())
    shown = call_cli("inspect", out)
    assert (shown.code, shown.err) == (0, "")
    for words in (form, "trained", found["listed"]["call"]):
        assert words in shown.out
    if form == "mixlora":
        assert not found["members"]
        assert found["router"]["parameters"]["total"] == found["parameters"]["total"]


def test_a_base_with_its_adapter(checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli) -> None:
    options: dict[str, Any] = {"ratio": 0.2, "rank": 2, "group": 16, "form": "lora"}
    operate("compress", "residual", checkpoint("llama"), tmp_path / "out", **options)
    found = told(tmp_path / "out", weights=True)
    formats = {member["folder"]: member["record"]["format"] for member in found["members"]}
    assert formats == {"adapter": "adapter", "base": "model"}
    assert "cosines" not in found
    shown = call_cli("inspect", tmp_path / "out").out
    assert "LlamaForCausalLM" in shown
    assert "rank 2 on" in shown


def test_sweeps_and_folders_of_results(
    checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    folders = [checkpoint("adapter", seed=seed) for seed in (0, 1)]
    out = tmp_path / "sweep"
    line = ["merge", *folders, "--method", "cat", "--sweep", "simplex:step=0.5", "-o", out, "-q"]
    assert call_cli(*line).code == 0
    found = told(out, weights=True)
    assert found["format"] == "sweep"
    assert [member["facts"]["weights"] for member in found["members"]] == [
        [0, 1],
        [0.5, 0.5],
        [1, 0],
    ]
    mean = (1 + found["cosines"]["cosines"][0][2]) / 2  # of two unlike vectors of like norm
    assert found["cosines"]["cosines"][0][1] ** 2 == pytest.approx(mean, abs=0.05)
    shown = call_cli("inspect", tmp_path)
    assert shown.code == 0
    assert "w_0_1, w_0.5_0.5, w_1_0" in shown.out
    shutil.rmtree(out / "w_0_1")
    broken = call_cli("inspect", out)
    assert broken.code == 3
    assert "'w_0_1' is missing" in broken.err


def test_folders_are_in_natural_order_and_unfinished_ones_are_none(
    checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    for step in (10, 9):
        shutil.copytree(checkpoint("adapter"), tmp_path / f"checkpoint-{step}")
    staged = tmp_path / "out.moesurg-tmp"
    shutil.copytree(checkpoint("adapter"), staged)
    (tmp_path / "logs").mkdir()
    found = told(tmp_path)
    assert [member["folder"] for member in found["members"]] == ["checkpoint-9", "checkpoint-10"]
    shown = call_cli("inspect", staged)
    assert shown.code == 3
    assert "no output yet" in shown.err
    assert "--resume" in shown.err


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_statistics_tell_model_text_and_what_they_hold(
    family: str, checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    source, out = checkpoint(family), tmp_path / "stats"
    text = tmp_path / "words.txt"
    text.write_text("a few words of text\n" * 60)
    own = ["--inputs", 8, "--trace"] if family == "qwen3_moe" else ["--linear-grams"]
    line = ["calibrate", source, "--data", text, "--tokens", 200, "--seq-len", 20, "-o", out, "-q"]
    assert call_cli(*line, *own).code == 0
    found = told(out)
    assert found["model"]["model_type"] == family
    assert found["layers"] == [0, 1, 2]
    assert found["text"]["tokens"] == sum(item["tokens"] for item in found["text"]["domains"])
    stored = [load_file(path) for path in out.glob("*.safetensors")]
    assert found["bytes"] == sum(value.nbytes for file in stored for value in file.values())
    names = {(method["command"], method["name"]) for method in found["methods"]}
    if family == "qwen3_moe":
        wanted = {"all_experts": True, "inputs": 8, "trace": True, "halves": True, "gram": False}
        assert found["holds"] == wanted
        assert ("merge", "hc-smoe") in names
    else:
        assert found["holds"] == {
            "matrices": 3 * 4
        }  # q, o, gate and down, whose inputs others share
        assert ("compress", "svd-llm") in names
    shown = call_cli("inspect", out)
    assert shown.code == 0
    assert "--calibration" in shown.out


# On the command line


def test_json_is_one_document_and_tables_name_every_module(
    checkpoint: Checkpoint, call_cli: Cli
) -> None:
    folder = checkpoint("adapter", layers=3)
    shown = call_cli("inspect", folder, "--weights", "--json")
    assert (shown.code, shown.err) == (0, "")
    document = json.loads(shown.out)
    assert document["schema_version"] == 1
    human = call_cli("inspect", folder, "--weights").out
    for row in document["per_module"]:
        line = next(line for line in human.splitlines() if line.strip().startswith(row["module"]))
        assert f"{row['norm']:.4g}" in line
    two = call_cli("inspect", folder, checkpoint("adapter", seed=1), "-w")
    assert "cosine" in two.out


REFUSALS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "dora": ({"use_dora": True}, [], "use_dora is set: DoRA scales the whole weight"),
    "another": ({"peft_type": "IA3"}, [], "peft_type is 'IA3', expected 'LORA'"),
    "rank": ({"rank_pattern": {"v_proj": 9}}, [], "are not of the rank 9"),
    "experts": ({}, ["--calibration", "x"], "no experts to analyse"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_operation_takes_is_refused_with_the_reason(
    name: str, checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    changed, options, reason = REFUSALS[name]
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint("adapter"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    shown = call_cli("inspect", folder, *options)
    assert (shown.code, shown.out) == (3, "")
    assert reason in shown.err


def test_weights_are_of_adapters_of_one_base(
    checkpoint: Checkpoint, tmp_path: Path, call_cli: Cli
) -> None:
    adapter, model = checkpoint("adapter"), checkpoint("llama")
    other = checkpoint("adapter", base_model_name_or_path="another/base")
    cases = [
        ([model, "-w"], "there is none here"),
        ([adapter, model, "-w"], "compares adapters"),
        ([adapter, other, "-w"], "base_model_name_or_path is 'another/base'"),
        ([tmp_path], "nothing to tell"),
    ]
    for arguments, reason in cases:
        shown = call_cli("inspect", *arguments)
        assert shown.code == 3
        assert reason in shown.err
    assert call_cli("inspect", adapter, other).code == 0
    assert call_cli("inspect", adapter, model).code == 0
