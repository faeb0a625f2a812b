"""How many actors upscale on a cluster, and what each of them gets."""

from dataclasses import dataclass

from sr_serve.upscale_plan import UpscaleError
from sr_train.placement import ClusterFacts, num_fitting

CPUS_PER_GPU_ACTOR = 4
"""At most, unless told otherwise: they decode and encode beside the GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPool:
    """Actors that all are alike."""

    num_actors: int
    device: str
    """cpu or cuda."""
    cpus: float
    """Reserved for each."""
    gpus: float
    """Reserved for each; 0 on CPUs."""

    @property
    def num_threads(self) -> int:
        """PyTorch's, in each actor."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        each = [f"{self.gpus:g} GPU{'s' if self.gpus > 1 else ''}"] if self.gpus else []
        each.append(f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}")
        return f"{self.num_actors} actor{'s' if self.num_actors != 1 else ''} with {' and '.join(each)} each"


def size_pool(
    cluster: ClusterFacts,
    num_images: int,
    *,
    device: str = "auto",
    num_actors: int | None = None,
    gpus_per_actor: float = 1.0,
    cpus_per_actor: float | None = None,
) -> ActorPool:
    """As many actors as the cluster can hold, or `num_actors`, but none without an image.

    `device` is auto, cpu or cuda; auto takes the GPUs if there are any. On CPUs each actor gets one unless
    `cpus_per_actor` says otherwise; on GPUs its share of the CPUs, at most `CPUS_PER_GPU_ACTOR`. More actors than the
    cluster can hold now may be asked for: they start when there is room, or when the cluster grows.

    UpscaleError if not even one fits.
    """
    check_actor_device(device)
    if device == "auto":
        device = "cuda" if cluster.num_gpus > 0 else "cpu"
    gpus = gpus_per_actor if device == "cuda" else 0.0
    cpus = cpus_per_actor
    if cpus is None:
        cpus = _share(cluster, gpus) if gpus else 1.0
    num_held = sum(num_fitting(cluster, cpus, gpus or None))
    if num_held == 0:
        nodes = ", ".join(
            f"{node_cpus:g} CPUs and {node_gpus:g} GPUs"
            for node_cpus, node_gpus in zip(cluster.cpus_per_node, cluster.gpus_per_node, strict=True)
        )
        wanted = f"{gpus:g} GPU and {cpus:g} CPUs" if gpus else f"{cpus:g} CPUs"
        raise UpscaleError(
            f"an actor with {wanted} fits on none of the cluster's nodes ({nodes}): --device, --gpus-per-actor, "
            f"--cpus-per-actor"
        )
    return ActorPool(num_actors=min(num_actors or num_held, num_images), device=device, cpus=cpus, gpus=gpus)


def check_actor_device(device: str) -> None:
    """UpscaleError if `device` is none that actors can have, on whatever cluster."""
    if device not in ("auto", "cpu", "cuda"):
        raise UpscaleError(f"--device {device}: Ray says which GPU an actor uses; allowed are auto, cpu, cuda")


def _share(cluster: ClusterFacts, gpus: float) -> float:
    """CPUs of each GPU actor such that all that the GPUs can hold find some, at most `CPUS_PER_GPU_ACTOR`."""
    shares = [
        node_cpus / actors
        for node_cpus, actors in zip(cluster.cpus_per_node, num_fitting(cluster, 1e-3, gpus), strict=True)
        if actors
    ]
    least = min(shares, default=1.0)
    return float(min(CPUS_PER_GPU_ACTOR, int(least))) if least >= 1 else max(0.01, int(least * 100) / 100)
