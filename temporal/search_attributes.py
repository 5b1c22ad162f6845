"""Our search attributes in a namespace: registered when they are missing, never changed."""

from __future__ import annotations

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from models.errors import InvalidInput
from models.visibility import Attribute

KINDS = {
    name: IndexedValueType.INDEXED_VALUE_TYPE_DATETIME
    if name is Attribute.WAITING_SINCE
    else IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    for name in Attribute
}


async def register(client: Client) -> tuple[str, ...]:
    """Add what is missing; returns the names that were added.

    Raises:
        InvalidInput: one of the names is there with another type, or we may not add them.
    """
    known = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    present = dict(known.custom_attributes)
    for name, kind in KINDS.items():
        if name in present and present[name] != kind:
            raise InvalidInput.field(
                "search attribute",
                str(name),
                f"it has another type in namespace {client.namespace}; remove it there",
            )
    missing = {str(name): kind for name, kind in KINDS.items() if name not in present}
    if missing:
        await _add(client, missing)
    return tuple(missing)


async def _add(client: Client, missing: dict[str, IndexedValueType.ValueType]) -> None:
    request = AddSearchAttributesRequest(namespace=client.namespace, search_attributes=missing)
    try:
        await client.operator_service.add_search_attributes(request)
    except RPCError as error:
        if error.status is RPCStatusCode.ALREADY_EXISTS:
            return
        names = ", ".join(missing)
        raise InvalidInput.field(
            "search attributes",
            names,
            f"add them to namespace {client.namespace} yourself ({error.status.name})",
        ) from None
