"""What somebody finds who brings a file of people's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts import verify_ledger
from tests.conftest import Stack
from tests.test_cli import command


async def audited(stack: Stack, folder: Path) -> dict[str, Any]:
    """What verifying the ledger comes to with the keys that settings name, once both verifiers agree."""
    file, export = folder / "signers", folder / "export"
    file.write_text((await command(stack, "people", "--signers")).stdout)
    await command(stack, "ledger", "checkpoint")
    ran = await command(stack, "ledger", "verify", "--signers", str(file), "--json")
    report: dict[str, Any] = json.loads(ran.stdout)
    await command(stack, "ledger", "export", "--out", str(export))
    key = verify_ledger.Key((await command(stack, "ledger", "key")).stdout)
    signers = verify_ledger.read_signers(str(file))
    code, said = verify_ledger.check_export(str(export), [key], [], signers=signers)
    first = report["findings"][0]["seq"] if report["findings"] else None
    assert (code, said["signatures"], said["first_bad_event"]) == (ran.exit_code, report["signatures"], first)
    return report
