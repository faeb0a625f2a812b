"""How many actors, and what each gets, from what the cluster has."""

import pytest

from sr_serve.actor_pool import size_pool
from sr_serve.upscale_plan import UpscaleError
from sr_train.placement import ClusterFacts

LAPTOP = ClusterFacts(cpus_per_node=(8,), gpus_per_node=(0,))
GPU_NODES = ClusterFacts(cpus_per_node=(4, 16, 16), gpus_per_node=(0, 2, 1))


@pytest.mark.parametrize(
    ("cluster", "num_images", "options", "said"),
    [
        (LAPTOP, 100, {}, "8 actors with 1 CPU each"),
        (LAPTOP, 3, {}, "3 actors with 1 CPU each"),
        (LAPTOP, 100, {"cpus_per_actor": 3}, "2 actors with 3 CPUs each"),
        (LAPTOP, 100, {"num_actors": 1}, "1 actor with 1 CPU each"),
        (LAPTOP, 100, {"num_actors": 20}, "20 actors with 1 CPU each"),
        (GPU_NODES, 100, {}, "3 actors with 1 GPU and 4 CPUs each"),
        (GPU_NODES, 100, {"gpus_per_actor": 0.5}, "6 actors with 0.5 GPU and 4 CPUs each"),
        (GPU_NODES, 100, {"gpus_per_actor": 0.25}, "12 actors with 0.25 GPU and 2 CPUs each"),
        (GPU_NODES, 100, {"gpus_per_actor": 2.0}, "1 actor with 2 GPUs and 4 CPUs each"),
        (GPU_NODES, 100, {"device": "cpu"}, "36 actors with 1 CPU each"),
        (GPU_NODES, 100, {"gpus_per_actor": 0.5, "cpus_per_actor": 8}, "4 actors with 0.5 GPU and 8 CPUs each"),
    ],
)
def test_as_many_as_fit_but_none_without_an_image(cluster, num_images, options, said):
    assert str(size_pool(cluster, num_images, **options)) == said


def test_threads_are_the_cpus_and_at_least_one():
    assert size_pool(LAPTOP, 9, cpus_per_actor=3).num_threads == 3
    assert size_pool(LAPTOP, 9, cpus_per_actor=0.25).num_threads == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "1 GPU and"),
        ({"cpus_per_actor": 9}, "9 CPUs fits on none .*8 CPUs and 0 GPUs.*--cpus-per-actor"),
        ({"device": "cuda:1"}, "--device cuda:1: Ray says"),
    ],
)
def test_an_actor_that_fits_nowhere_is_said_at_once(options, says):
    with pytest.raises(UpscaleError, match=says):
        size_pool(LAPTOP, 9, **options)
