"""How many CPUs a replica gets, and which replicas no node can hold."""

import pytest

from sr_serve.serve_app import cpus_per_replica
from sr_serve.serve_options import ServeError, ServeOptions
from sr_train.placement import ClusterFacts


def free(*nodes):
    cpus, gpus = zip(*nodes, strict=True)
    return ClusterFacts(cpus_per_node=cpus, gpus_per_node=gpus)


@pytest.mark.parametrize(
    ("nodes", "options", "cpus"),
    [
        ([(8.0, 0.0)], {}, 8),
        ([(8.0, 0.0)], {"num_replicas": 3}, 2),
        ([(8.0, 0.0), (3.5, 0.0)], {}, 8),
        ([(8.0, 0.0), (3.5, 0.0)], {"num_replicas": 2}, 4),  # both on the first node
        ([(8.0, 0.0), (5.0, 0.0)], {"num_replicas": 2}, 5),
        ([(8.0, 0.0)], {"num_replicas": 2, "cpus_per_replica": 3}, 3),
        ([(2.0, 0.0), (4.0, 2.0)], {"num_replicas": 4, "gpus_per_replica": 0.5}, 1),
    ],
)
def test_replicas_share_what_is_free(nodes, options, cpus):
    assert cpus_per_replica(ServeOptions(**options), free(*nodes)) == cpus


@pytest.mark.parametrize(
    ("nodes", "options", "words"),
    [
        ([(2.0, 0.0), (2.0, 0.0)], {"cpus_per_replica": 3}, "1 x (3 CPUs, 0 GPUs)"),  # there are 4 in sum
        ([(0.5, 0.0), (0.5, 0.0)], {}, "0.5 CPUs and 0 GPUs, 0.5 CPUs and 0 GPUs"),
        ([(4.0, 1.0), (4.0, 1.0)], {"gpus_per_replica": 2.0}, "--gpus-per-replica"),
        ([(4.0, 0.6), (4.0, 0.6)], {"gpus_per_replica": 0.7}, "1 x (1 CPUs, 0.7 GPUs)"),
        ([(8.0, 0.0), (0.0, 2.0)], {"gpus_per_replica": 1.0}, "8 CPUs and 0 GPUs, 0 CPUs and 2 GPUs"),
        ([(2.0, 0.0)], {"num_replicas": 3}, "3 x (1 CPUs"),
    ],
)
def test_replicas_that_fit_on_no_node_are_refused_though_they_fit_in_sum(nodes, options, words):
    with pytest.raises(ServeError) as raised:
        cpus_per_replica(ServeOptions(**options), free(*nodes))
    assert words in str(raised.value)
