"""GET and DELETE /v1/responses/{id}, its input items, and conversations that continue it."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.http.errors import API_HEADERS
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.response_items import InputItem, InputMessage, text_of_items
from lowlat.serve.response_store import StoredResponse
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.routes.reply import new_id
from lowlat.serve.state import ServerState

PAGE_ITEMS = 20
MAX_PAGE_ITEMS = 100
PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "custom_tool_call": "ctc_",
    "custom_tool_call_output": "cto_",
    "reasoning": "rs_",
}
_ITEMS = TypeAdapter[list[InputItem]](list[InputItem])


class DeletedResponse(WireModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(WireModel):
    """A page of the input items of a response, newest first unless order is asc."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PageQuery(WireModel):
    """Query parameters of a list."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_ITEMS)] = PAGE_ITEMS
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


def stored_response(state: ServerState, namespace: bytes, id: str) -> StoredResponse:
    """The response that a request continues. Raises RequestError if it is not stored."""
    stored = state.responses.get(namespace, id)
    if stored is None:
        raise RequestError(
            f"previous_response_id: the response '{id[:80]}' is not stored (store was false, or"
            " newer responses took its memory); send the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored


def earlier_items(stored: StoredResponse | None) -> list[InputItem]:
    """The conversation up to the end of a stored response, its output included."""
    if stored is None:
        return []
    items = json.loads(stored.items)
    return _ITEMS.validate_python([*items, *json.loads(stored.response)["output"]])


def conversation(earlier: Sequence[InputItem], items: Sequence[InputItem]) -> bytes:
    """`earlier` and `items` as the JSON list that StoredResponse holds; all have ids."""
    return json.dumps([_dump(item) for item in (*earlier, *items)], ensure_ascii=False).encode()


def _dump(item: InputItem) -> dict[str, Any]:
    shown = item.model_dump(by_alias=True, exclude_none=True)
    kind = shown.setdefault("type", "message")
    if isinstance(item, InputMessage):
        part = "output_text" if item.role == "assistant" else "input_text"
        more = {"annotations": []} if item.role == "assistant" else {}
        shown["content"] = [{"type": part, "text": text_of_items(item.content), **more}]
    return {"id": new_id(PREFIXES[kind]), **shown}


class StoredResponseRoutes:
    """Routes of stored responses; an API key reaches its own only."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        return [
            Route("/v1/responses/{id}", self.get_response, methods=["GET"]),
            Route("/v1/responses/{id}", self.delete_response, methods=["DELETE"]),
            Route("/v1/responses/{id}/input_items", self.list_input_items, methods=["GET"]),
        ]

    async def get_response(self, request: Request) -> Response:
        stored = self._find(request)
        return Response(stored.response, media_type="application/json", headers=API_HEADERS)

    async def delete_response(self, request: Request) -> Response:
        self._find(request)
        id = request.path_params["id"]
        self._state.responses.delete(request.state.cache_namespace, id)
        return json_response(DeletedResponse(id=id))

    async def list_input_items(self, request: Request) -> Response:
        page = _page_query(request)
        stored = self._find(request)
        return json_response(await self._state.workers.run(_page, stored, page))

    def _find(self, request: Request) -> StoredResponse:
        id = request.path_params["id"]
        stored = self._state.responses.get(request.state.cache_namespace, id)
        if stored is None:
            raise RequestError(
                f"the response '{id[:80]}' is not stored",
                param="id",
                code="response_not_found",
                status=404,
            )
        return stored


def _page_query(request: Request) -> PageQuery:
    """The query's fields. Raises RequestError about the first invalid one."""
    query = dict(request.query_params)
    for name in query:
        if name not in PageQuery.model_fields:
            raise RequestError(f"the query parameter '{name[:80]}' is not supported", param=name)
    limit, order = query.get("limit", str(PAGE_ITEMS)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4):
        limit = "0"
    if not 1 <= int(limit) <= MAX_PAGE_ITEMS:
        raise RequestError(f"limit must be from 1 to {MAX_PAGE_ITEMS}", param="limit")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc", param="order")
    return PageQuery(limit=int(limit), order=order, after=query.get("after"))


def _page(stored: StoredResponse, query: PageQuery) -> InputItemList:
    items: list[dict[str, Any]] = json.loads(stored.items)
    if query.order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    start = 0
    if query.after is not None:
        if query.after not in ids:
            raise RequestError("after is not the id of an input item", param="after")
        start = ids.index(query.after) + 1
    shown = items[start : start + query.limit]
    return InputItemList(
        data=shown,
        first_id=shown[0]["id"] if shown else None,
        last_id=shown[-1]["id"] if shown else None,
        has_more=start + query.limit < len(items),
    )
