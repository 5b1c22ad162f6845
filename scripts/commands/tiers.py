"""`countersign tiers`: what the model servers are and really do, and what their confidence is worth."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.table import Table

from activities.services.calibration import Calibrations
from activities.services.probe import probe
from activities.services.routes import Measurements, wish_of
from activities.tiers.kinds import chat_endpoint
from activities.tiers.wire import http_client
from models.calibration import ENOUGH, Fit, Spread, odds_of, share
from models.inference import Needs, Probed, Route
from models.routing import Snapshot, Telemetry, decide
from models.settings import Settings, TaskSettings, TierSettings
from scripts.commands.session import Json, console, opened, said, utc_now
from scripts.exits import EXPLAINED, Exit
from workers import config, registry

WORDS = {True: "yes", False: "no", None: "?"}


tiers = typer.Typer(invoke_without_command=True)


@tiers.callback(epilog=EXPLAINED)
def table(ctx: typer.Context, as_json: Json = False) -> None:
    """Try every model server: identity, context, schemas, logprobs, usage, cancel.

    Ends with 3 if a server is away or does not do what its settings say.
    """
    if ctx.invoked_subcommand is not None:
        return
    known = config.load()
    settings = known.tiers
    found = asyncio.run(probed(settings))
    if as_json:
        said([each.model_dump(mode="json") for each in found])
    else:
        _show(settings, found)
        show_silent(found, [name for name, one in known.tasks.items() if one.wrong_costs is not None])
    raise typer.Exit(
        Exit.DONE if all(each.reachable and not each.false for each in found) else Exit.NOT_READY
    )


@tiers.command(epilog=EXPLAINED)
def calibrate(as_json: Json = False) -> None:
    """Hold verdicts and checks against how sure models were, and put on record what comes of it.

    It concerns tasks with `wrong_costs`; running workers go by the newest calibration within half a minute.
    """
    settings = config.load()
    found = asyncio.run(_calibrated(settings))
    if as_json:
        said([{**one.fit.model_dump(mode="json"), "trusted": one.fit.trusted, **one.now()} for one in found])
    else:
        _show_fits(found)


@dataclass(frozen=True, slots=True)
class Shown:
    """One fit, and how a call of its task would be routed by it right now."""

    fit: Fit
    route: Route | None

    def now(self) -> dict[str, Any]:
        """Where a call begins, and from which confidence on that model's answer is taken."""
        if self.route is None or not self.route.tiers:
            return {"begins": None, "threshold": None}
        bar = self.route.bar
        mine = bar is not None and bar.model == self.fit.model and self.fit.after is None
        return {"begins": self.route.tiers[0], "threshold": bar.confidence if bar and mine else None}


async def _calibrated(settings: Settings) -> list[Shown]:
    async with opened(settings) as session:
        fits = await Calibrations(session.database, utc_now).refit(session.tenant)
        measured = Measurements(session.database, settings.tiers, utc_now)
        names = sorted({fit.task for fit in fits})
        routes = {name: now_of(settings, name, fits, await measured.of(name)) for name in names}
    return [Shown(fit, routes[fit.task]) for fit in fits]


def now_of(
    settings: Settings, task: str, fits: Sequence[Fit], known: Mapping[str, Telemetry]
) -> Route | None:
    """How a call without special needs would be routed; `None` if the settings do not weigh the task."""
    wanted = settings.tasks.get(task, TaskSettings())
    if wanted.wrong_costs is None:
        return None
    odds = odds_of(fit for fit in fits if fit.task == task)
    weighed = {
        name: one.model_copy(update={"odds": odds.get(one.model or "")}) for name, one in known.items()
    }
    asked = registry.tasks(settings).get(task)
    wish = wish_of(task, asked.prefer if asked else "small", Needs(context_tokens=1), wanted, draw=1000)
    return decide(wish, settings.tiers, Snapshot(tiers=weighed)).route


def _show_fits(found: Sequence[Shown]) -> None:
    out = console()
    if not found:
        out.print(
            "no answers on record; set wrong_costs for a task, and its answers are weighed from then on"
        )
        return
    heads = ("task", "model", "answers", "by people", "right", "error before", "after", "begins", "threshold")
    grid = Table(*heads, box=None, pad_edge=False)
    for one in found:
        fit, now = one.fit, one.now()
        model = fit.model if fit.after is None else f"{fit.model} after {fit.after}"
        few = "" if fit.trusted else f" of {ENOUGH}"
        numbers = (f"{fit.count}{few}", str(fit.people), _tenths(share(fit.steps)))
        errors = (_spread(fit.before), _spread(fit.held_out))
        grid.add_row(fit.task, model, *numbers, *errors, now["begins"] or "", _tenths(now["threshold"]))
    out.print(grid)


def _spread(one: Spread | None) -> str:
    return "" if one is None else f"{_tenths(one.permille)} ({_tenths(one.low)} to {_tenths(one.high)})"


def _tenths(permille: int | None) -> str:
    return "" if permille is None else f"{permille / 10:.1f} %"


async def probed(settings: Sequence[TierSettings]) -> list[Probed]:
    """Every tier, tried at the same time."""
    return list(await asyncio.gather(*(_probed(tier) for tier in settings)))


async def _probed(tier: TierSettings) -> Probed:
    async with http_client(tier) as client:
        return await probe(chat_endpoint(tier, client))


def _show(settings: Sequence[TierSettings], found: Sequence[Probed]) -> None:
    grid = Table(
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
        grid.add_row(tier.name, tier.kind, *_row(each))
    out = console()
    out.print(grid)
    for tier, each in zip(settings, found, strict=True):
        if not each.reachable:
            out.print(f"{tier.name}: {tier.url} does not answer; start its server, or correct its url")
        for line in each.false:
            out.print(f"{tier.name}: {line}")


def show_silent(found: Sequence[Probed], weighed: Sequence[str]) -> None:
    """Tiers whose answers tasks with `wrong_costs` take without a doubt."""
    names = ", ".join(sorted(weighed))
    for each in found:
        if names and each.logprobs is False:
            console().print(f"{each.tier}: no logprobs; none of its answers is doubted ({names})")


def _row(each: Probed) -> list[str]:
    numbers = [str(number or "?") for number in (each.context_tokens, each.slots)]
    abilities = (each.tokenizer, each.structured, each.logprobs, each.usage, each.cancel)
    model = each.model or ("?" if each.reachable else "away")
    return [model, *numbers, *(WORDS[ability] for ability in abilities)]
