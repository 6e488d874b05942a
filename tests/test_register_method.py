import numpy as np
import pytest

from hf_eff import list_methods, register_method, select_dataset
from hf_eff.contracts.selection import Picks
from hf_eff.errors import OptionError
from hf_eff.registry import unregister_method
from hf_eff.testing.tiny import tiny_pool, tiny_tokenizer


@pytest.fixture
def shortest():
    @register_method(kind="selection", name="shortest_row", slot="pool", summary="The shortest row.")
    class Shortest:
        def __init__(self, config):
            self.config = config

        def select(self, context):
            return Picks(positions=np.array([int(np.argmin(context.pool.lengths))]), reasons="shortest")

    yield Shortest
    unregister_method("selection", "shortest_row")


def test_a_decorated_class_is_a_method_at_once(shortest):
    assert "shortest_row" in list_methods("selection")
    pool = tiny_pool(16)
    selection = select_dataset(pool, "shortest_row", processing_class=tiny_tokenizer())
    length = min(len(row["prompt"] + row["completion"]) for row in pool)
    (row,) = selection.apply(pool)
    assert len(row["prompt"] + row["completion"]) == length


def test_a_taken_name_is_refused(shortest):
    with pytest.raises(OptionError, match="selection='shortest_row' is already registered"):
        register_method(kind="selection", name="shortest_row", slot="pool", summary="")(shortest)
    register_method(kind="selection", name="shortest_row", slot="pool", summary="", replace=True)(shortest)
