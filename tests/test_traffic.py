"""Predicted traffic against sums made by hand; tests/test_parallel_calls.py compares it with what is really sent."""
import pytest
import torch

from muse_dist import MuseConfig, traffic

SHAPE = (1, 32, 8, 65536, 128)  # B, H, K, N, D


def test_exact_attention_by_hand():
    """Ring: keys and values pass P-1 times, in the backward again with P gradients. Ulysses: (P-1)/P of q, k, v, o."""
    found = traffic(MuseConfig(), SHAPE, 4)
    shard = 2 * 8 * 16384 * 128 * 2  # keys and values of a rank in bf16
    assert found.ring == {"forward": 3 * shard, "backward": 7 * shard}
    every_head = (2 * 32 + 2 * 8) * 16384 * 128 * 2
    assert found.ulysses == {"forward": every_head * 3 // 4, "backward": every_head * 3 // 4}
    assert found.kv == {"keys and values": 2 * 3 * shard, "key order": 3 * 8 * 16384 * 4,
                        "keys and values gradients": 3 * shard}


def test_ranks_that_read_everything_exactly_send_no_order():
    near = traffic(MuseConfig(halo=16), SHAPE, 4).kv
    assert near == {**traffic(MuseConfig(), SHAPE, 4).kv, "key order": 0}


def test_moments_by_hand():
    """Two contiguous ranks: the second receives one message, a halo block and the sinks; the first their gradients."""
    config = MuseConfig(block=4096, halo=1, leaf=64, sinks=1, remote_leaf=32, remote_anchors=1)
    message = 8 * (32768 // 32) * (2 * 4 + 2 * 256)  # a log mass and a trace in fp32, 2D numbers in bf16
    exact = 2 * 8 * (4096 + 64) * 128 * 2
    anchors = 8 * 128 * 2
    first, second = (traffic(config, SHAPE, 2, layout="contiguous", rank=rank).moments for rank in (0, 1))
    assert first == {"halo and sinks": 0, "anchors": anchors, "moments": 0, "moments gradients": message,
                     "halo and sinks gradients": exact}
    assert second == {"halo and sinks": exact, "anchors": anchors, "moments": message, "moments gradients": 0,
                      "halo and sinks gradients": 0}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("dim", [64, 128])
def test_moments_move_a_twelfth_of_the_keys(ranks, layout, dim):
    """The default configuration, at any number of tokens a rank; halo and sinks have their own rows."""
    for blocks in (1, 2, 8):
        tokens = blocks * 2 * ranks * MuseConfig().block
        for causal in (True, False):
            found = traffic(MuseConfig(causal=causal), (1, 16, 4, tokens, dim), ranks, layout=layout)
            moments = sum(count for name, count in found.moments.items() if "halo" not in name)
            assert 12 * moments <= sum(found.kv.values()), (blocks, causal, moments / sum(found.kv.values()))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_without_a_rank_the_busiest_counts(layout):
    shape = (1, 4, 2, 65536 * 3, 64)
    totals = [sum(traffic(MuseConfig(), shape, 4, layout=layout, rank=rank).moments.values()) for rank in range(4)]
    assert sum(traffic(MuseConfig(), shape, 4, layout=layout).moments.values()) == max(totals)


def test_one_rank_receives_nothing():
    found = traffic(MuseConfig(), SHAPE, 1)
    assert [sum(part.values()) for part in found] == [0, 0, 0, 0]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_traffic_grows_as_it_should(layout):
    """In proportion to batch, key/value heads and bytes a number; not with the query heads, except for Ulysses."""
    def total(part, shape, **changes):
        return sum(getattr(traffic(MuseConfig(), shape, 4, layout=layout, **changes), part).values())

    for part in ("kv", "moments", "ring"):
        assert total(part, (2, 32, 8, 65536, 128)) == 2 * total(part, SHAPE)
        assert total(part, (1, 32, 16, 65536, 128)) == 2 * total(part, SHAPE)
        assert total(part, (1, 64, 8, 65536, 128)) == total(part, SHAPE)
    assert total("ulysses", (1, 64, 8, 65536, 128)) == total("ulysses", SHAPE) * 144 // 80
    assert total("ring", SHAPE, dtype=torch.float32) == 2 * total("ring", SHAPE)


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="multiple of 24576 tokens"):
        traffic(MuseConfig(), SHAPE, 3)
    with pytest.raises(ValueError, match="layout='ring'"):
        traffic(MuseConfig(), SHAPE, 4, layout="ring")
