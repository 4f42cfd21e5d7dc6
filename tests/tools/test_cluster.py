"""tools/cluster.py: what goes over the network, by hand, and what fits a card."""

import pytest

from src.errors import UserError
from tools import cluster


def test_tables_of_no_model_are_refused() -> None:
    with pytest.raises(UserError, match="found no model; expected names of released ones"):
        cluster.main([])


def test_what_a_node_of_two_sends_by_hand() -> None:
    """Llama 2 7B: 6.738e9 weights. Shared by 16 GPUs a link of the ring carries (2 * 2 * 4 + 4) bytes of each, 15/16
    of them: 126.3 GB, 7 of 8 links of a node within it, one out. In two replicas 117.9 GB on each of 8 links, and 2 * 4
    bytes, half of them, between the nodes: 27.0 GB."""
    _, shared, replicas = cluster.traffic(["llama-2-7b"]).splitlines()
    assert shared.split()[5:8] == ["884", "/", "126"]
    assert replicas.split()[5:8] == ["943", "/", "27"]


def test_what_does_not_fit_a_card_is_marked() -> None:
    """Llama 2 70B on 8 GPUs: 69e9 weights in float32, their gradients and Adam's two moments are 16 bytes each, 128 GiB
    a GPU without activations; on 16 half of that."""
    _, full, lora = cluster.cluster(["llama-2-70b"]).splitlines()
    alone, two, *_ = full.split()[2:]
    assert alone.endswith("*") and 128 < float(alone[:-1]) < 160 and 64 < float(two) < 75
    assert "*" not in lora
