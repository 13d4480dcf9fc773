"""What ``inspect`` tells, against the same model instantiated and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurg.surgery.errors import InputError
from moesurg.surgery.inspection import inspect
from tests.oracle.helpers import custom, operate

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("family", MOE)
def test_counts_agree_with_the_instantiated_mixture(
    checkpoint: Callable[..., Path], family: str, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family, layout=layout)
    found: Any = inspect(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert sum(found["parameters"]["components"].values()) == found["parameters"]["total"]
    assert found["moe"]["experts"] == 8
    assert found["moe"]["top_k"] == 2
    assert found["moe"]["layout"] == layout
    experts = found["parameters"]["components"]["experts"]
    saved = found["parameters"]["total"] - found["parameters"]["active_per_token"]
    assert saved == experts * 6 // 8
    rows = found["per_layer"]
    assert sum(row["parameters"] - row["active"] for row in rows) == saved
    commands = methods_of(found)
    assert set(commands) == {"adapter", "compress", "convert", "expert", "merge", "prune"}
    assert {"sub-moe", "linear"} <= commands["merge"]
    assert commands["merge"].isdisjoint({"cat", "regmean"})


def methods_of(record: Any) -> dict[str, set[str]]:
    """Names by command; none twice."""
    found: dict[str, set[str]] = {}
    for method in record["methods"]:
        names = found.setdefault(method["command"], set())
        assert method["name"] not in names
        names.add(method["name"])
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_counts_agree_with_the_instantiated_dense_model(
    checkpoint: Callable[..., Path], family: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family, tie_word_embeddings=tied)
    found: Any = inspect(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"]["active_per_token"] == found["parameters"]["total"]
    assert found["tied_embeddings"] is tied
    assert ("head" in found["parameters"]["components"]) is not tied
    assert found["upcycle_targets"]
    commands = methods_of(found)
    assert set(commands) == {"adapter", "compress", "merge", "upcycle"}
    assert {"regmean", "linear"} <= commands["merge"]
    assert commands["merge"].isdisjoint({"cat", "sub-moe"})
    assert "svd" in commands["compress"]
    assert "mobe" not in commands["compress"]


@pytest.mark.parametrize(("renormalise", "same"), [(True, True), (False, False)])
def test_identical_experts_reproduce_a_layer_where_weights_sum_to_one(
    checkpoint: Callable[..., Path], renormalise: bool, same: bool
) -> None:
    found: Any = inspect(str(checkpoint("qwen3_moe", norm_topk_prob=renormalise)))
    assert found["moe"]["identical_experts"]["reproduce_dense"] is same


def test_shards_and_types_are_listed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe", dtype="bfloat16", max_shard_size="50KB")
    found: Any = inspect(str(folder))
    assert [row["file"] for row in found["shards"]] == sorted(
        path.name for path in folder.glob("*.safetensors")
    )
    assert len(found["shards"]) > 1
    assert sum(row["tensors"] for row in found["shards"]) == found["tensors"]
    assert set(found["dtypes"]) == {"BF16"}
    assert found["bytes"] == 2 * found["parameters"]["total"]


def test_a_strange_report_is_not_ours(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (folder / "report.json").write_text('{"somebody": "else"}')
    assert "provenance" not in inspect(str(folder))
    ours = {"fingerprint": "0" * 64, "moesurg": "0.1.0", "method": "sparse", "decisions": None}
    (folder / "report.json").write_text(json.dumps(ours))
    found: Any = inspect(str(folder))
    assert found["provenance"] == {key: ours[key] for key in ("moesurg", "method", "fingerprint")}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_custom_outputs_are_counted_as_their_model_code_holds_them(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    operate("compress", "svd", source, out, ratio=0.3)
    found: Any = inspect(str(out))
    assert found["class"].startswith("Moesurg")
    assert "convert --expand" in found["support"]["sentence"]
    assert found["parameters"]["total"] == sum(p.numel() for p in custom(out).parameters())
    plain: Any = inspect(str(source))
    assert found["parameters"]["stock"] == plain["parameters"]["total"]
    assert found["widths"] == plain["widths"]
    before, after = (item["parameters"]["components"] for item in (plain, found))
    assert before.keys() == after.keys() - {"other"}
    for name, count in before.items():
        smaller = name in ("attention", "dense_ffn", "experts")
        assert after[name] < count if smaller else after[name] == count
    forms = {form for part in found["parts"].values() for form in part["forms"]}
    assert forms == {"pivot"}
    assert found["provenance"]["method"] == "svd"


def test_what_no_stock_class_holds_is_said_so(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    operate("expert", "null", checkpoint("qwen3_moe"), tmp_path / "out", zero=2)
    found: Any = inspect(str(tmp_path / "out"))
    assert "no stock class" in found["support"]["sentence"]
    with pytest.raises(InputError, match="not analysed"):
        inspect(str(tmp_path / "out"), tmp_path)
