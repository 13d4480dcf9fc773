"""The layer-by-layer forward against the full stock model: hidden states after every layer, and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.random_models import FAMILIES, build
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.forward import LayerStream, Run, Step
from moesurg.surgery.calibration.sequences import Sequences
from moesurg.surgery.calibration.stock import replace_experts
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError, UsageError

LENGTHS = (24, 5, 17, 24, 2, 16, 9)
TOLERANCE = 2e-5
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 4},
}


def sequences(seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(256, (n,), generator=generator).tolist() for n in LENGTHS]
    return Sequences.from_ids(ids)


def stock_states(folder: Path, run: Run) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of the full model, each sequence alone and so without padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    hidden: list[list[torch.Tensor]] = []
    logits = []
    with torch.no_grad():
        for batch in run.batches:
            for row, length in zip(batch.ids_BT, batch.lengths, strict=True):
                ids = torch.from_numpy(row[:length])[None]
                out = model(ids, output_hidden_states=True, use_cache=False)
                hidden.append([state[0] for state in out.hidden_states])
                logits.append(out.logits[0])
    return [torch.cat(states) for states in zip(*hidden, strict=True)], torch.cat(logits)


def compare(folder: Path, *, batch_tokens: int = 60, max_memory: int = 1 << 30) -> None:
    model = Model.open(folder)
    with TensorReader(model.checkpoint) as reader:
        stream = LayerStream(model, reader, batch_tokens=batch_tokens, max_memory=max_memory)
        with stream.run(sequences()) as run:
            assert run.states.mapped == (max_memory == 0)
            expected, logits = stock_states(folder, run)
            torch.testing.assert_close(run.states.packed_TD, expected[0], atol=0, rtol=0)
            for step in run.layers():
                step.advance()
                if step.index < len(model.layers) - 1:  # the last is reported after the final norm
                    torch.testing.assert_close(
                        run.states.packed_TD, expected[step.index + 1], atol=TOLERANCE, rtol=1e-5
                    )
            run.finish()
            torch.testing.assert_close(
                run.states.packed_TD, expected[-1], atol=TOLERANCE, rtol=1e-5
            )
            torch.testing.assert_close(
                stream.head()(run.states.packed_TD), logits, atol=1e-4, rtol=1e-5
            )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    compare(build(family, tmp_path))


@pytest.mark.parametrize("family", MOE)
def test_fused_layout(family: str, tmp_path: Path) -> None:
    compare(build(family, tmp_path, layout="fused"))


@pytest.mark.parametrize("family", sorted(SLIDING))
def test_sliding_window(family: str, tmp_path: Path) -> None:
    compare(build(family, tmp_path, **SLIDING[family]))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_dense_layers_among_moe_layers(family: str, tmp_path: Path) -> None:
    compare(build(family, tmp_path, decoder_sparse_step=2, num_hidden_layers=4))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tied_head(family: str, tmp_path: Path) -> None:
    compare(build(family, tmp_path, tie_word_embeddings=True))


def test_states_in_a_file(tmp_path: Path) -> None:
    compare(build("llama", tmp_path), max_memory=0)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_batch_size_does_not_matter(batch_tokens: int, tmp_path: Path) -> None:
    compare(build("mixtral", tmp_path), batch_tokens=batch_tokens)


def test_code_and_implementation_keys_of_the_config_are_ignored(tmp_path: Path) -> None:
    folder = build(
        "llama",
        tmp_path,
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        output_hidden_states=True,
    )
    (folder / "evil.py").write_text("raise SystemExit('the checkpoint ran code')\n")
    model = Model.open(folder)
    with (
        TensorReader(model.checkpoint) as reader,
        LayerStream(model, reader).run(sequences()) as run,
    ):
        for _ in run.layers():
            pass


def test_a_layer_can_be_operated_on_and_run_again(tmp_path: Path) -> None:
    """Keeping all experts changes nothing; keeping some equals masking the others' logits."""
    model = Model.open(build("mixtral", tmp_path))
    kept = [0, 2, 3, 5, 6]
    with (
        TensorReader(model.checkpoint) as reader,
        LayerStream(model, reader).run(sequences()) as run,
    ):
        step = next(run.layers())
        batch = run.batches[0]
        block: Any = step.module.get_submodule("mlp")
        router_ED = block.gate.weight
        gate_up_EFD, down_EDF = block.experts.gate_up_proj, block.experts.down_proj
        before = step.forward(batch)
        replace_experts(step.module, router_ED, gate_up_EFD, down_EDF)
        torch.testing.assert_close(step.forward(batch), before, atol=0, rtol=0)
        replace_experts(step.module, router_ED[kept], gate_up_EFD[kept], down_EDF[kept])
        pruned = step.forward(batch)
        assert not torch.allclose(pruned, before)
        expected = reference_pruned(model, run, kept)
        mask = run.mask(batch)
        torch.testing.assert_close(pruned[mask], expected, atol=TOLERANCE, rtol=1e-5)


def reference_pruned(model: Model, run: Run, kept: list[int]) -> torch.Tensor:
    """The first layer of the full model with the logits of dropped experts at minus infinity."""
    full: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    layer = full.model.layers[0]
    dropped = [e for e in range(model.experts) if e not in kept]

    def masked(hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_TE = hidden_TD.reshape(-1, hidden_TD.shape[-1]) @ layer.mlp.gate.weight.T
        logits_TE[:, dropped] = float("-inf")
        weights_TK, index_TK = logits_TE.softmax(-1).topk(model.rule.top_k)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), index_TK

    layer.mlp.gate.forward = masked
    rows = []
    with torch.no_grad():
        batch = run.batches[0]
        for row, length in zip(batch.ids_BT, batch.lengths, strict=True):
            ids = torch.from_numpy(row[:length])[None]
            out = full(ids, output_hidden_states=True, use_cache=False)
            rows.append(out.hidden_states[1][0])
    return torch.cat(rows)


def test_only_one_layer_is_held(tmp_path: Path) -> None:
    model = Model.open(build("qwen3_moe", tmp_path))
    with (
        TensorReader(model.checkpoint) as reader,
        LayerStream(model, reader).run(sequences()) as run,
    ):
        seen: list[Step] = []
        for step in run.layers():
            assert all(not value.is_meta for value in step.module.parameters())
            assert all(not list(old.module.parameters()) for old in seen)
            seen.append(step)


def test_foreign_token_ids_are_refused(tmp_path: Path) -> None:
    model = Model.open(build("llama", tmp_path))
    with TensorReader(model.checkpoint) as reader:
        stream = LayerStream(model, reader)
        with pytest.raises(InputError, match="token id 999"):
            stream.run(Sequences.from_ids([[1, 999]]))


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    model = Model.open(build("llama", tmp_path))
    with TensorReader(model.checkpoint) as reader:
        for device in ("tpu", "meta", "cuda:77"):
            with pytest.raises(UsageError, match="--device"):
                LayerStream(model, reader, device=device)
