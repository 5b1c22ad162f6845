"""`countersign tiers`: what the model servers are, what they really do, and which settings are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import typer
from rich.table import Table

from activities.services.probe import probe
from activities.tiers.kinds import chat_endpoint
from activities.tiers.wire import http_client
from models.inference import Probed
from models.settings import TierSettings
from scripts.commands.session import Json, console, said
from scripts.exits import Exit
from workers import config

WORDS = {True: "yes", False: "no", None: "?"}


def tiers(as_json: Json = False) -> None:
    """Try every model server: identity, context, schemas, logprobs, usage, cancel.

    Ends with 3 if a server is away or does not do what its settings say.
    """
    settings = config.load().tiers
    found = asyncio.run(probed(settings))
    if as_json:
        said([each.model_dump(mode="json") for each in found])
    else:
        _show(settings, found)
    raise typer.Exit(
        Exit.DONE if all(each.reachable and not each.false for each in found) else Exit.NOT_READY
    )


async def probed(settings: Sequence[TierSettings]) -> list[Probed]:
    """Every tier, tried at the same time."""
    return list(await asyncio.gather(*(_probed(tier) for tier in settings)))


async def _probed(tier: TierSettings) -> Probed:
    async with http_client(tier) as client:
        return await probe(chat_endpoint(tier, client))


def _show(settings: Sequence[TierSettings], found: Sequence[Probed]) -> None:
    table = Table(
        *(
            "tier",
            "kind",
            "model",
            "context",
            "at once",
            "tokenizer",
            "schema",
            "logprobs",
            "usage",
            "cancel",
        ),
        box=None,
        pad_edge=False,
    )
    for tier, each in zip(settings, found, strict=True):
        table.add_row(tier.name, tier.kind, *_row(each))
    out = console()
    out.print(table)
    for tier, each in zip(settings, found, strict=True):
        if not each.reachable:
            out.print(f"{tier.name}: {tier.url} does not answer; start its server, or correct its url")
        for line in each.false:
            out.print(f"{tier.name}: {line}")


def _row(each: Probed) -> list[str]:
    numbers = [str(number or "?") for number in (each.context_tokens, each.slots)]
    abilities = (each.tokenizer, each.structured, each.logprobs, each.usage, each.cancel)
    model = each.model or ("?" if each.reachable else "away")
    return [model, *numbers, *(WORDS[ability] for ability in abilities)]
