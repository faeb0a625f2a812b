"""What the HTTP side answers where a replica does not: errors and silence, which no real one gives on demand."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from sr_serve import ingress
from sr_serve.http_api import make_api
from sr_serve.ingress import Ingress, IngressOptions
from sr_serve.messages import ModelFacts, Order, Refusal
from sr_serve.uploads import UploadLimits

LIMITS = UploadLimits(max_mb=1, max_mpx=1, upload_timeout_s=60)
FACTS = ModelFacts(
    model="m", name="m", version=None, scale=2, architecture="edsr", num_parameters=1, weights="0123456789abcdef"
)
SILENCE, LATE = object(), object()


class Response:
    """As Ray Serve's: awaited once, or cancelled."""

    def __init__(self, answer):
        self.answer, self.is_cancelled = answer, False

    def __await__(self):
        if self.answer is SILENCE:
            yield from asyncio.Event().wait().__await__()
        if self.answer is LATE:
            yield from asyncio.sleep(0.1).__await__()
            return FACTS
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self):
        self.is_cancelled = True


class Replicas:
    """A handle whose answers a test sets."""

    def __init__(self, *, upscale=SILENCE, facts=FACTS):
        self.answers = {"upscale": upscale, "facts": facts}
        self.responses = []
        self.upscale, self.facts = (SimpleNamespace(remote=self._method(name)) for name in ("upscale", "facts"))

    def _method(self, name):
        def remote(*_):
            self.responses.append(Response(self.answers[name]))
            return self.responses[-1]

        return remote


def in_front_of(replicas, timeout_s=60.0):
    return Ingress(replicas, IngressOptions(limits=LIMITS, tile_px_lr=64, timeout_s=timeout_s, is_loopback=True))


def order(timeout_s=60.0):
    return Order(format="PNG", tile_px_lr=64, self_ensemble=False, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 503, "busy"),
        (RayTaskError("upscale", "Traceback …", KeyError("x")), 500, "failed"),
        (RayTaskError("upscale", "Traceback …", KeyError("x")).as_instanceof_cause(), 500, "failed"),
        (RayActorError(), 503, "model_lost"),
    ],
)
def test_a_failed_request_is_told_from_a_lost_model_and_from_too_many_requests(error, status, code, capfd):
    refused = asyncio.run(in_front_of(Replicas(upscale=error)).upscale(b"", order()))
    assert isinstance(refused, Refusal) and (refused.status, refused.code) == (status, code)


@pytest.mark.parametrize("who", ["the clock", "the client"])
def test_the_replica_is_told_when_a_request_is_given_up(who):
    replicas = Replicas()

    async def give_up():
        task = asyncio.create_task(
            in_front_of(replicas).upscale(b"", order(timeout_s=0.01 if who == "the clock" else 60))
        )
        await asyncio.sleep(0)
        if who == "the client":
            task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        return outcome

    outcome = asyncio.run(give_up())
    assert outcome.status == 504 if who == "the clock" else isinstance(outcome, asyncio.CancelledError)
    assert [response.is_cancelled for response in replicas.responses] == [True]


def test_a_silent_model_is_there_only_while_it_has_something_in_hand(monkeypatch):
    monkeypatch.setattr(ingress, "_FACTS_TIMEOUT_S", 0.01)
    monkeypatch.setattr(ingress, "_IDLE_SILENCE_S", 0.0)
    replicas = Replicas()
    front = in_front_of(replicas)

    async def ask():
        assert await front.facts() == FACTS
        replicas.answers["facts"] = SILENCE
        busy = asyncio.create_task(front.upscale(b"", order()))
        await asyncio.sleep(0)
        assert await front.facts() == FACTS
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        assert await front.facts() is None
        replicas.answers["facts"] = FACTS
        assert await front.facts() == FACTS

    asyncio.run(ask())


def test_the_first_answer_may_take_longer(monkeypatch):
    monkeypatch.setattr(ingress, "_FACTS_TIMEOUT_S", 0.01)
    replicas = Replicas(facts=LATE)
    front = in_front_of(replicas)

    async def ask():
        assert await front.facts() == FACTS
        monkeypatch.setattr(ingress, "_IDLE_SILENCE_S", 0.0)
        assert await front.facts() is None

    asyncio.run(ask())


async def status_of(api, path, host):
    """Of a GET, by ASGI's messages."""
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"host", host.encode())]
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await api(scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(("is_loopback", "status"), [(True, 403), (False, 200)])
def test_other_names_are_answered_to_only_where_it_is_bound_to_other_addresses(is_loopback, status):
    api = make_api(in_front_of(Replicas()), LIMITS, tile_px_lr=64, timeout_s=60, is_loopback=is_loopback)
    assert asyncio.run(status_of(api, "/healthz", "sr.example:8000")) == status
