"""The process that serves HTTP: hands uploads to the model's replicas, and answers for them where they can't.

It imports no PyTorch, directly or not: it is up in a second, and small.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from sr_serve.http_api import make_api
from sr_serve.messages import ModelFacts, Order, Refusal, Upscaled, not_ready
from sr_serve.uploads import UploadLimits

_FACTS_TIMEOUT_S = 2.0
_FIRST_FACTS_TIMEOUT_S = 30.0
_IDLE_SILENCE_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class IngressOptions:
    """What the HTTP side needs to know."""

    limits: UploadLimits
    """Of uploads."""
    tile_px_lr: int
    """Largest tile where a request names none."""
    timeout_s: float
    """After how many seconds a request is given up."""
    is_loopback: bool
    """Whether it is bound to this machine alone."""


async def _to_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)


class Ingress:
    """Takes uploads in, hands them to the replicas of the model, and answers for them where they can't."""

    def __init__(self, replicas: DeploymentHandle[Any], options: IngressOptions) -> None:
        self._replicas = replicas
        self._options = options
        self._num_in_hand = 0
        self._facts: ModelFacts | None = None
        self._heard_s: float | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for it once the object is made."""
        options = self._options
        api = make_api(
            self,
            options.limits,
            tile_px_lr=options.tile_px_lr,
            timeout_s=options.timeout_s,
            is_loopback=options.is_loopback,
        )
        # What reading the upload of a client that has left may raise; else its traceback would be in the log.
        api.add_exception_handler(TaskCancelledError, _to_nobody)
        return api

    async def upscale(self, data: bytes, order: Order) -> Upscaled | Refusal:
        """See `sr_serve.http_api.Backend`."""
        response = self._replicas.upscale.remote(data, order)
        self._num_in_hand += 1
        try:
            async with asyncio.timeout(order.timeout_s):
                answer: Upscaled | Refusal = await response
        except TimeoutError:
            response.cancel()  # type: ignore[no-untyped-call]
            return not_ready(order.timeout_s)
        except asyncio.CancelledError:  # the client has left
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except BackPressureError:
            message = "too many images are waiting already; try again in a few seconds"
            return Refusal(status=503, code="busy", message=message)
        except RayTaskError as error:
            print(f"a request failed: {error}", flush=True)
            message = "the server failed on this image; its log says how"
            return Refusal(status=500, code="failed", message=message)
        except (RayError, RayServeException) as error:
            self._facts = None  # not to be told of until a model answers again
            print(f"a request failed: {str(error).partition(chr(10))[0]}", flush=True)
            message = "the process that holds the model failed and is being started again; try again in a minute"
            return Refusal(status=503, code="model_lost", message=message)
        finally:
            self._num_in_hand -= 1
        if isinstance(answer, Upscaled):
            self._hear(answer.facts)
        return answer

    async def facts(self) -> ModelFacts | None:
        """See `sr_serve.http_api.Backend`.

        As last heard where replicas are silent because they have their hands full: for as long as a request may take.
        With nothing in their hands a few seconds of silence mean that there is none.
        """
        response = self._replicas.facts.remote()
        try:
            async with asyncio.timeout(_FACTS_TIMEOUT_S if self._heard_s is not None else _FIRST_FACTS_TIMEOUT_S):
                self._hear(await response)
        except (TimeoutError, BackPressureError):
            response.cancel()  # type: ignore[no-untyped-call]
            allowed_s = max(_IDLE_SILENCE_S, self._options.timeout_s) if self._num_in_hand else _IDLE_SILENCE_S
            if self._heard_s is None or time.monotonic() - self._heard_s > allowed_s:
                self._facts = None
        except (RayError, RayServeException):
            self._facts = None
        return self._facts

    def _hear(self, facts: ModelFacts) -> None:
        self._facts, self._heard_s = facts, time.monotonic()
