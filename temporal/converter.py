"""How values become payloads: pydantic models, sealed where encryption is on.

Nothing a stranger sends can break a handler: what cannot be opened or read reaches it raw, and is refused
there on the record.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

from google.protobuf.message import DecodeError
from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import (
    ActivitySerializationContext,
    DataConverter,
    DefaultFailureConverterWithEncodedAttributes,
    PayloadCodec,
    SerializationContext,
)
from temporalio.exceptions import FailureError

from activities.services.vault import Keys, load_keys, missing
from models.errors import InvalidInput, KeyMissing, LedgerBroken
from models.settings import EncryptionSettings

ENCODING = b"binary/encrypted"
PURPOSE = "payload"
KEY_ID = "encryption-key-id"
VEILED = "sealed:"
"""Begins a text that stands sealed where Temporal takes no payload."""


class SealingCodec(PayloadCodec):
    """Seals payloads under the current master key, and opens those of any key it has.

    Payloads that come in clear stay so: from before encryption, or typed into the Temporal UI by a person.
    """

    def __init__(self, keys: Keys) -> None:
        """The keys do not change while a process lives; restart it to rotate."""
        self._keys = keys

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Seal all of them, metadata included; what is sealed already stays as it is."""
        return [payload if is_sealed(payload) else self._seal(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Open what can be opened.

        The rest stays sealed instead of raising: an error here would stop the whole workflow task, for ever,
        because of one payload that a stranger may have sent. The converter says what is wrong with it.
        """
        return [self._opened(payload) if is_sealed(payload) else payload for payload in payloads]

    def _seal(self, payload: Payload) -> Payload:
        return Payload(
            metadata={
                "encoding": ENCODING,
                "encryption-cipher": b"AES-256-GCM",
                KEY_ID: self._keys.current.encode(),
            },
            data=self._keys.seal(PURPOSE, payload.SerializeToString(), ENCODING.decode()),
        )

    def _opened(self, payload: Payload) -> Payload:
        try:
            plain = self._keys.open(key_of(payload), PURPOSE, payload.data, ENCODING.decode())
            return Payload.FromString(plain)
        except (KeyMissing, LedgerBroken):
            return payload


def is_sealed(payload: Payload) -> bool:
    """Whether it says so itself."""
    return payload.metadata.get("encoding") == ENCODING


def key_of(payload: Payload) -> str:
    """The id of the key a sealed payload names."""
    return payload.metadata.get(KEY_ID, b"").decode(errors="replace")


async def veiled(text: str, codec: PayloadCodec | None) -> str:
    """A text for where Temporal takes no payload, as the note of a schedule; as it is with encryption off."""
    if codec is None or not text or text.startswith(VEILED):
        return text
    [sealed] = await codec.encode([Payload(metadata={"encoding": b"binary/plain"}, data=text.encode())])
    return VEILED + b64encode(sealed.SerializeToString()).decode()


async def unveiled(text: str, codec: PayloadCodec | None) -> str:
    """What `veiled` made, opened; as it is if it does not open, or if somebody else wrote it in clear."""
    if codec is None or not text.startswith(VEILED):
        return text
    try:
        sealed = Payload.FromString(b64decode(text[len(VEILED) :], validate=True))
        [opened] = await codec.decode([sealed])
        return text if is_sealed(opened) or not is_sealed(sealed) else opened.data.decode()
    except (ValueError, DecodeError):
        return text


class NotYetUnderstood(Exception):
    """A worker of another version, or with another key, wrote what this one cannot read.

    Being no failure of Temporal's it fails the task and not the run, which waits for one that can.
    """


class LenientPayloadConverter(PydanticPayloadConverter):
    """As pydantic's, but a payload that nobody gave a type and that cannot be read arrives raw.

    Without this the SDK drops such a signal, and no trace of the attempt would stand in the ledger.
    """

    _is_ours = False
    """Whether what is read goes from worker to worker, so that no stranger can have written it."""

    def with_context(self, context: SerializationContext) -> Self:
        """The same for what an activity is given and returns, where that is what is read."""
        made = copy(super().with_context(context))
        made._is_ours = isinstance(context, ActivitySerializationContext)
        return made

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Read payloads; only untyped ones may arrive as `RawValue`.

        Raises:
            InvalidInput: a typed one does not fit; a run that was started with it fails, instead of trying
                its first task for ever.
            KeyMissing: it is still sealed, as its key is not here or it was changed.
            NotYetUnderstood: instead of both, where another worker wrote it.
        """
        if type_hints is None:
            return [self._read(payload) for payload in payloads]
        try:
            return self._typed(payloads, type_hints)
        except FailureError as error:
            if not self._is_ours:
                raise
            names = ", ".join(map(_name, type_hints))
            raise NotYetUnderstood(
                f"{names}: {type(error).__name__}; a worker of a newer version or with its key goes on"
            ) from None

    def _typed(self, payloads: Sequence[Payload], type_hints: list[type]) -> list[Any]:
        for payload in payloads:
            if is_sealed(payload):
                raise _still_sealed(payload)
        try:
            return super().from_payloads(payloads, type_hints)
        except ValidationError as error:
            raise refused(error) from None
        except FailureError:
            raise
        except Exception as error:
            raise InvalidInput.field(
                "input", type(error).__name__, f"send JSON for {', '.join(map(_name, type_hints))}"
            ) from None

    def _read(self, payload: Payload) -> Any:
        try:
            return super().from_payloads([payload])[0]
        except Exception:
            # Whatever went wrong, the handler records that something unreadable came.
            return RawValue(payload)


class _Unstored(DataConverter):
    """Takes a payload that says it stands elsewhere as it came: nothing of ours does.

    The SDK would stop the whole workflow task, for ever, because of one that a stranger sent.
    """

    async def _decode_reference_payload_sequence(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)

    async def _external_retrieve_payload_sequence(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)


def refused(error: ValidationError) -> InvalidInput:
    """The first thing that does not fit, with field, value and remedy."""
    first = cast(dict[str, Any], error.errors(include_url=False)[0])
    field = ".".join(str(part) for part in first["loc"]) or "input"
    return InvalidInput.field(field[:80], first.get("input"), f"{error.title}: {first['msg']}")


def _name(hint: type) -> str:
    return getattr(hint, "__name__", str(hint))


def _still_sealed(payload: Payload) -> KeyMissing:
    return KeyMissing(f"payload: it does not open; {missing(key_of(payload)[:80])}")


def codec_of(settings: EncryptionSettings, data: Path, url: str = "sqlite://") -> SealingCodec | None:
    """The codec that settings ask for; `None` with encryption off. `url` as for `load_keys`."""
    keys = load_keys(settings, data, url)
    return SealingCodec(keys) if keys is not None else None


def data_converter(codec: PayloadCodec | None = None) -> DataConverter:
    """The converter of clients, workers, replay and tests; with a codec, failure texts are sealed too."""
    plain = _Unstored(payload_converter_class=LenientPayloadConverter)
    if codec is None:
        return plain
    return replace(
        plain,
        payload_codec=codec,
        failure_converter_class=DefaultFailureConverterWithEncodedAttributes,
    )
