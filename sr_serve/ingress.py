"""The process that serves HTTP: hands uploads to the model's replicas, and answers for them where they can't.

It imports no PyTorch, directly or not: it is up in a second, and small.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from sr_serve.http_api import make_api
from sr_serve.messages import ModelFacts, Order, Refusal, Upscaled
from sr_serve.uploads import UploadLimits

_FACTS_TIMEOUT_S = 2.0


class Ingress:
    """Takes uploads in, hands them to the replicas of the model, and answers for them where they can't."""

    def __init__(
        self, replicas: DeploymentHandle[Any], limits: UploadLimits, *, tile_px_lr: int, timeout_s: float
    ) -> None:
        self._replicas = replicas
        self._limits = limits
        self._tile_px_lr = tile_px_lr
        self._timeout_s = timeout_s
        self._facts: ModelFacts | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for it once the object is made."""
        return make_api(self, self._limits, tile_px_lr=self._tile_px_lr)

    async def upscale(self, data: bytes, order: Order) -> Upscaled | Refusal:
        """See `sr_serve.http_api.Backend`."""
        response = self._replicas.upscale.remote(data, order)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer: Upscaled | Refusal = await response
                return answer
        except TimeoutError:
            response.cancel()  # type: ignore[no-untyped-call]
            message = f"the image was not ready within {self._timeout_s:g} s; a smaller one will be"
            return Refusal(status=504, code="timeout", message=message)
        except BackPressureError:
            message = "too many images are waiting already; try again in a few seconds"
            return Refusal(status=503, code="busy", message=message)
        except (RayError, RayServeException) as error:
            self._facts = None  # not to be told of until a model answers again
            print(f"a request failed: {str(error).partition(chr(10))[0]}", flush=True)
            message = "the process that holds the model failed and is being started again; try again in a minute"
            return Refusal(status=503, code="model_lost", message=message)

    async def facts(self) -> ModelFacts | None:
        """See `sr_serve.http_api.Backend`; as last heard, if all replicas have their hands full."""
        response = self._replicas.facts.remote()
        try:
            async with asyncio.timeout(_FACTS_TIMEOUT_S):
                self._facts = await response
        except (TimeoutError, BackPressureError):
            response.cancel()  # type: ignore[no-untyped-call]
        except (RayError, RayServeException):
            self._facts = None
        return self._facts
