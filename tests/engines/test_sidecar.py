import pytest
import torch

from hf_eff.engines.checkpoints import is_complete, last_complete, resolve_checkpoint
from hf_eff.engines.sidecar import STATE_JSON, STATE_TENSORS, load_state, save_state
from hf_eff.errors import CheckpointError


def test_nested_state_round_trips_bit_for_bit(tmp_path):
    state = {"a": 0.1 + 0.2, "b": [1, {"t": torch.tensor([1e-45, float("nan")])}], "c": {"d": None, "e": "x"}}
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert back["a"] == state["a"]
    assert back["c"] == state["c"]
    assert back["b"][0] == 1
    assert torch.equal(back["b"][1]["t"].view(torch.int32), state["b"][1]["t"].view(torch.int32))


def test_absent_state_is_none_and_damage_is_named(tmp_path):
    assert load_state(tmp_path) is None
    (tmp_path / STATE_JSON).write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"hf_eff_state\.json is damaged"):
        load_state(tmp_path)


def test_missing_tensor_file_is_named(tmp_path):
    save_state(tmp_path, {"m": torch.ones(2)})
    (tmp_path / STATE_TENSORS).unlink()
    with pytest.raises(CheckpointError, match="names a tensor that"):
        load_state(tmp_path)


def _checkpoint(folder, step, *, cut=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text('{"global_step": ' if cut == "trainer" else "{}")
    if cut != "sidecar":
        save_state(path, {})
    return path


def test_last_complete_passes_over_saves_that_were_cut_short(tmp_path):
    _checkpoint(tmp_path, 2)
    kept = _checkpoint(tmp_path, 10)
    _checkpoint(tmp_path, 12, cut="trainer")
    _checkpoint(tmp_path, 14, cut="sidecar")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == kept
    assert not is_complete(tmp_path / "checkpoint-12")


def test_resolving_names_what_is_wrong(tmp_path):
    assert resolve_checkpoint(None, tmp_path) is None
    assert resolve_checkpoint(False, tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resolve_checkpoint(True, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere", tmp_path)
    with pytest.raises(CheckpointError, match="written without hf_eff"):
        resolve_checkpoint(_checkpoint(tmp_path, 1, cut="sidecar"), tmp_path)
    with pytest.raises(CheckpointError, match="is incomplete"):
        resolve_checkpoint(_checkpoint(tmp_path, 3, cut="trainer"), tmp_path)
