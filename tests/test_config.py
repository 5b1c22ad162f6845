from __future__ import annotations

import re
import stat
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from models.errors import InvalidInput
from models.settings import Settings, TemporalSettings, TierSettings
from scripts import stack
from workers import config


def load(folder: Path, toml: str = "", **environ: str) -> Settings:
    if toml:
        (folder / "countersign.toml").write_text(toml)
    return config.load(environ, folder)


def test_the_shipped_defaults_are_complete_and_want_no_port_twice(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert [tier.name for tier in settings.tiers] == ["edge"]
    assert len(stack.ports(settings)) == 5


def test_every_connector_a_shipped_policy_names_is_a_shipped_site(tmp_path: Path) -> None:
    settings = load(tmp_path)
    named = {name for policy in settings.policy.agents.values() for name in policy.connectors}
    assert named == {site.name for site in settings.sites}


def test_every_example_in_the_shipped_file_is_accepted(tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[1] / "temporal" / "countersign.toml").read_text()
    example = re.compile(r"^# (\[+[a-z]|[a-z_]+ = )", re.MULTILINE)
    (tmp_path / "countersign.toml").write_text(example.sub(r"\1", shipped))
    settings = config.load({}, tmp_path)
    assert [tier.name for tier in settings.tiers] == ["edge", "large", "vllm"]
    assert settings.encryption.enabled and settings.weaviate is not None
    assert settings.home("acme") == "eu" and len(settings.budgets) == 2
    assert settings.tasks["content.outline"].may_queue


def test_the_own_file_overrides_a_value_and_leaves_its_neighbours(tmp_path: Path) -> None:
    settings = load(tmp_path, '[temporal]\nnamespace = "shop"\n')
    assert settings.temporal.namespace == "shop"
    assert settings.temporal.ui_port == 8233


def test_a_list_in_the_own_file_replaces_the_shipped_one(tmp_path: Path) -> None:
    toml = '[[tiers]]\nname = "large"\nkind = "tgi"\nurl = "https://tgi.example.com"\n'
    assert [tier.name for tier in load(tmp_path, toml).tiers] == ["large"]


def test_the_file_a_variable_names_wins_over_the_one_in_the_folder(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('tenant = "theirs"\n')
    assert load(tmp_path, 'tenant = "ours"\n', COUNTERSIGN_CONFIG=str(other)).tenant == "theirs"


def test_a_named_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="COUNTERSIGN_CONFIG: 'nowhere.toml'"):
        load(tmp_path, COUNTERSIGN_CONFIG="nowhere.toml")


def test_variables_win_over_files(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "[temporal]\nui_port = 1\n",
        COUNTERSIGN_TEMPORAL__UI_PORT="2",
        COUNTERSIGN_TEMPORAL__MANAGED="false",
        COUNTERSIGN_ROLES='["act"]',
    )
    assert (settings.temporal.ui_port, settings.temporal.managed, settings.roles) == (2, False, ("act",))


def test_a_variable_reaches_an_entry_of_a_list_by_its_name(tmp_path: Path) -> None:
    settings = load(tmp_path, COUNTERSIGN_TIERS__EDGE__TOKEN="s3cret")
    token = settings.tiers[0].token
    assert token is not None
    assert token.get_secret_value() == "s3cret"


def test_null_switches_a_part_off(tmp_path: Path) -> None:
    assert load(tmp_path, COUNTERSIGN_EMBEDDINGS="null").embeddings is None


def test_variables_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    assert load(tmp_path, HOME="x", TEMPORAL_ADDRESS="y") == load(tmp_path)


@pytest.mark.parametrize(
    ("toml", "environ", "said"),
    [
        ('[temporal]\nadress = "x"\n', {}, r"temporal\.adress: 'x'.*did you mean address\?"),
        ("colour = 1\n", {}, r"colour: 1 .*known here: .*tenant"),
        ("", {"COUNTERSIGN_COLOUR": "1"}, "colour: '1'.*COUNTERSIGN_COLOUR"),
        ("", {"COUNTERSIGN_TIERS__EDGE__CONCURRENCY": "0"}, r"tiers\.edge\.concurrency: '0'.*greater than"),
        ("", {"COUNTERSIGN_TIERS__HUGE__URL": "x"}, "name one of the entries: edge"),
        ("", {"COUNTERSIGN_TENANT__X": "1"}, "tenant has no parts"),
        ("", {"COUNTERSIGN_ROLES": "act"}, "write a list"),
        ("", {"COUNTERSIGN_ROLES": "[act"}, "write lists and tables as JSON"),
        ("tenant = \n", {}, "correct the TOML"),
        ("[content]\nmin_words = 9\nmax_words = 8\n", {}, r"content\.max_words: 8 .*min_words \(9\)"),
        ('roles = ["actor"]\n', {}, r"roles\.0: 'actor'.*'act'"),
        ('[pace]\nread = "-PT1M"\n', {}, r"pace\.read: .*greater than"),
        ("", {"COUNTERSIGN_TIERS__EDGE__CURRENCY": "euros"}, r"tiers\.edge\.currency: 'euros'.*\[A-Z\]"),
        (
            '[policy.agents.content.gate]\nautomatic_amount = "1"\nautomatic_currency = "eur"\n',
            {},
            r"automatic_currency: 'eur'",
        ),
        ('[[tiers]]\nname = "a"\nkind = "tgi"\n', {}, r"tiers\.a\.url: .*add url"),
    ],
)
def test_a_wrong_setting_is_refused_with_field_value_and_remedy(
    tmp_path: Path, toml: str, environ: dict[str, str], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        load(tmp_path, toml, **environ)


def test_a_refused_secret_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        load(tmp_path, COUNTERSIGN_TIERS__EDGE__TOKEN='["s3cret"]')
    assert "s3cret" not in str(refused.value)


def test_a_snapshot_restores_everything_with_secrets_for_the_owner_only(tmp_path: Path) -> None:
    tier = TierSettings(name="large", kind="tgi", url="https://t.example.com", token=SecretStr("s3cret"))
    settings = Settings(temporal=TemporalSettings(api_key=SecretStr("key")), tiers=(tier,))
    path = tmp_path / "run" / "settings.json"
    config.snapshot(settings, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(tmp_path, 'tenant = "other"\n', COUNTERSIGN_SETTINGS=str(path)) == settings


def test_a_snapshot_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="COUNTERSIGN_SETTINGS"):
        load(tmp_path, COUNTERSIGN_SETTINGS=str(tmp_path / "gone.json"))


def test_dates_and_times_may_be_written_as_toml_has_them(tmp_path: Path) -> None:
    toml = """
        [policy.agents.content.gate.hours]
        zone = "Europe/Berlin"
        closed = [2026-12-25]
        [[policy.agents.content.grants]]
        name = "summer"
        connector = "demo"
        operations = ["publish"]
        targets = ["demo:*"]
        max_uses = 2
        valid_until = 2026-12-24T18:00:00+01:00
    """
    policy = load(tmp_path, toml).policy.agents["content"]
    assert policy.gate.hours is not None and policy.gate.hours.closed == (date(2026, 12, 25),)
    assert policy.grants[0].valid_until == datetime(2026, 12, 24, 17, tzinfo=UTC)
    with pytest.raises(InvalidInput, match="tenant: .* is not accepted"):
        load(tmp_path, "tenant = 2026-12-25\n")


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("COUNTERSIGN_ROLES__ACT", "1", "write the list"),
        ("COUNTERSIGN_PEOPLE__ANN", "1", "people: "),
        ("COUNTERSIGN_TIERS__LARGE__URL", "x", "name one of the entries: edge"),
        ("COUNTERSIGN_TASKS", "[" * 100_000, "write lists and tables as JSON"),
    ],
)
def test_a_variable_that_reaches_nothing_is_refused(
    tmp_path: Path, name: str, text: str, remedy: str
) -> None:
    with pytest.raises(InvalidInput, match=remedy):
        load(tmp_path, **{name: text})


@pytest.mark.parametrize("text", ["a = [", "a=" + "[" * 5000 + "]" * 5000, "\0"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    refused = "^InvalidInput: COUNTERSIGN_CONFIG: .* is not accepted; correct the TOML"
    with pytest.raises(InvalidInput, match=refused):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temporal.ui_port", "-1"),
        ("temporal.task_timeout", "PT0S"),
        ("weaviate.port", "65536"),
        ("embeddings.dimensions", "0"),
        ("embeddings.timeout_seconds", "-1"),
        ("embeddings.url", "127.0.0.1"),
        ("content.min_words", "-1"),
        ("database", "countersign.db"),
    ],
)
def test_a_number_or_address_that_nothing_could_use_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"^InvalidInput: {name}: .* is not accepted"):
        load(tmp_path, **{f"COUNTERSIGN_{name.upper().replace('.', '__')}": text})
