"""The HTTP side: page, API and its documentation, in front of anything that upscales; knows no Ray and no PyTorch."""

import asyncio
import base64
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sr_serve.messages import ModelFacts, Order, Refusal, RefusedError, Upscaled
from sr_serve.uploads import MEDIA_TYPES, UploadLimits, read_header, read_upload, wanted

MIN_TILE_PX_LR, MAX_TILE_PX_LR = 16, 512
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
# Pages bring all they need; what they may do besides showing images is talk to the server they came from.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_IMAGE_BODY = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in MEDIA_TYPES.values()}


class Backend(Protocol):
    """What upscales."""

    async def upscale(self, data: bytes, order: Order) -> Upscaled | Refusal:
        """An upload whose header has been checked → a larger image file, or why there is none."""

    async def facts(self) -> ModelFacts | None:
        """Which model answers; None if none does now."""


class Problem(BaseModel):
    """Every answer that is no success."""

    detail: str = Field(description="One sentence for people: what was got, what is allowed.")
    code: str = Field(description="One word for programs.")


class Limits(BaseModel):
    """What an upload may be."""

    max_mb: float = Field(description="Largest upload in MB (10⁶ bytes).")
    max_mpx: float = Field(description="Most pixels of an upload in Mpx (10⁶).")
    formats: list[str] = Field(description="Media types that are taken.")


class Model(BaseModel):
    """The model that answers now."""

    model: str = Field(description="As the server was told: models:/edsr-x4@champion.")
    name: str = Field(description="Of the registered model; of the file or folder where it is none.")
    version: str | None = Field(description="Of the registered model; null where it is none.")
    scale: int = Field(description="Upscaling factor.")
    architecture: str
    num_parameters: int
    weights: str = Field(description="16 hex digits over config and weights: the version's tag weights_sha256.")
    limits: Limits


class JsonImage(BaseModel):
    """The result as JSON."""

    image_base64: str = Field(description="The image file, base64.")
    media_type: str
    width: int = Field(description="In pixels.")
    height: int = Field(description="In pixels.")
    model: str = Field(description="Name of the model.")
    version: str | None
    scale: int
    elapsed_s: float = Field(description="In the model's process, waiting included.")


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is empty."},
    403: {"model": Problem, "description": "A page of another site asks."},
    408: {"model": Problem, "description": "The client took too long to send it."},
    413: {"model": Problem, "description": "Too many bytes, or too many pixels."},
    415: {"model": Problem, "description": "Not a JPEG, PNG or WebP."},
    422: {"model": Problem, "description": "Damaged or animated, or an option is not allowed."},
    500: {"model": Problem, "description": "The network failed on this image."},
    503: {"model": Problem, "description": "Too many requests wait already, or the model is starting."},
    504: {"model": Problem, "description": "It took too long."},
}
_RESULT_HEADERS = {
    "X-SR-Model": "name of the model",
    "X-SR-Version": "registered version; absent where the model is not from a registry",
    "X-SR-Scale": "upscaling factor",
    "X-SR-Input-Size": "width x height of the upload, upright",
    "X-SR-Output-Size": "width x height of the result",
    "X-SR-Together": "how many images went through the network at once, this one included",
    "X-SR-Elapsed-S": "seconds in the model's process, waiting included",
}
_RESULT: dict[str, Any] = {
    "description": "The upscaled image, or JSON around it.",
    "content": {**_IMAGE_BODY, "application/json": {"schema": JsonImage.model_json_schema()}},
    "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _RESULT_HEADERS.items()},
}


def make_api(
    backend: Backend, limits: UploadLimits, *, tile_px_lr: int, timeout_s: float, is_loopback: bool
) -> FastAPI:
    """The whole HTTP side. `tile_px_lr` is the tile where a request names none; an upload is waited for `timeout_s`.

    If it `is_loopback`, bound to this machine alone, only its names are answered to (`LOOPBACK_HOSTS`): a page of
    another site whose name was made to point here would else count as this server's own (DNS rebinding).
    """
    # FastAPI's own documentation pages load their scripts from the Internet.
    api = FastAPI(
        title="sr-ray",
        summary="Images in, larger images out.",
        version="1",
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(_check_host)] if is_loopback else [],
    )
    _answer_problems(api)

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("page.html")

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page("docs.html")

    @api.get("/healthz", summary="Whether the server answers, and a model behind it", responses={503: _PROBLEMS[503]})
    async def healthz() -> dict[str, str]:
        if await backend.facts() is None:
            raise RefusedError(503, "no_model", "no model answers now; it may be starting")
        return {"status": "ok"}

    @api.get("/api/model", summary="The model that answers now", responses={503: _PROBLEMS[503]})
    async def model() -> Model:
        facts = await backend.facts()
        if facts is None:
            raise RefusedError(503, "no_model", "no model answers now; it may be starting")
        allowed = Limits(max_mb=limits.max_mb, max_mpx=limits.max_mpx, formats=list(MEDIA_TYPES.values()))
        return Model(**asdict(facts), limits=allowed)

    @api.post(
        "/api/upscale",
        summary="Upscale the image in the body",
        response_class=Response,
        responses={200: _RESULT, **_PROBLEMS},
        openapi_extra={"requestBody": {"required": True, "content": _IMAGE_BODY}},
    )
    async def upscale(
        request: Request,
        format: Annotated[  # noqa: A002  what clients call it
            Literal["same", "png", "jpeg", "webp"],
            Query(description="Of the result; same is that of the upload, unless Accept names one."),
        ] = "same",
        self_ensemble: Annotated[
            bool, Query(description="Average over eight flips and turns: finer, eight times slower.")
        ] = False,
        tile: Annotated[
            int,
            Query(
                ge=MIN_TILE_PX_LR,
                le=MAX_TILE_PX_LR,
                description="Largest tile in pixels of the upload: bounds memory, does not change the result.",
            ),
        ] = tile_px_lr,
        output: Annotated[
            Literal["image", "json"] | None, Query(description="Overrides Accept: the bare image, or JSON around it.")
        ] = None,
        accept: Annotated[str | None, Header(description="application/json, or an image type.")] = None,
        sec_fetch_site: Annotated[str | None, Header(include_in_schema=False)] = None,
    ) -> Response:
        # A browser says so: some other site's page, or another server's of this machine, would use it.
        if sec_fetch_site in ("cross-site", "same-site"):
            raise RefusedError(403, "cross_site", "pages of other sites may not use this server")
        declared = request.headers.get("content-length")
        data = await read_upload(request.stream(), declared=declared, limits=limits)
        header = await asyncio.to_thread(read_header, data, limits=limits)
        as_json, preferred = wanted(accept, output)
        file_format = format.upper() if format != "same" else preferred or header.format
        order = Order(format=file_format, tile_px_lr=tile, self_ensemble=self_ensemble, timeout_s=timeout_s)
        answer = await backend.upscale(data, order)
        if isinstance(answer, Refusal):
            return _problem(answer)
        return await asyncio.to_thread(_as_json, answer) if as_json else _as_image(answer)

    return api


def _check_host(request: Request) -> None:
    host = request.headers.get("host", LOOPBACK_HOSTS[0])  # browsers always send it
    name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
    if name not in LOOPBACK_HOSTS:
        names = ", ".join(LOOPBACK_HOSTS)
        raise RefusedError(403, "other_host", f"Host {host}: this server is bound to the loopback address, as {names}")


def _as_image(answer: Upscaled) -> Response:
    name = f"{answer.facts.name}-x{answer.facts.scale}.{_SUFFIXES[answer.format]}"
    quoted = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in name)
    headers = _facts_headers(answer) | {"Content-Disposition": f'inline; filename="{quoted}"'}
    return Response(answer.data, media_type=MEDIA_TYPES[answer.format], headers=headers)


def _as_json(answer: Upscaled) -> Response:
    width, height = answer.sr_size_px
    result = JsonImage(
        image_base64=base64.b64encode(answer.data).decode("ascii"),
        media_type=MEDIA_TYPES[answer.format],
        width=width,
        height=height,
        model=answer.facts.name,
        version=answer.facts.version,
        scale=answer.facts.scale,
        elapsed_s=round(answer.elapsed_s, 3),
    )
    return Response(result.model_dump_json(), media_type="application/json", headers=_facts_headers(answer))


def _facts_headers(answer: Upscaled) -> dict[str, str]:
    facts = answer.facts
    headers = {
        "X-SR-Model": facts.name.encode("ascii", "replace").decode("ascii"),
        "X-SR-Scale": str(facts.scale),
        "X-SR-Input-Size": "x".join(map(str, answer.lr_size_px)),
        "X-SR-Output-Size": "x".join(map(str, answer.sr_size_px)),
        "X-SR-Together": str(answer.num_together),
        "X-SR-Elapsed-S": f"{answer.elapsed_s:.3f}",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    return headers if facts.version is None else headers | {"X-SR-Version": facts.version}


def _answer_problems(api: FastAPI) -> None:
    """One shape for all that goes wrong, also for what FastAPI itself refuses."""

    @api.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> Response:
        return _problem(error.refusal)

    @api.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        return _problem(Refusal(status=400, code="gone", message="the client left before its image was here"))

    @api.exception_handler(RequestValidationError)
    async def not_valid(_request: Request, error: RequestValidationError) -> Response:
        details = "; ".join(f"{'.'.join(map(str, it['loc'][1:]))}: {it['msg']}" for it in error.errors())
        return _problem(Refusal(status=422, code="bad_option", message=details))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = (
            f"{request.method} {request.url.path}: {error.detail}; what there is: {request.scope['root_path']}/docs"
        )
        return _problem(Refusal(status=error.status_code, code="not_here", message=message), error.headers)


def _problem(refusal: Refusal, headers: Any = None) -> Response:
    headers = dict(headers or {})
    if refusal.status == 503:
        headers["Retry-After"] = "5"
    if refusal.status in (408, 413):  # the rest of the upload is not wanted
        headers["Connection"] = "close"
    return JSONResponse({"detail": refusal.message, "code": refusal.code}, status_code=refusal.status, headers=headers)


def _page(name: str) -> HTMLResponse:
    return HTMLResponse(files("sr_serve").joinpath(name).read_text(encoding="utf-8"), headers=_PAGE_HEADERS)
